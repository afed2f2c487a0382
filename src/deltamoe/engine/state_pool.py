"""Where the states of running sequences are: slots for KDA, pages for MLA's latents.

A sequence holds a ``Handle``: one slot, which never grows, and as many pages as its latents fill.
A ``Snapshot`` is a copy of a slot, and a share in the pages behind it. Pages are shared read-only:
whoever goes on from a snapshot gets a copy of its last page if that is not full. Slots and pages
are zeroed, or overwritten whole, when they are given out: nothing of an earlier owner is ever read.

Running sequences and snapshots have a budget of pages each; neither takes from the other's.
Knows nothing of tokens, requests or whose turn it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltamoe.engine.options import MOST_CONTEXT, EngineOptions
from deltamoe.errors import ConfigError, DoesNotFitError
from deltamoe.model import HybridLM, KdaState, MlaState, ModelState
from deltamoe.model.state import PooledState
from deltamoe.plan import machine_memory

__all__ = ["Handle", "PoolSize", "Snapshot", "StatePool"]

_SHARE_OF_MEMORY = 8
_ZERO_PAGE = 0
"""Belongs to nobody and stays zero: page tables are filled up with it."""
_LINE = 64


@dataclass(eq=False)
class Handle:
    """A sequence's place in the pool.

    Attributes:
        slot: of its KDA states.
        pages: of its latents, in order.
        length: tokens that its state has read.
    """

    slot: int
    pages: list[int]
    length: int


@dataclass(eq=False)
class Snapshot:
    """A state put aside.

    Attributes:
        conv: [KDA layers, W-1, channels], a copy.
        memory: [KDA layers, HV, K, V], a copy.
        pages: of its latents; it holds a share in them.
        length: tokens that it has read.
    """

    conv: Tensor
    memory: Tensor
    pages: tuple[int, ...]
    length: int


class PoolSize(NamedTuple):
    """How an engine's budget is divided.

    Attributes:
        num_slots: sequences that run at once.
        num_pages: of running sequences.
        num_cached_pages: of snapshots.
        cached_slot_bytes: for the copies of slots in snapshots.
        context: tokens a sequence may reach.
        slot_bytes, page_bytes: of one.
        page_tokens: latents in a page.
    """

    num_slots: int
    num_pages: int
    num_cached_pages: int
    cached_slot_bytes: int
    context: int
    slot_bytes: int
    page_bytes: int
    page_tokens: int

    @classmethod
    def of(cls, model: HybridLM, options: EngineOptions) -> "PoolSize":
        """Divide the budget for one model.

        Where a model has both kinds of layers, snapshots get half of ``cache_bytes`` for slots and
        half for pages.

        Raises:
            DoesNotFitError: the budget holds less than one sequence of a page.
            ConfigError: a context longer than the budget allows.
        """
        share = _memory(model) // _SHARE_OF_MEMORY
        state_bytes = share if options.state_bytes is None else options.state_bytes
        cache_bytes = share if options.cache_bytes is None else options.cache_bytes
        one = model.initial_state(1)
        slot_bytes = sum(
            tensor.nbytes for layer in one.layers if isinstance(layer, KdaState) for tensor in layer
        )
        page_bytes = options.page_tokens * sum(
            tensor.shape[2] * tensor.element_size()
            for layer in one.layers
            if isinstance(layer, MlaState)
            for tensor in layer
        )
        if slot_bytes + page_bytes > state_bytes:
            raise DoesNotFitError(
                f"state_bytes = {state_bytes:,}: one sequence needs {slot_bytes:,} bytes and a "
                f"page of {options.page_tokens} tokens {page_bytes:,}; allow more"
            )
        num_slots = options.max_sequences
        if slot_bytes:
            num_slots = min(num_slots, (state_bytes - page_bytes) // slot_bytes)
        most = options.context or MOST_CONTEXT
        num_pages = num_cached_pages = 0
        context = most
        if page_bytes:
            per_sequence = -(-most // options.page_tokens)
            num_pages = (state_bytes - num_slots * slot_bytes) // page_bytes
            num_pages = min(num_pages, num_slots * per_sequence)
            context = min(most, num_pages * options.page_tokens)
            if options.context and context < options.context:
                raise ConfigError(
                    f"context = {options.context}: state_bytes = {state_bytes:,} leaves room for "
                    f"{context} tokens beside {num_slots} slots; allow more, or fewer sequences"
                )
            num_cached_pages = cache_bytes // (2 if slot_bytes else 1) // page_bytes
        return cls(
            num_slots=num_slots,
            num_pages=num_pages,
            num_cached_pages=num_cached_pages,
            cached_slot_bytes=cache_bytes // (2 if page_bytes else 1) if slot_bytes else 0,
            context=context,
            slot_bytes=slot_bytes,
            page_bytes=page_bytes,
            page_tokens=options.page_tokens,
        )


class StatePool:
    """The tensors, and who holds what of them.

    Args:
        model: gives the shapes.
        size: how many of everything.

    Attributes:
        size: as given.
        state: what ``Decoder.step_in_pool`` works on.
        num_running_pages: pages that at least one handle holds.
        num_cached_pages: pages that at least one snapshot holds; some may be both.
        cached_slot_bytes: of the copies in all snapshots.
    """

    def __init__(self, model: HybridLM, size: PoolSize) -> None:
        self.size = size
        one = model.initial_state(1)
        self._device = one.lengths.device
        kda = [layer for layer in one.layers if isinstance(layer, KdaState)]
        mla = [layer for layer in one.layers if isinstance(layer, MlaState)]
        # Both budgets, and the page of zeros. No page is ever missing within the budgets.
        all_pages = 1 + size.num_pages + size.num_cached_pages
        self._conv, self._memory = (
            self._storage([getattr(layer, name) for layer in kda], (size.num_slots,))
            for name in KdaState._fields
        )
        self._latent, self._rope_key = (
            self._storage([getattr(layer, name) for layer in mla], (all_pages, size.page_tokens))
            for name in MlaState._fields
        )
        slots = iter(zip(self._conv, self._memory, strict=True))
        pages = iter(zip(self._latent, self._rope_key, strict=True))
        self.state = PooledState(
            tuple(
                KdaState(*next(slots)) if isinstance(layer, KdaState) else MlaState(*next(pages))
                for layer in one.layers
            )
        )
        self._has_pages = bool(mla)
        self._free_slots = list(reversed(range(size.num_slots)))
        self._free_pages = list(reversed(range(1, all_pages)))
        self._running = np.zeros(all_pages, np.int32)
        self._cached = np.zeros(all_pages, np.int32)
        self.num_running_pages = self.num_cached_pages = self.cached_slot_bytes = 0

    @property
    def num_free_slots(self) -> int:
        """Sequences that may still start."""
        return len(self._free_slots)

    @property
    def num_free_pages(self) -> int:
        """Pages that running sequences may still take."""
        return self.size.num_pages - self.num_running_pages

    @property
    def num_unused_pages(self) -> int:
        """Pages that nobody holds."""
        return len(self._free_pages)

    def pages_for(self, length: int) -> int:
        """Pages that so many tokens fill."""
        return -(-length // self.size.page_tokens) if self._has_pages else 0

    def acquire(self) -> Handle:
        """Give out a slot that has seen nothing; there must be a free one."""
        slot = self._free_slots.pop()
        for storage in (self._conv, self._memory):
            if len(storage):
                storage[:, slot].zero_()
        return Handle(slot, [], 0)

    def reserve(self, handle: Handle, length: int) -> bool:
        """Give a sequence the pages for ``length`` tokens, or nothing if there are too few."""
        missing = self.pages_for(length) - len(handle.pages)
        if missing > self.num_free_pages:
            return False
        for _ in range(missing):
            handle.pages.append(self._fresh_page())
        return True

    def release(self, handle: Handle) -> None:
        """Take a sequence's slot and pages back."""
        self._free_slots.append(handle.slot)
        self._give_up(handle.pages, self._running, self._cached)
        handle.pages = []

    def snapshot(self, handle: Handle) -> Snapshot:
        """Copy a slot and take a share in the pages behind it."""
        conv, memory = self._conv[:, handle.slot].clone(), self._memory[:, handle.slot].clone()
        pages = tuple(handle.pages[: self.pages_for(handle.length)])
        self.num_cached_pages += self._share(pages, self._cached)
        self.cached_slot_bytes += conv.nbytes + memory.nbytes
        return Snapshot(conv, memory, pages, handle.length)

    def pages_to_cache(self, handle: Handle) -> int:
        """Pages that a snapshot would add to those of the others."""
        pages = handle.pages[: self.pages_for(handle.length)]
        return int((self._cached[pages] == 0).sum())

    def drop(self, snapshot: Snapshot) -> None:
        """Give up a snapshot's share."""
        self.cached_slot_bytes -= snapshot.conv.nbytes + snapshot.memory.nbytes
        self._give_up(snapshot.pages, self._cached, self._running)

    def pages_to_restore(self, snapshot: Snapshot) -> int:
        """Pages that ``restore`` would add to those of running sequences."""
        full = snapshot.pages[: snapshot.length // self.size.page_tokens]
        return int((self._running[list(full)] == 0).sum()) + len(snapshot.pages) - len(full)

    def restore(self, snapshot: Snapshot) -> Handle:
        """Start a sequence from a snapshot; there must be a free slot and enough free pages."""
        slot = self._free_slots.pop()
        self._conv[:, slot], self._memory[:, slot] = snapshot.conv, snapshot.memory
        num_full, rest = divmod(snapshot.length, self.size.page_tokens)
        pages = list(snapshot.pages[:num_full])
        self.num_running_pages += self._share(pages, self._running)
        if len(snapshot.pages) > num_full:
            own = self._fresh_page()
            for storage in (self._latent, self._rope_key):
                storage[:, own, :rest] = storage[:, snapshot.pages[num_full], :rest]
            pages.append(own)
        return Handle(slot, pages, snapshot.length)

    def read(self, handle: Handle) -> ModelState:
        """A sequence's state, of one row. The slot's part is the pool's own and not a copy."""
        layers: list[KdaState | MlaState] = []
        used = handle.pages[: self.pages_for(handle.length)]
        pages = torch.tensor(used, dtype=torch.int64, device=self._device)
        for layer in self.state.layers:
            if isinstance(layer, KdaState):
                layers.append(KdaState(*(part[handle.slot, None] for part in layer)))
            else:
                layers.append(
                    MlaState(*(part[pages].flatten(0, 1)[None, : handle.length] for part in layer))
                )
        lengths = torch.tensor([handle.length], device=self._device)
        return ModelState(tuple(layers), lengths)

    def spoil(self) -> None:
        """Fill what nobody holds with NaN: whatever an earlier owner has left is not to matter."""
        for storage, free in (
            (self._conv, self._free_slots),
            (self._memory, self._free_slots),
            (self._latent, self._free_pages),
            (self._rope_key, self._free_pages),
        ):
            if len(storage):
                storage[:, free] = torch.nan

    def copy(self, handle: Handle) -> ModelState:
        """A sequence's state as a value of its own."""
        state = self.read(handle)
        layers = [
            KdaState(layer.conv.clone(), layer.memory.clone())
            if isinstance(layer, KdaState)
            else layer
            for layer in state.layers
        ]
        return ModelState(tuple(layers), state.lengths)

    def write(self, handle: Handle, state: ModelState, length: int) -> None:
        """Put a state of one row and ``length`` tokens in a sequence's place.

        Its latents up to ``handle.length`` are there already. The pages must have been reserved.
        """
        for place, layer in zip(self.state.layers, state.layers, strict=True):
            if isinstance(layer, KdaState):
                for part, new in zip(place, layer, strict=True):
                    part[handle.slot] = new[0]
        if self._has_pages and length > handle.length:
            position = torch.arange(handle.length, length, device=self._device)
            pages = torch.tensor(handle.pages, device=self._device)
            at = (pages[position // self.size.page_tokens], position % self.size.page_tokens)
            for place, layer in zip(self.state.layers, state.layers, strict=True):
                if isinstance(layer, MlaState):
                    for part, new in zip(place, layer, strict=True):
                        part[at] = new[0, handle.length : length].to(part.dtype)
        handle.length = length

    def _storage(self, parts: list[Tensor], leading: tuple[int, ...]) -> Tensor:
        """[layers, *leading, ...], zero; memory of the CPU is not there before it is written to."""
        if not parts:
            return torch.empty(0, *leading, device=self._device)
        skip = 1 if len(leading) == 1 else 2
        shape = (len(parts), *leading, *parts[0].shape[skip:])
        if self._device.type != "cpu":
            return torch.zeros(shape, dtype=parts[0].dtype, device=self._device)
        nbytes = int(np.prod(shape)) * parts[0].element_size()
        try:
            memory = np.zeros(nbytes + _LINE, np.uint8)
        except MemoryError:
            raise DoesNotFitError(
                f"{nbytes:,} bytes for states are more than this machine gives; lower state_bytes "
                "or cache_bytes"
            ) from None
        start = -memory.ctypes.data % _LINE
        return torch.from_numpy(memory[start : start + nbytes]).view(parts[0].dtype).view(shape)

    def _fresh_page(self) -> int:
        page = self._free_pages.pop()
        self._latent[:, page].zero_()
        self._rope_key[:, page].zero_()
        self._running[page] = 1
        self.num_running_pages += 1
        return page

    @staticmethod
    def _share(pages: Sequence[int], shares: NDArray[np.int32]) -> int:
        """Add a share in each page; return in how many it is the first."""
        at = list(pages)
        shares[at] += 1
        return int((shares[at] == 1).sum())

    def _give_up(
        self, pages: Sequence[int], shares: NDArray[np.int32], others: NDArray[np.int32]
    ) -> None:
        at = np.array(pages, dtype=np.int64)
        shares[at] -= 1
        last = at[shares[at] == 0]
        if shares is self._running:
            self.num_running_pages -= len(last)
        else:
            self.num_cached_pages -= len(last)
        self._free_pages.extend(last[others[last] == 0].tolist())


def _memory(model: HybridLM) -> int:
    """Bytes of memory of the device the model is on."""
    device = model.embedding.weight.device
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return machine_memory()
