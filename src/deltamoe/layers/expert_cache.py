"""Experts that stay on the disk, and a pool of slots in memory for those that are needed most.

A layer asks for the experts its tokens chose. Those that hold a slot answer at once while threads
read the others. A slot is taken from the expert that was chosen least: each choice counts one, and
counts half after ``HALF_LIFE`` further tokens. All layers share the pool.

Knows nothing of files: ``read`` fills a slot.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from deltamoe.layers.quantized import QuantizedExperts, mix
from deltamoe.layers.router import Routing

__all__ = ["HALF_LIFE", "CachedExperts", "ExpertCache"]

HALF_LIFE = 256
"""Tokens after which a choice counts half."""
_READERS = 4
_LARGEST_UNIT = 1e100


class ExpertCache:
    """Slots in memory for the experts of all layers.

    Args:
        pool: the slots: experts whose leading axis is not E but the slots; at least one.
        num_layers: sparse layers.
        num_experts: experts of each.
        read: ``read(layer, expert, slot)`` fills a slot and returns the bytes it read; called from
            several threads, each time for another slot.

    Attributes:
        num_slots, num_experts: in memory at most, and of all layers.
        num_hits: how often a chosen expert was found in its slot.
        num_misses: how often one was read.
        bytes_read: from the disk.
    """

    def __init__(
        self,
        pool: QuantizedExperts,
        *,
        num_layers: int,
        num_experts: int,
        read: Callable[[int, int, int], int],
    ) -> None:
        self.pool = pool
        self.num_slots = len(pool.w_up.values)
        self.num_experts = num_layers * num_experts
        self.num_hits = self.num_misses = self.bytes_read = 0
        self._read = read
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="experts")
        shape = num_layers, num_experts
        self._slots = np.full(shape, -1)  # where each expert is; -1 for on the disk
        self._held = np.full(self.num_slots, -1)  # layer * num_experts + expert; -1 for empty
        self._uses = np.zeros(shape)  # in units, which grow instead of old uses being shrunk
        self._unit = np.ones(num_layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(buffer.nbytes for buffer in self.pool.buffers())

    def note(self, layer: int, counts: NDArray[np.int64], num_tokens: int) -> None:
        """Remember how many of ``num_tokens`` chose each of a layer's experts."""
        self._unit[layer] *= 2 ** (min(num_tokens, HALF_LIFE * 64) / HALF_LIFE)
        self._uses[layer] += counts * self._unit[layer]
        if self._unit[layer] > _LARGEST_UNIT:
            self._uses[layer] /= self._unit[layer]
            self._unit[layer] = 1.0

    def places(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield each expert with its slot, as soon as it is in memory; those that are go first.

        What is in a slot is good until the next one is asked for.
        """
        there = [expert for expert in experts if self._slots[layer, expert] >= 0]
        missing = [expert for expert in experts if self._slots[layer, expert] < 0]
        self.num_hits += len(there)
        self.num_misses += len(missing)
        room = self.num_slots - len(there)
        later = range(room, len(missing), self.num_slots)
        for wave in [missing[:room], *(missing[at : at + self.num_slots] for at in later)]:
            known = [(expert, int(self._slots[layer, expert])) for expert in there]
            reading = self._start(layer, wave, keep=[slot for _, slot in known])
            there = []
            try:
                yield from known
                for expert, slot, done in reading:
                    self.bytes_read += done.result()
                    self._slots[layer, expert] = slot
                    self._held[slot] = layer * self._slots.shape[1] + expert
                    yield expert, slot
            finally:  # no slot is given away while a thread writes to it
                wait([done for _, _, done in reading])

    def _start(
        self, layer: int, experts: Sequence[int], keep: Sequence[int]
    ) -> list[tuple[int, int, Future[int]]]:
        """Begin to read experts, each into a slot of its own that is not one of ``keep``."""
        slots = self._free(len(experts), keep) if experts else []
        return [
            (expert, slot, self._readers.submit(self._read, layer, expert, slot))
            for expert, slot in zip(experts, slots, strict=True)
        ]

    def _free(self, num_slots: int, keep: Sequence[int]) -> list[int]:
        """Empty the slots whose experts were used least; what was never filled comes first."""
        uses = (self._uses / self._unit[:, None]).ravel()[self._held]
        uses[self._held < 0] = -1.0
        uses[list(keep)] = np.inf
        chosen = np.argpartition(uses, num_slots - 1)[:num_slots]
        owners = self._held[chosen]
        self._slots.ravel()[owners[owners >= 0]] = -1
        self._held[chosen] = -1
        return [int(slot) for slot in chosen]


class CachedExperts(nn.Module):
    """``QuantizedExperts`` of one layer whose matrices lie in an ``ExpertCache``.

    The answers are those of ``QuantizedExperts``, bit for bit.

    Args:
        cache: of all layers.
        layer: among the sparse layers, counted from 0.
    """

    def __init__(self, cache: ExpertCache, layer: int) -> None:
        super().__init__()
        self.cache, self.layer = cache, layer

    def forward(
        self, x: Float[Tensor, "N D"], routing: Routing, capacity: int | None = None
    ) -> tuple[Float[Tensor, "N D"], Int[Tensor, "E"]]:
        """Answer tokens by the experts they chose; also the rows of each expert."""
        assert capacity is None, "only training drops tokens"
        counts = routing.counts.numpy()
        self.cache.note(self.layer, counts, len(x))
        places = self.cache.places(self.layer, counts.nonzero()[0].tolist())
        return mix(x, routing, self.cache.pool.answer, places)
