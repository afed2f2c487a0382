"""Is a checkpoint whole, and does it run? Every check there is, one after another.

    files      sizes and SHA-256 against the manifest; of a published folder the index and headers
    config     the geometry can be read and makes sense
    shapes     each tensor the model has is there, in its shape, and no other
    values     no NaN, no infinity
    tokenizer  it can be trusted and has no id beyond the embedding
    forward    the model reads a few tokens and answers with finite numbers

A check that fails does not stop the others, unless they stand on it. Nothing is repaired and
nothing in the folder is executed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch

from deltamoe.checkpoint import (
    Checkpoint,
    Header,
    load,
    load_config,
    open_checkpoint,
    read_header,
    require_finite,
    step_folders,
)
from deltamoe.checkpoint.folder import TOKENIZER, WEIGHTS
from deltamoe.checkpoint.manifest import MANIFEST
from deltamoe.checkpoint.published import (
    PublishedFolder,
    is_published,
    open_published,
    published_checkpoint,
)
from deltamoe.checkpoint.quantized import check_stored, quantization_of
from deltamoe.checkpoint.tensors import map_tensor
from deltamoe.config import ModelConfig
from deltamoe.errors import CheckpointError, DeltamoeError
from deltamoe.plan import parameters
from deltamoe.tokenizer import Tokenizer, check_fit, load_tokenizer

__all__ = ["Check", "Verdict", "verify"]

_Found = TypeVar("_Found")

_TEXT = "The model reads this. 1 + 1 = 2\n狐は速い"


class Check(NamedTuple):
    """What one check found; ``note`` is the reason or the finding."""

    name: str
    status: Literal["good", "bad", "skipped"]
    note: str


@dataclass
class Verdict:
    """All checks of one path, in order, and what was wrong.

    Attributes:
        path: what was looked at; of a run, its newest checkpoint.
        kind: what it is.
    """

    path: Path
    kind: Literal["file", "checkpoint", "published"]
    checks: list[Check] = field(default_factory=list)
    faults: list[DeltamoeError] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether no check failed."""
        return not self.faults

    def attempt(
        self, name: str, check: Callable[[], _Found], note: Callable[[_Found], str] = str
    ) -> _Found | None:
        """Run a check and note its outcome; None if it failed."""
        try:
            found = check()
        except DeltamoeError as fault:
            self.faults.append(fault)
            self.checks.append(Check(name, "bad", str(fault)))
            return None
        self.checks.append(Check(name, "good", note(found)))
        return found

    def skip(self, name: str, reason: str) -> None:
        """Note that a check was not run, and why."""
        self.checks.append(Check(name, "skipped", reason))


def verify(path: Path | str, *, is_run: bool = True) -> Verdict:
    """Check a safetensors file, a step folder, a published folder, or a run's newest checkpoint.

    Args:
        path: what to look at. The newest checkpoint of a run counts, good or bad.
        is_run: load the model and run one forward pass; it needs the memory for it.

    Returns:
        the verdict; faults are in it and not raised.

    Raises:
        CheckpointError: there is nothing to look at.

    Cost: reads every byte once or twice.
    """
    path = Path(path)
    if path.is_file():
        return _verify_file(path)
    if (path / "checkpoints").is_dir() and not (path / MANIFEST).exists():
        folders = step_folders(path)
        if not folders:
            raise CheckpointError(f"{path}: no checkpoint yet; expected checkpoints/step-N in it")
        path = folders[-1]
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected a file or a folder; there is nothing there")
    return _verify_folder(path, is_run)


def _verify_file(path: Path) -> Verdict:
    verdict = Verdict(path, "file")
    header = verdict.attempt("files", lambda: read_header(path), _counted)
    if header is None:
        verdict.skip("values", "no header to go by")
    else:
        verdict.attempt("values", lambda: _check_values(dict.fromkeys(header.tensors, header)))
    return verdict


