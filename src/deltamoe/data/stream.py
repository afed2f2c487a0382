"""A stream of tokens: the documents of one split, one after another, without being in memory.

Each document stands as ``[end_id, *tokens]``. Knows nothing of files, epochs or batches.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltamoe.errors import DataError

__all__ = ["Shard", "TokenStream"]


class Shard(NamedTuple):
    """Token ids of one file (or of memory), and its name for messages."""

    name: str
    ids: NDArray[np.uint16] | NDArray[np.uint32]


class TokenStream:
    """The tokens of a split, one document after another, without being in memory.

    Args:
        shards: in order.
        document_starts: positions of the borders, ascending from 0.
        num_bytes: UTF-8 bytes of the text.
        vocab_size: ids must be below it.
        fingerprint: hash of the ids.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        document_starts: NDArray[np.uint64],
        *,
        num_bytes: int,
        vocab_size: int,
        fingerprint: str,
    ) -> None:
        self.document_starts = document_starts
        self.num_bytes = num_bytes
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self._shards = tuple(shards)
        lengths = [len(shard.ids) for shard in self._shards]
        self._shard_starts = np.cumsum([0, *lengths], dtype=np.int64)

    @classmethod
    def in_memory(
        cls,
        documents: Sequence[Sequence[int]],
        *,
        end_id: int,
        vocab_size: int,
        num_bytes: int,
    ) -> "TokenStream":
        """A stream of documents given as ids, without borders."""
        ids = np.array([t for document in documents for t in (end_id, *document)], np.uint32)
        lengths = [1 + len(document) for document in documents]
        return cls(
            [Shard("memory", ids)],
            np.cumsum([0, *lengths[:-1]], dtype=np.uint64),
            num_bytes=num_bytes,
            vocab_size=vocab_size,
            fingerprint=hashlib.sha256(ids.tobytes()).hexdigest(),
        )

    @classmethod
    def joined(cls, streams: Sequence["TokenStream"]) -> "TokenStream":
        """Several streams of one tokenizer, one after another."""
        if len(streams) == 1:
            return streams[0]
        offsets = np.cumsum([0, *(stream.num_tokens for stream in streams)], dtype=np.uint64)
        fingerprints = "".join(stream.fingerprint for stream in streams)
        return cls(
            [shard for stream in streams for shard in stream._shards],
            np.concatenate(
                [s.document_starts + offset for s, offset in zip(streams, offsets, strict=False)]
            ),
            num_bytes=sum(stream.num_bytes for stream in streams),
            vocab_size=streams[0].vocab_size,
            fingerprint=hashlib.sha256(fingerprints.encode()).hexdigest(),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens, one border for each document included."""
        return int(self._shard_starts[-1])

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.document_starts)

    @cached_property
    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, its border included."""
        ends = np.append(self.document_starts[1:], np.uint64(self.num_tokens))
        return (ends - self.document_starts).astype(np.int64)

    def tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """Ids at the positions ``start`` to ``stop - 1``.

        Raises:
            ValueError: not ``0 <= start <= stop <= num_tokens``.
            DataError: an id outside the vocabulary.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(
                f"tokens({start}, {stop}): expected 0 <= start <= stop <= {self.num_tokens}"
            )
        return self.take(np.arange(start, stop))

    def is_border(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Which of the positions ``start`` to ``stop - 1`` start a document."""
        bounds = np.array([start, stop], dtype=np.uint64)
        first, last = np.searchsorted(self.document_starts, bounds)
        is_border = np.zeros(stop - start, dtype=np.bool_)
        is_border[self.document_starts[first:last].astype(np.int64) - start] = True
        return is_border

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ids at some positions, in any order.

        Raises:
            DataError: an id outside the vocabulary, named by its file and byte.
        """
        ids = np.empty(len(positions), dtype=np.int64)
        shard_numbers = np.searchsorted(self._shard_starts, positions, side="right") - 1
        for number in np.unique(shard_numbers).tolist():
            is_here = shard_numbers == number
            within = positions[is_here] - self._shard_starts[number]
            shard = self._shards[number]
            found = shard.ids[within]
            if found.max() >= self.vocab_size:
                at = int(within[found >= self.vocab_size][0])
                raise DataError(
                    f"{shard.name}: token id {shard.ids[at]} at byte {at * found.itemsize:,}: "
                    f"expected ids below {self.vocab_size}; the file was altered, prepare it again"
                )
            ids[is_here] = found
        return ids

    def documents(self) -> Iterator[NDArray[np.int64]]:
        """The ids of each document, its border first."""
        for start, stop in pairwise([*self.document_starts.tolist(), self.num_tokens]):
            yield self.tokens(start, stop)
