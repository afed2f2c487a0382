"""Preparation: documents are tokenised once into shards, and every later use maps those.

A prepared folder is found again by the hash of everything that went into it: the source's texts,
the share held out and the tokenizer. So a changed text makes a new folder and an old one is never
wrong. Threads do the work, because the tokenizer releases the interpreter lock.

Knows nothing of batches or torch.
"""

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltamoe.config import DataConfig
from deltamoe.data.builtin import BUILT_IN
from deltamoe.data.cache import cache_folder, mark_as_cache, new_folder
from deltamoe.data.document import Document, Source
from deltamoe.data.manifest import FORMAT, Manifest, write_manifest
from deltamoe.data.prepared import PreparedData, is_prepared, open_prepared
from deltamoe.data.shards import SplitWriter
from deltamoe.data.source import open_source
from deltamoe.errors import ConfigError, DataError
from deltamoe.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, load_tokenizer

__all__ = ["Progress", "prepare"]

# A BPE learns nothing more from text beyond this, and its training would not end.
BPE_TRAINING_BYTES = 256 << 20
PIECES_AHEAD = 4  # for each thread, so that none waits for the writer

_LOG = logging.getLogger("deltamoe")

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how many UTF-8 bytes are done, and of how many if known."""


def prepare(
    config: DataConfig,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    out: Path | None = None,
) -> PreparedData:
    """Tokenise the text a configuration names, or open what was tokenised before.

    Args:
        config: ``path`` or ``mixture``, ``tokenizer``, ``validation_fraction``, ``text_field`` and
            ``cache``. A source that is a prepared folder brings its own tokenizer and split.
        workers: threads that tokenise; None takes one for each CPU.
        progress: is told how far the work is.
        out: put the prepared folder here instead of the cache; for a single source.

    Raises:
        ConfigError: nothing has that name, a needed package is missing, or tokenizers disagree.
        DataError: a text or a prepared folder is broken; the message names file and byte.
        DoesNotFitError: the disk is full.
    """
    work = _Work(workers or os.cpu_count() or 1, progress or (lambda what, done, total: None))
    weights = config.mixture or {config.path: 1.0}
    opened: dict[str, PreparedData] = {}
    sources: dict[str, Source] = {}
    for name in weights:
        folder = Path(name).expanduser()
        if name not in BUILT_IN and is_prepared(folder):
            opened[name] = open_prepared(folder)
        else:
            sources[name] = open_source(name, config.text_field)
    if out is not None:
        _require_place(out, list(sources), list(opened))

    if out is None:
        mark_as_cache(cache_folder(config.cache))
    tokenizer = _tokenizer(config, list(sources.values()), list(opened.values()), work)
    for name, source in sources.items():
        folder = out or _place(config, source, tokenizer)
        if not is_prepared(folder):
            _write(folder, source, config.validation_fraction, tokenizer, work)
        opened[name] = open_prepared(folder)
        _require_same(opened[name], source, tokenizer, config)
    parts = {name: opened[name].sources[0] for name in weights}
    return PreparedData(
        tokenizer,
        tuple(replace(part, name=name, weight=weights[name]) for name, part in parts.items()),
    )


class _Work(NamedTuple):
    workers: int
    progress: Progress


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _tokenizer(
    config: DataConfig, sources: list[Source], opened: list[PreparedData], work: _Work
) -> Tokenizer:
    """The one tokenizer of all sources."""
    given = {data.tokenizer.fingerprint: data.tokenizer for data in opened}
    if len(given) > 1:
        names = " and ".join(sorted(tokenizer.name for tokenizer in given.values()))
        raise ConfigError(f"the prepared folders of one mixture differ in their tokenizer: {names}")
    for tokenizer in given.values():
        return tokenizer
    kind, _, size = config.tokenizer.partition(":")
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        if not size.isdecimal():
            raise ConfigError(
                f"data.tokenizer = {config.tokenizer!r}: expected a size such as bpe:4096"
            )
        return _trained_bpe(config, sources, int(size), work)
    if not Path(config.tokenizer).expanduser().exists():
        raise ConfigError(
            f"data.tokenizer = {config.tokenizer!r}: expected bytes, bpe:SIZE or the path of a "
            "tokenizer.json"
        )
    return load_tokenizer(Path(config.tokenizer).expanduser())


def _trained_bpe(
    config: DataConfig, sources: list[Source], vocab_size: int, work: _Work
) -> Tokenizer:
    """Train on the training texts of all sources, or take what was trained on them before."""
    texts = [source.sha256 for source in sources]
    key = _hash([texts, config.validation_fraction, config.text_field, vocab_size, FORMAT])
    folder = cache_folder(config.cache) / "tokenizers" / f"bpe-{vocab_size}-{key[:16]}"
    if not folder.is_dir():
        documents = chain.from_iterable(
            source.documents(config.validation_fraction) for source in sources
        )
        pieces = _training_pieces(documents, work.progress)
        tokenizer = BpeTokenizer.train(pieces, vocab_size)
        with new_folder(folder) as unfinished:
            tokenizer.save(unfinished)
    return load_tokenizer(folder)


def _training_pieces(documents: Iterable[Document], progress: Progress) -> Iterator[str]:
    num_bytes = 0
    for document in documents:
        for piece in document.pieces:
            if not document.is_validation:
                yield piece
                num_bytes += len(piece.encode())
                progress("training the tokenizer", num_bytes, None)
        if num_bytes >= BPE_TRAINING_BYTES:
            return


def _place(config: DataConfig, source: Source, tokenizer: Tokenizer) -> Path:
    key = _hash(
        [
            source.sha256,
            config.validation_fraction,
            config.text_field,
            tokenizer.fingerprint,
            type(source).__name__,
            FORMAT,
        ]
    )
    label = "".join(c if c.isalnum() else "-" for c in Path(source.name).name)[-40:]
    kind = tokenizer.name.replace(":", "-")
    return cache_folder(config.cache) / "data" / f"{label}-{kind}-{key[:16]}"


def _write(
    folder: Path, source: Source, validation_fraction: float, tokenizer: Tokenizer, work: _Work
) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    with (
        new_folder(folder) as unfinished,
        SplitWriter(unfinished, "train", dtype, tokenizer.end_id) as train,
        SplitWriter(unfinished, "validation", dtype, tokenizer.end_id) as validation,
    ):
        num_bytes = 0
        for piece in _tokenised(source.documents(validation_fraction), tokenizer, work.workers):
            writer = validation if piece.is_validation else train
            if piece.starts_document:
                writer.start_document()
            writer.write(piece.ids, piece.num_bytes)
            num_bytes += piece.num_bytes
            work.progress("tokenising", num_bytes, source.num_bytes)
        manifest = Manifest(
            source=source.name,
            description=source.description,
            source_sha256=source.sha256,
            num_skipped=len(source.skipped),
            skipped=tuple(f"{name}: {reason}" for name, reason in source.skipped[:20]),
            validation_fraction=validation_fraction,
            tokenizer=tokenizer.name,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            end_id=tokenizer.end_id,
            dtype=dtype.name,
            train=train.finish(),
            validation=validation.finish(),
        )
        if not (manifest.train.num_documents and manifest.validation.num_documents):
            raise DataError(
                f"{source.name}: all documents are equal, so none can be held out of the training "
                "text"
            )
        tokenizer.save(unfinished)
        write_manifest(unfinished, manifest)
    _tell_skipped(source)


def _tell_skipped(source: Source) -> None:
    strange = [item for item in source.skipped if item.reason != "is empty"]
    for name, reason in strange[:3]:
        _LOG.warning("%s: skipped %s: %s", source.name, name, reason)
    if len(strange) > 3:
        _LOG.warning("%s: skipped %d more files; see its manifest", source.name, len(strange) - 3)


class _Piece(NamedTuple):
    ids: NDArray[np.uint32]
    num_bytes: int
    is_validation: bool
    starts_document: bool


def _tokenised(
    documents: Iterable[Document], tokenizer: Tokenizer, workers: int
) -> Iterator[_Piece]:
    """Tokenise pieces in threads and yield them in their order, few at a time in memory."""

    def tokenise(text: str, is_validation: bool, starts_document: bool) -> _Piece:
        ids = tokenizer.encode_array(text)
        return _Piece(ids, len(text.encode()), is_validation, starts_document)

    ahead: deque[Future[_Piece]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for document in documents:
            for number, text in enumerate(document.pieces):
                ahead.append(pool.submit(tokenise, text, document.is_validation, number == 0))
                if len(ahead) >= PIECES_AHEAD * workers:
                    yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _require_place(out: Path, sources: list[str], prepared: list[str]) -> None:
    """Refuse to put several sources, or none, or among other files."""
    if len(sources) != 1 or prepared:
        raise ConfigError(
            f"{out} can hold one source: expected the name of one text, not a mixture or a "
            "prepared folder"
        )
    if out.exists() and not is_prepared(out) and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty: expected a new folder for the prepared data")


def _require_same(
    data: PreparedData, source: Source, tokenizer: Tokenizer, config: DataConfig
) -> None:
    """Refuse a folder that holds other data than was asked for."""
    (part,) = data.sources
    assert part.manifest is not None
    if (
        part.manifest.source_sha256 != source.sha256
        or part.manifest.tokenizer_fingerprint != tokenizer.fingerprint
        or part.manifest.validation_fraction != config.validation_fraction
    ):
        raise ConfigError(
            f"{part.folder} holds other data ({part.manifest.source}, {part.manifest.tokenizer}); "
            "choose another folder or remove it"
        )
