"""Decoding on a CPU: the whole stack for one token of every row in a single call into C++.

A ``Decoder`` stands beside a ``HybridLM`` and means the same as calling it with one token a row.
States stay values: one that was returned is never changed where its rows have been, so it can be
kept, forked and continued again; where the next one is written is the business of ``buffers``.

The states of texts that come and go are better kept in a pool, and changed there: a state's place
is then its owner's to know, and nothing is copied when a text joins or leaves.

Source of the arithmetic: ``layers`` and ``ops``, which define what the C++ must answer.
"""

import ctypes
import logging
import weakref
from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from deltamoe.layers import KdaState, MlaState
from deltamoe.model.buffers import Latents, Memories
from deltamoe.model.description import (
    Batch,
    Description,
    LayerState,
    UnsupportedError,
    describe,
)
from deltamoe.model.model import HybridLM
from deltamoe.model.state import ModelState, PooledState
from deltamoe.ops import native

__all__ = ["Decoder", "token_reader"]

_log = logging.getLogger("deltamoe")

_BYTES_PER_THREAD = 1 << 19
"""Weights below which a thread more costs as much in waiting as it brings."""

_Read = Callable[[Tensor, ModelState], tuple[Tensor, ModelState]]


def token_reader(model: HybridLM) -> _Read:
    """The quickest way to read one more token of every row.

    Returns:
        ``read(ids, state) -> (logits, state)`` with ids [B] int64 and logits [B, vocab]: a
        ``Decoder``'s where one can be made, and the model's own where not (said at INFO).
    """
    try:
        return Decoder(model).step
    except UnsupportedError as reason:
        _log.info("decoding: the model's own forward pass is used: %s", reason)

    def step(ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        logits, after = model(ids[:, None], state)
        return logits[:, -1], after

    return step


class Decoder:
    """Reads tokens one at a time with a model's weights where they lie.

    Norms, taps and biases are copied: a model that was changed needs a new decoder.

    Args:
        model: on the CPU, in fp32 or bf16, its matrices perhaps quantised.

    Raises:
        UnsupportedError: it is not, or there is no compiler; the message says which.
    """

    def __init__(self, model: HybridLM) -> None:
        config, weight = model.config, model.embedding.weight
        if weight.device.type != "cpu":
            raise UnsupportedError(f"the weights are on {weight.device.type!r}")
        if weight.dtype not in (torch.float32, torch.bfloat16):
            raise UnsupportedError(f"the weights are {weight.dtype}")
        if reason := native.why_not("decode"):
            raise UnsupportedError(reason)
        self._description = describe(model)
        self._vocab_size, self._num_layers = config.vocab_size, config.num_layers
        self._experts_per_token = config.moe.experts_per_token if config.moe else 0
        self._initial_state = model.initial_state
        self._handle: int = _library().decoder_new(ctypes.byref(self._description.model))
        weakref.finalize(self, _library().decoder_free, self._handle)
        self._lock = Lock()
        mixers = [config.mixer(i) for i in range(config.num_layers)]
        self._kda = [i for i, mixer in enumerate(mixers) if mixer == "kda"]
        self._mla = [i for i, mixer in enumerate(mixers) if mixer == "mla"]
        self._memories, self._latents = Memories(), Latents()
        self._pool: _Pool | None = None

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one token of one row reads."""
        return self._description.bytes_per_token

    def step(
        self, ids: Int[Tensor, "B"], state: ModelState | None = None
    ) -> tuple[Float[Tensor, "B vocab"], ModelState]:
        """Read one token of every row and score what may follow; see ``HybridLM.forward``.

        Args:
            ids: int64 token ids in [0, vocab).
            state: what an earlier call returned; None starts afresh.

        Returns:
            Logits in fp32, and the state after the token.

        Raises:
            ValueError: an id outside the vocabulary, or a state of another batch size.
        """
        state = self._initial_state(len(ids)) if state is None else state
        past = state.lengths.tolist()
        if len(past) != len(ids):
            raise ValueError(
                f"the state has {len(past)} rows and there are {len(ids)} ids; "
                "ModelState.select picks or repeats rows"
            )
        if not past:
            return torch.empty(0, self._vocab_size), state
        self._check_ids(ids)
        layers: list[Any] = [_in_one_piece(layer) for layer in state.layers]
        before = tuple(layers)  # holds what C++ reads
        described = (LayerState * len(layers))()
        rows = torch.arange(len(past))
        with self._lock:
            if self._kda:
                self._memories.advance(self._kda, layers, described)
            page_tokens = 1
            if self._mla:
                page_tokens = self._latents.advance(self._mla, layers, described, past)
            logits = self._read(ids, state.lengths, described, rows, rows[:, None], page_tokens)
        del before
        return logits, ModelState(tuple(layers), state.lengths + 1)

    def step_in_pool(
        self,
        ids: Int[Tensor, "B"],
        lengths: Int[Tensor, "B"],
        pool: PooledState,
        slots: Int[Tensor, "B"],
        pages: Int[Tensor, "B max_pages"],
        *,
        expert_ids: Int[Tensor, "layers B A"] | None = None,
    ) -> Float[Tensor, "B vocab"]:
        """Read one token of every row, whose states are changed where they are in a pool.

        The results are those of ``step``, to the last bit. The decoder holds on to the pool until
        it is given another.

        Args:
            ids: int64 token ids in [0, vocab).
            lengths: int64, tokens that each row has read before.
            pool: the states of these rows and of others, which are left alone.
            slots: int64, each row's own slot.
            pages: int64, token ``s`` of a row is in its page ``s // page_tokens``. Rows may share
                pages that they only read. The page of the new token must be in the table, and be
                the row's own; what comes behind it is not looked at.
            expert_ids: int64; is given the experts that each layer chose for each row, the best
                first. Layers without experts leave it as it is.

        Returns:
            Logits in fp32.

        Raises:
            ValueError: an id outside the vocabulary, a slot or page outside the pool or given to
                two rows, tensors that do not fit each other, or a pool of another model.
        """
        rows = len(ids)
        if expert_ids is not None:
            _check(expert_ids, (self._num_layers, rows, self._experts_per_token), torch.int64)
        if not rows:
            return torch.empty(0, self._vocab_size)
        for name, tensor in (("ids", ids), ("lengths", lengths), ("slots", slots)):
            if tensor.dtype != torch.int64 or tensor.shape != (rows,):
                raise ValueError(f"{name}: {_said(tensor)}; expected int64 ({rows},)")
        if pages.dtype != torch.int64 or pages.ndim != 2 or len(pages) != rows:
            raise ValueError(f"pages: {_said(pages)}; expected int64 ({rows}, max_pages)")
        self._check_ids(ids)
        with self._lock:
            if self._pool is None or self._pool.state is not pool:
                self._pool = _Pool(pool, self._initial_state(1))
            self._pool.check_rows(lengths, slots, pages)
            return self._read(
                ids, lengths, self._pool.described, slots, pages, self._pool.page_tokens, expert_ids
            )

    def _check_ids(self, ids: Tensor) -> None:
        least, most = map(int, ids.aminmax())
        if not 0 <= least <= most < self._vocab_size:
            raise ValueError(
                f"token ids from {least} to {most}: this model's vocabulary has "
                f"{self._vocab_size} entries, counted from 0"
            )

    def _read(
        self,
        ids: Tensor,
        lengths: Tensor,
        described: Any,
        slots: Tensor,
        pages: Tensor,
        page_tokens: int,
        expert_ids: Tensor | None = None,
    ) -> Tensor:
        logits = torch.empty(len(ids), self._vocab_size)
        tensors = [tensor.contiguous() for tensor in (ids, lengths, slots, slots, pages)]
        batch = Batch(
            len(ids),
            *(tensor.data_ptr() for tensor in tensors),
            pages.shape[1],
            page_tokens,
            None if expert_ids is None else expert_ids.data_ptr(),
        )
        most_threads = self.bytes_per_token // _BYTES_PER_THREAD
        _library().decoder_step(
            self._handle,
            ctypes.byref(batch),
            described,
            logits.data_ptr(),
            max(1, min(torch.get_num_threads(), most_threads)),
        )
        return logits


class _Pool:
    """A pool that was found to fit the model.

    Args:
        state: the pool.
        row: a state of one row of the model's.

    Attributes:
        state: as given.
        described: for C++.
        page_tokens: tokens of a page; 1 where there are none.

    Raises:
        ValueError: the pool's tensors are not such as the model needs; the message says which.
    """

    def __init__(self, state: PooledState, row: ModelState) -> None:
        self.state, self.page_tokens = state, 1
        self.described = (LayerState * len(row.layers))()
        self._num_slots: int | None = None
        self._num_pages: int | None = None
        if len(state.layers) != len(row.layers):
            raise ValueError(
                f"the pool has {len(state.layers)} layers; the model has {len(row.layers)}"
            )
        for at, (layer, of_one) in enumerate(zip(state.layers, row.layers, strict=True)):
            try:
                if isinstance(layer, MlaState) != isinstance(of_one, MlaState):
                    raise ValueError(f"it is {type(layer).__name__}, not {type(of_one).__name__}")
                if isinstance(layer, MlaState):
                    self._add_pages(layer, of_one, self.described[at])
                else:
                    self._add_slots(layer, of_one, self.described[at])
            except ValueError as error:
                raise ValueError(f"the pool's layer {at}: {error}") from error

    def _add_slots(self, layer: KdaState, of_one: Any, here: Any) -> None:
        self._num_slots = self._num_slots or len(layer.memory)
        for part, one in zip(layer, of_one, strict=True):
            _check(part, (self._num_slots, *one.shape[1:]), one.dtype)
        here.conv = here.conv_after = layer.conv.data_ptr()
        here.memory = here.memory_after = layer.memory.data_ptr()
        here.conv_stride, here.memory_stride = layer.conv.stride(0), layer.memory.stride(0)

    def _add_pages(self, layer: MlaState, of_one: Any, here: Any) -> None:
        if self._num_pages is None:
            self._num_pages, self.page_tokens = layer.latent.shape[:2]
        for part, one in zip(layer, of_one, strict=True):
            _check(part, (self._num_pages, self.page_tokens, one.shape[2]), one.dtype)
        here.latent, here.rope_key = layer.latent.data_ptr(), layer.rope_key.data_ptr()
        here.latent_stride, here.rope_key_stride = layer.latent.stride(0), layer.rope_key.stride(0)

    def check_rows(self, lengths: Tensor, slots: Tensor, pages: Tensor) -> None:
        """Refuse rows that are not in the pool, or in each other's way."""
        if int(lengths.min()) < 0:
            raise ValueError(f"lengths: {lengths.tolist()}; expected none below 0")
        if self._num_slots is not None:
            chosen = slots.tolist()
            if not 0 <= min(chosen) <= max(chosen) < self._num_slots:
                raise ValueError(f"slots: {chosen}; the pool has {self._num_slots}, from 0")
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"slots: {chosen}; expected one of its own for every row")
        if self._num_pages is None:
            return
        last = lengths.numpy() // self.page_tokens
        if last.max() >= pages.shape[1]:
            raise ValueError(
                f"pages: {pages.shape[1]} a row of {self.page_tokens} tokens; a row has read "
                f"{int(lengths.max())} and reads one more"
            )
        table = pages.numpy()
        used = table[np.arange(table.shape[1]) <= last[:, None]]
        if not 0 <= used.min() <= used.max() < self._num_pages:
            raise ValueError(
                f"pages: from {used.min()} to {used.max()}; the pool has {self._num_pages}, from 0"
            )
        newest = table[np.arange(len(table)), last]
        if np.isin(used, newest).sum() > len(set(newest.tolist())):
            raise ValueError(
                f"pages: the new tokens go to {newest.tolist()}; expected pages that no other row "
                "reads or writes"
            )


