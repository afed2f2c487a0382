"""The model at work on states in the pool: a chunk of one prompt, or one token of many sequences.

Prompts are read one at a time, and the rows of ``decode`` do not touch each other's bits where
there is a ``Decoder``. So what a sequence reads depends on nothing but itself. Without one (CUDA,
fp64, experts on the disk) the rows go through the model's own forward pass together, where a
neighbour may change the rounding. Knows nothing of requests.
"""

import logging

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from deltamoe.engine.prefix_tree import Ids
from deltamoe.engine.sequence import Sequence
from deltamoe.engine.state_pool import Handle, StatePool
from deltamoe.layers import Moe
from deltamoe.model import Decoder, HybridLM, KdaState, MlaState, ModelState, Routing
from deltamoe.model.description import UnsupportedError

__all__ = ["Batch", "Reader"]

_log = logging.getLogger("deltamoe")

_SINGLE_BYTES = 1 << 29
"""Weights that may be read again and again for the end of one prompt: what that takes, alone, is
about what a forward pass takes in calls; beside others it takes far less."""
_MOST_SINGLE = 64


class Batch:
    """The sequences that are decoded together, as the arrays a step is given.

    Attributes:
        rows: in the order of the arrays, which means nothing.
    """

    def __init__(self, num_slots: int) -> None:
        self.rows: list[Sequence] = []
        self._slots = np.zeros(num_slots, np.int64)
        self._pages = np.zeros((num_slots, 1), np.int64)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence take part from the next step on."""
        assert sequence.handle is not None
        row = len(self.rows)
        self.rows.append(sequence)
        self._slots[row] = sequence.handle.slot
        self._pages[row] = 0
        for at in range(len(sequence.handle.pages)):
            self._set_page(row, at, sequence.handle.pages[at])

    def remove(self, sequence: Sequence) -> None:
        """Let a sequence take part no longer; nothing happens if it does not."""
        if sequence not in self.rows:
            return
        row, last = self.rows.index(sequence), self.rows.pop()
        if last is not sequence:
            self.rows[row] = last
            self._slots[row] = self._slots[len(self.rows)]
            self._pages[row] = self._pages[len(self.rows)]

    def note_page(self, row: int) -> None:
        """A row has got one more page."""
        handle = self.rows[row].handle
        assert handle is not None
        self._set_page(row, len(handle.pages) - 1, handle.pages[-1])

    def arrays(self) -> tuple[Ids, Ids, Ids, Ids]:
        """Ids to be read [B], lengths read [B], slots [B] and pages [B, max_pages]."""
        size = len(self.rows)
        ids = np.array([row.ids[row.num_read] for row in self.rows], np.int64)
        lengths = np.array([row.handle.length for row in self.rows if row.handle], np.int64)
        return ids, lengths, self._slots[:size], self._pages[:size]

    def _set_page(self, row: int, at: int, page: int) -> None:
        if at >= self._pages.shape[1]:
            wider = np.zeros((len(self._pages), 2 * at), np.int64)
            wider[:, : self._pages.shape[1]] = self._pages
            self._pages = wider
        self._pages[row, at] = page


class Reader:
    """Reads tokens into states.

    Args:
        model: in evaluation mode.
        pool: where the states are.
        num_single: ``EngineOptions.single_tokens``.

    Attributes:
        expert_counts: [layers, E] int64, tokens that each expert was given, those of audits left
            out; None for a model without experts.
        num_single: longest end of a prompt that is read token by token.
    """

    def __init__(self, model: HybridLM, pool: StatePool, num_single: int | None) -> None:
        self._model = model
        self._pool = pool
        self._decoder: Decoder | None = None
        try:
            self._decoder = Decoder(model)
        except UnsupportedError as reason:
            _log.info("engine: the model's own forward pass is used to decode: %s", reason)
        self.num_single = 0
        if self._decoder is not None:
            most = min(_SINGLE_BYTES // self._decoder.bytes_per_token, _MOST_SINGLE)
            self.num_single = most if num_single is None else num_single
        self.expert_counts: Tensor | None = None
        if (moe := model.config.moe) is not None:
            self.expert_counts = torch.zeros(
                model.config.num_layers, moe.num_experts, dtype=torch.int64
            )
            self._with_experts = [
                at for at, block in enumerate(model.blocks) if isinstance(block.channel, Moe)
            ]
            self._first_ids = moe.num_experts * torch.tensor(self._with_experts)[:, None, None]
            self._experts_per_token = moe.experts_per_token

    @property
    def has_decoder(self) -> bool:
        """Whether rows are kept from touching each other's bits."""
        return self._decoder is not None

    def prefill(self, handle: Handle, ids: Ids, *, is_counted: bool = True) -> Float[Tensor, "T D"]:
        """Read a chunk of one prompt, whose pages have been reserved; return the hidden states."""
        state = self._pool.read(handle)
        row = torch.from_numpy(ids)[None].to(state.lengths.device)
        out = self._model.hidden(row, state if handle.length else None)
        assert out.state is not None
        self._pool.write(handle, out.state, handle.length + len(ids))
        if is_counted:
            self._count(out.routings)
        return out.hidden[0]

    def decode(self, batch: Batch) -> Float[Tensor, "B vocab"]:
        """Read one token of every row; the page it goes to has been reserved."""
        ids, lengths, slots, pages = map(torch.from_numpy, batch.arrays())
        if self._decoder is not None:
            chosen = None
            if self.expert_counts is not None:
                chosen = ids.new_zeros(len(self.expert_counts), len(ids), self._experts_per_token)
            logits = self._decoder.step_in_pool(
                ids, lengths, self._pool.state, slots, pages, expert_ids=chosen
            )
            if chosen is not None:
                self._count_chosen(chosen, batch)
        else:
            logits = self._gathered(ids, lengths, slots, pages)
        for row in batch.rows:
            assert row.handle is not None
            row.handle.length += 1
        return logits

    def _gathered(self, ids: Tensor, lengths: Tensor, slots: Tensor, pages: Tensor) -> Tensor:
        """The same through the model: out of the pool, forward, and back into it."""
        longest, page_tokens = int(lengths.max()), self._pool.size.page_tokens
        device = self._model.embedding.weight.device
        ids, lengths, slots, pages = (x.to(device) for x in (ids, lengths, slots, pages))
        rows = torch.arange(len(ids), device=device)
        place = self._pool.state.layers
        layers = [
            KdaState(*(part[slots] for part in layer))
            if isinstance(layer, KdaState)
            else MlaState(*(part[pages].flatten(1, 2)[:, :longest] for part in layer))
            for layer in place
        ]
        out = self._model.hidden(ids[:, None], ModelState(tuple(layers), lengths))
        self._count(out.routings)  # all of them: without a decoder there are no audits
        assert out.state is not None
        for layer, new in zip(place, out.state.layers, strict=True):
            for part, value in zip(layer, new, strict=True):
                if isinstance(layer, KdaState):
                    part[slots] = value
                else:
                    page = pages[rows, lengths // page_tokens]
                    part[page, lengths % page_tokens] = value[rows, lengths]
        return self._model.logits(out.hidden[:, -1])

    def _count(self, routings: tuple[Routing | None, ...]) -> None:
        if self.expert_counts is None:
            return
        for layer, routing in enumerate(routings):
            if routing is not None:
                self.expert_counts[layer] += routing.counts.cpu()

    def _count_chosen(self, chosen: Int[Tensor, "layers B A"], batch: Batch) -> None:
        assert self.expert_counts is not None
        rows = [at for at, row in enumerate(batch.rows) if not row.job.is_audit]
        if len(rows) < len(batch.rows):
            chosen = chosen[:, rows]
        ids = (chosen[self._with_experts] + self._first_ids).flatten()
        counts = self.expert_counts.view(-1)
        counts += torch.bincount(ids, minlength=len(counts))
