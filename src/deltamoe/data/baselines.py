"""What programs that learn almost nothing make of the same text: a compressor and a 5-gram.

A model above these has learned less than they. All figures are bits per byte of the held-out text.
Knows nothing of models; no torch.
"""

import json
import lzma
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deltamoe.checkpoint.durable import replace_file
from deltamoe.config import check_format, read_json
from deltamoe.data.prepared import PreparedSource
from deltamoe.data.stream import TokenStream
from deltamoe.errors import CheckpointError, DataError
from deltamoe.tokenizer import Tokenizer

__all__ = ["Baselines", "measure_baselines", "ngram_bits_per_byte", "xz_bits_per_byte"]

FORMAT = 1
NGRAM_ORDER = 5
# Enough for every corpus that trains a small model; both baselines take minutes beyond.
MAX_TRAIN_BYTES = 32 << 20
MAX_VALIDATION_BYTES = 4 << 20


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of the held-out text.

    Attributes:
        xz: compressed alone.
        xz_given_train: the bytes it adds to the compressed training text.
        ngram: a 5-gram model of bytes, counted on the training text.
        train_bytes, validation_bytes: how much of each split was read, from its start.
    """

    xz: float
    xz_given_train: float
    ngram: float
    train_bytes: int
    validation_bytes: int

    def write(self, path: Path) -> None:
        """Write them as JSON."""
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")


def measure_baselines(
    tokenizer: Tokenizer,
    source: PreparedSource,
    progress: Callable[[str], None] = lambda what: None,
) -> Baselines:
    """Measure the baselines of a source, or read what was measured before.

    A prepared folder keeps them in ``baselines.json``. At most 32 MiB of training text and 4 MiB of
    held-out text are read.

    Args:
        tokenizer: the one that made the source's tokens.
        source: what to measure.
        progress: is told what is being done.

    Cost: about two minutes and 1 GiB for the largest texts; a quarter of that for 10 MB.
    """
    path = None if source.folder is None else source.folder / "baselines.json"
    if path is not None and path.exists():
        return _read(path)
    train = _text(tokenizer, source.train, MAX_TRAIN_BYTES)
    validation = _text(tokenizer, source.validation, MAX_VALIDATION_BYTES)
    progress(f"{NGRAM_ORDER}-gram on {len(train):,} bytes")
    ngram = ngram_bits_per_byte(validation, train)
    progress(f"xz on {len(train):,} bytes")
    baselines = Baselines(
        xz=xz_bits_per_byte(validation),
        xz_given_train=xz_bits_per_byte(validation, train),
        ngram=ngram,
        train_bytes=len(train),
        validation_bytes=len(validation),
    )
    if path is not None:
        with suppress(CheckpointError):  # a folder that cannot be written is measured every time
            replace_file(path, baselines.write)
    return baselines


def xz_bits_per_byte(validation: bytes, train: bytes | None = None) -> float:
    """Size of a text compressed by xz at its best, in bits per byte.

    Args:
        validation: the text; not empty.
        train: if given, only the bytes that ``validation`` adds behind it are counted.
    """
    if train is None:
        added = _xz_size(validation, len(validation))
    else:
        whole = len(train) + len(validation)
        added = _xz_size(train + validation, whole) - _xz_size(train, whole)
    return 8 * added / len(validation)


def ngram_bits_per_byte(validation: bytes, train: bytes, order: int = NGRAM_ORDER) -> float:
    """Loss of an n-gram model of bytes with interpolated Witten-Bell smoothing.

    The probability of byte c after the n-1 bytes h mixes what was counted with what one byte less
    of context says, the more so the more kinds of bytes have followed h:

        p(c | h) = (count(h c) + kinds(h) p(c | h')) / (count(h) + kinds(h))

    where h' is h without its first byte, and p = 1/256 with no context left.

    Args:
        validation: the text that is predicted; not empty.
        train: the text that is counted.
        order: n, from 1 to 8.

    Source: Witten and Bell 1991, method C; interpolated as in Chen and Goodman 1998.
    """
    if not 1 <= order <= 8:
        raise ValueError(f"order {order}: expected 1 to 8, the bytes of a 64-bit number")
    probability = np.full(len(validation), 1 / 256)
    train_codes = np.zeros(len(train) + 1, dtype=np.uint64)
    codes = np.zeros(len(validation) + 1, dtype=np.uint64)
    for n in range(1, min(order, len(train), len(validation)) + 1):
        train_codes = _one_byte_longer(train_codes, train, n)
        codes = _one_byte_longer(codes, validation, n)
        grams, counts = np.unique(train_codes, return_counts=True)
        contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
        totals = np.add.reduceat(counts, first)
        kinds = np.diff(first, append=len(grams))

        count = _looked_up(codes, grams, counts)
        context = codes >> np.uint64(8)
        total = _looked_up(context, contexts, totals)
        kind = _looked_up(context, contexts, kinds)
        is_seen = total > 0
        lower = probability[n - 1 :]
        mixed = (count + kind * lower)[is_seen] / (total + kind)[is_seen]
        lower[is_seen] = mixed
    return float(-np.log2(probability).mean())


def _one_byte_longer(codes: NDArray[np.uint64], text: bytes, n: int) -> NDArray[np.uint64]:
    """The n bytes that end at each position from n-1 on, as numbers, from the n-1 before it."""
    last = np.frombuffer(text, dtype=np.uint8)[n - 1 :]
    return (codes[:-1] << np.uint64(8)) | last


def _looked_up(
    keys: NDArray[np.uint64], known: NDArray[np.uint64], values: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The value of each key, 0 for one that is not known; ``known`` is ascending."""
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[place] == keys, values[place], 0)


def _xz_size(text: bytes, dictionary_bytes: int) -> int:
    best = {
        "id": lzma.FILTER_LZMA2,
        "preset": 9 | lzma.PRESET_EXTREME,
        "dict_size": max(dictionary_bytes, 4096),
    }
    return len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=[best]))


def _text(tokenizer: Tokenizer, stream: TokenStream, max_bytes: int) -> bytes:
    """The text of a stream, from its start."""
    text = bytearray()
    step = 1 << 20
    for start in range(0, stream.num_tokens, step):
        ids = stream.tokens(start, min(start + step, stream.num_tokens))
        text += tokenizer.decode_bytes(ids)
        if len(text) >= max_bytes:
            break
    return bytes(text[:max_bytes])


def _read(path: Path) -> Baselines:
    data = read_json(path, error=DataError)
    check_format(data, source=str(path), known=FORMAT, error=DataError)
    try:
        kept = Baselines(**{field.name: data[field.name] for field in fields(Baselines)})
    except KeyError as missing:
        raise DataError(f"{path}: {missing} is missing; remove the file to measure again") from None
    return kept
