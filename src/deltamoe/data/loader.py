"""Batches: rows cut from the training text, the same ones after every restart.

Row r of a source is a pure function of the seed, the source and r; nothing is remembered but how
many rows each source has given. An *epoch* of a source is its documents in a new order, read as a
ring from a random point on; its rows are the ring's consecutive pieces of ``context`` tokens, in a
new order too. So rows of one batch come from all over the text, the cuts fall elsewhere in every
epoch (for a text that is one document too), and each row has a next token for its last one. What
does not fill a row, less than ``context`` tokens, is left out of that epoch.

A batch is packed: one line of tokens, with a border wherever a row or a document starts. Memory and
attention begin anew there.

The only file of this folder that imports torch. Letters: N tokens of a batch.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from deltamoe.data.prepared import PreparedData
from deltamoe.data.stream import TokenStream
from deltamoe.errors import ConfigError, DataError

__all__ = ["NO_TARGET", "Batch", "Loader", "validation_batches", "windows"]

NO_TARGET = -100
FORMAT = 1  # of a position; another order of rows is another format


@dataclass(frozen=True)
class Batch:
    """Rows packed into one line.

    Attributes:
        ids: tokens.
        targets: the token after each; ``NO_TARGET`` where the text ends.
        cu_seqlens: where each sequence starts, and N at the end.
        fingerprint: SHA-256 of ``ids``.
    """

    ids: Int64[Tensor, " N"]
    targets: Int64[Tensor, " N"]
    cu_seqlens: Int64[Tensor, " borders"]
    fingerprint: str


class Loader:
    """Endless training batches.

    With several sources, each row comes from the one that is furthest behind its share.

    Args:
        data: what to read.
        context: T, tokens of one row.
        rows: rows of one batch.
        seed: decides all orders.
        position: go on from here; as ``position`` gave it.

    Raises:
        ConfigError: ``position`` belongs to another seed, context or set of sources.
        DataError: ``position`` is damaged.
    """

    def __init__(
        self,
        data: PreparedData,
        *,
        context: int,
        rows: int,
        seed: int,
        position: dict[str, Any] | None = None,
    ) -> None:
        self._rows = rows
        self._kept = {"format": FORMAT, "seed": seed, "context": context}
        self._weights = {source.name: source.weight for source in data.sources}
        self._readers = {
            source.name: _RowReader(source.train, context, (seed, number))
            for number, source in enumerate(data.sources)
        }
        self._given = dict.fromkeys(self._weights, 0)
        if position is not None:
            self._given = self._checked(position)

    @property
    def position(self) -> dict[str, Any]:
        """Where the next batch begins, as plain JSON data."""
        return {**self._kept, "rows": dict(self._given)}

    @property
    def epochs(self) -> dict[str, float]:
        """How often each source has been read, in whole readings and parts of one."""
        return {name: n / self._readers[name].rows_per_epoch for name, n in self._given.items()}

    def next_batch(self) -> Batch:
        """The next batch; the position moves behind it.

        Raises:
            DataError: a shard holds an id outside the vocabulary.
        """
        given = dict(self._given)
        rows = []
        for _ in range(self._rows):
            name = self._furthest_behind(given)
            rows.append(self._readers[name].row(given[name]))
            given[name] += 1
        self._given = given
        return _packed(rows)

    def _furthest_behind(self, given: dict[str, int]) -> str:
        due = (sum(given.values()) + 1) / sum(self._weights.values())
        return max(self._weights, key=lambda name: self._weights[name] * due - given[name])

    def _checked(self, position: dict[str, Any]) -> dict[str, int]:
        for key, value in self._kept.items():
            if position.get(key) != value:
                raise ConfigError(
                    f"the position in the data was made with {key} = {position.get(key)!r:.40}, "
                    f"not {value}: continue with the same {key}"
                )
        given = position.get("rows")
        if not isinstance(given, dict) or any(type(n) is not int or n < 0 for n in given.values()):
            raise DataError(f"the position in the data is damaged: rows = {given!r:.80}")
        if given.keys() != self._weights.keys():
            raise ConfigError(
                f"the position in the data is of the sources {sorted(given)!r:.200}, not of "
                f"{sorted(self._weights)!r:.200}"
            )
        return {name: given[name] for name in self._weights}


class _Row(NamedTuple):
    """One row and the token after it."""

    tokens: NDArray[np.int64]  # [T+1]
    is_border: NDArray[np.bool_]  # [T+1]  a document starts here


class _RowReader:
    """The rows of one stream, by number.

    Args:
        stream: the documents.
        context: T.
        seed: numbers that, with the epoch, decide the orders.
    """

    def __init__(self, stream: TokenStream, context: int, seed: tuple[int, int]) -> None:
        self._stream = stream
        self._context = context
        self._seed = seed
        self.rows_per_epoch = max(stream.num_tokens // context, 1)
        # One source alternates between two epochs at most, within the batch that meets the border.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def row(self, number: int) -> _Row:
        epoch, slot = divmod(number, self.rows_per_epoch)
        order = self._epoch(epoch)
        first = order.phase + order.rows[slot] * self._context
        positions = (first + np.arange(self._context + 1)) % self._stream.num_tokens
        place = np.searchsorted(order.starts, positions, side="right") - 1
        within = positions - order.starts[place]
        starts = self._stream.document_starts[order.documents[place]].astype(np.int64)
        return _Row(self._stream.take(starts + within), within == 0)

    def _make_epoch(self, epoch: int) -> "_Epoch":
        # Raw bits, because NumPy promises to keep their stream for ever and that of shuffles not.
        bits = np.random.PCG64(np.random.SeedSequence([*self._seed, epoch]))
        documents = np.argsort(bits.random_raw(self._stream.num_documents), kind="stable")
        rows = np.argsort(bits.random_raw(self.rows_per_epoch), kind="stable")
        phase = int(bits.random_raw()) % self._stream.num_tokens
        lengths = self._stream.document_lengths[documents]
        starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64)
        return _Epoch(documents, starts, rows, phase)


class _Epoch(NamedTuple):
    """The orders of one epoch."""

    documents: NDArray[np.int64]  # which document comes first, second, ...
    starts: NDArray[np.int64]  # where each of them starts in the ring
    rows: NDArray[np.int64]  # which row is given first, second, ...
    phase: int  # where in the ring the rows begin


def windows(stream: TokenStream, context: int, max_tokens: int | None = None) -> NDArray[np.int64]:
    """Where the windows of a validation start: one after another, ``context`` tokens apart.

    With ``max_tokens``, as many as hold about that many tokens, evenly spread over the text. A
    window that has nothing to predict is left out.
    """
    starts = np.arange(0, max(stream.num_tokens - 1, 0), context, dtype=np.int64)
    wanted = len(starts) if max_tokens is None else max(max_tokens // context, 1)
    if wanted >= len(starts):
        return starts
    return starts[np.arange(wanted) * len(starts) // wanted]


def validation_batches(
    stream: TokenStream, context: int, rows: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """Windows of a text as batches, in order, always the same.

    Without ``max_tokens`` every token but the first is predicted exactly once.

    Args:
        stream: the documents.
        context: tokens of one window; the last one of the text may be shorter.
        rows: windows of one batch; the last batch may have fewer.
        max_tokens: read about this many tokens, evenly spread over the text.
    """
    starts = windows(stream, context, max_tokens).tolist()
    for first in range(0, len(starts), rows):
        batch = []
        for start in starts[first : first + rows]:
            stop = min(start + context + 1, stream.num_tokens)
            row = _Row(stream.tokens(start, stop), stream.is_border(start, stop))
            if stop <= start + context:
                row = _Row(np.append(row.tokens, NO_TARGET), np.append(row.is_border, False))
            batch.append(row)
        yield _packed(batch)


def _packed(rows: Sequence[_Row]) -> Batch:
    ids = np.concatenate([row.tokens[:-1] for row in rows])
    targets = np.concatenate([row.tokens[1:] for row in rows])
    starts = [row.is_border[:-1].copy() for row in rows]
    for is_border in starts:
        is_border[0] = True
    borders = np.append(np.flatnonzero(np.concatenate(starts)), len(ids))
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(targets),
        torch.from_numpy(borders),
        hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
    )