def _verify_folder(path: Path, is_run: bool) -> Verdict:
    verdict = Verdict(path, "published" if is_published(path) else "checkpoint")
    is_foreign = verdict.kind == "published"
    opened = published_checkpoint if is_foreign else open_checkpoint
    checkpoint = verdict.attempt("files", lambda: opened(path), _sealed)
    config = verdict.attempt("config", lambda: load_config(path), _described)
    places: dict[str, Header] | None = None
    if config is None:
        verdict.skip("shapes", "no configuration to compare with")
    elif is_foreign:
        folder = verdict.attempt("shapes", lambda: open_published(path), _published_shapes)
        if folder is not None:
            places = {stored: header for header, stored in folder.places.values()}
    else:
        header = verdict.attempt(
            "shapes", lambda: _checked_header(path, config), _counted_weights(config)
        )
        if header is not None:
            places = dict.fromkeys(header.tensors, header)
    if places is None:
        verdict.skip("values", "the tensors are not what they should be")
    else:
        verdict.attempt("values", lambda: _check_values(places))
    tokenizer = _verify_tokenizer(verdict, path, config)
    if not is_run:
        verdict.skip("forward", "not asked for")
    elif verdict.faults:
        verdict.skip("forward", "something above is wrong")
    else:
        source = path if is_foreign else checkpoint
        assert source is not None
        verdict.attempt("forward", lambda: _run(source, tokenizer))
    return verdict


def _verify_tokenizer(verdict: Verdict, path: Path, config: ModelConfig | None) -> Tokenizer | None:
    if not any((path / name).exists() for name in (TOKENIZER, "tiktoken.model")):
        verdict.skip("tokenizer", "the folder holds none")
        return None

    def fitting() -> Tokenizer:
        tokenizer = load_tokenizer(path if verdict.kind == "published" else path / TOKENIZER)
        if config is not None:
            check_fit(tokenizer, config.vocab_size)
        return tokenizer

    return verdict.attempt("tokenizer", fitting, lambda t: f"{t.name}, {t.vocab_size:,} ids")


def _sealed(checkpoint: Checkpoint) -> str:
    files = checkpoint.manifest.files
    summary = f"{len(files)} files, {checkpoint.manifest.num_bytes:,} bytes"
    if all(record.sha256 for record in files.values()):
        return f"{summary}: sizes and SHA-256 agree with the manifest"
    return f"{summary}; no manifest, so no hashes to compare"


def _described(config: ModelConfig) -> str:
    return f"{config.num_layers} layers ({config.schedule}), vocabulary {config.vocab_size:,}"


def _checked_header(path: Path, config: ModelConfig) -> Header:
    header = read_header(path / WEIGHTS)
    check_stored(header, config)
    return header


def _counted(header: Header) -> str:
    return f"{len(header.tensors):,} tensors, {header.num_elements:,} parameters"


def _counted_weights(config: ModelConfig) -> Callable[[Header], str]:
    """As ``_counted``; codes and scales of a quantised model are no parameters of their own."""

    def counted(header: Header) -> str:
        bits = quantization_of(header)
        if bits is None:
            return _counted(header)
        total = parameters(config).total
        return f"{len(header.tensors):,} tensors, {total:,} parameters, quantised to {bits} bits"

    return counted


def _published_shapes(folder: PublishedFolder) -> str:
    files = {header.path for header, _ in folder.places.values()}
    return f"{_counted(folder.header)} in {len(files)} file{'s' if len(files) > 1 else ''}"


def _check_values(places: dict[str, Header]) -> str:
    for name, header in places.items():
        require_finite({name: map_tensor(header, name)}, source=str(header.path))
    return "all finite"


def _run(source: Path | Checkpoint, tokenizer: Tokenizer | None) -> str:
    model = load(source)
    vocab_size = model.config.vocab_size
    given = range(1, 33) if tokenizer is None else [tokenizer.end_id, *tokenizer.encode(_TEXT)]
    ids = torch.tensor([[token_id % vocab_size for token_id in given]])
    begin = time.perf_counter()
    with torch.inference_mode():
        logits, _ = model(ids)
    seconds = time.perf_counter() - begin
    if not logits.isfinite().all():
        raise CheckpointError("the model answers with logits that are not finite; damaged weights")
    return f"{ids.numel()} tokens in {seconds * 1000:,.0f} ms, all logits finite"