def _check(part: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    apart, *within = torch.empty(shape, device="meta").stride()
    lies_together = part.stride()[1:] == tuple(within) and part.stride(0) >= apart
    if part.shape != shape or part.dtype != dtype or not lies_together:
        strides = "" if lies_together else f" with strides {part.stride()}"
        raise ValueError(
            f"{_said(part)}{strides}; expected {dtype} {shape}, each entry in one piece"
        )


def _said(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _in_one_piece(layer: KdaState | MlaState) -> KdaState | MlaState:
    if isinstance(layer, MlaState) or (layer.conv.is_contiguous() and layer.memory.is_contiguous()):
        return layer
    return KdaState(layer.conv.contiguous(), layer.memory.contiguous())


@cache
def _library() -> ctypes.CDLL:
    library = native.open_library("decode")
    sizes = (ctypes.c_int64 * 4)()
    library.decoder_sizes(sizes)
    assert tuple(sizes) == Description.sizes, "decode_model.h and description.py differ"
    pointer = ctypes.c_void_p
    library.decoder_new.argtypes, library.decoder_new.restype = [pointer], pointer
    library.decoder_free.argtypes, library.decoder_free.restype = [pointer], None
    library.decoder_step.argtypes = [pointer, pointer, pointer, pointer, ctypes.c_int]
    library.decoder_step.restype = None
    return library
