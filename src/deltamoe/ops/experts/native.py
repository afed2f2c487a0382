"""Experts on the CPU, called through ``experts.cpp``: dispatch, products and combine in one."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltamoe.ops.native.arguments import address, num_threads
from deltamoe.ops.native.build import open_library

__all__ = ["choose_experts", "feed_forward", "mix_experts", "run_experts"]

_SMALL = 2**16
"""Multiplications below which waking the other threads costs more than they bring."""


class _Problem(ctypes.Structure):
    """What ``experts.cpp`` calls Problem."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "choices", "experts", "dim", "hidden")),
        *((name, ctypes.c_int64) for name in ("routed", "threads")),
        *((name, ctypes.c_void_p) for name in ("counts", "assignments", "rows", "weights")),
    )


class _Gradients(ctypes.Structure):
    """What ``experts.cpp`` calls Gradients."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("y", "kept", "x", "w_gate", "w_up", "w_down", "weights")
    )


@cache
def _library() -> ctypes.CDLL:
    library = open_library("experts")
    size, kind, pointer = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
    four: list[Any] = [pointer, pointer, pointer, pointer]
    library.experts_sort.argtypes = [size, size, size, size, *four]
    library.experts_sort.restype = size
    library.experts_choose.argtypes = [size, size, size, pointer, pointer, size]
    library.experts_choose.restype = None
    library.experts_kept_bytes.argtypes = [ctypes.POINTER(_Problem), kind, kind]
    library.experts_kept_bytes.restype = size
    library.experts_have_tiles.argtypes = []
    tensors = [ctypes.POINTER(_Problem), kind, kind, kind, *four]
    library.experts_forward.argtypes = [*tensors, pointer, pointer]
    library.experts_forward.restype = None
    library.experts_backward.argtypes = [*tensors, ctypes.POINTER(_Gradients)]
    library.experts_backward.restype = None
    return library


def choose_experts(preferences: Tensor, num_choices: int) -> Tensor:
    """Return each token's best experts; see ``deltamoe.ops.experts``."""
    preferences = preferences.contiguous()
    tokens, experts = preferences.shape
    ids = torch.empty(tokens, num_choices, dtype=torch.int64)
    _library().experts_choose(
        *(tokens, experts, num_choices, address(preferences), address(ids)),
        num_threads(preferences.numel()),
    )
    return ids


def mix_experts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    capacity: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Answer each token by its own experts; see ``deltamoe.ops.experts``."""
    tokens, choices = expert_ids.shape
    expert_ids = expert_ids.contiguous()
    counts = torch.empty(len(w_up), dtype=torch.int64)
    rows = torch.empty(tokens * choices, dtype=torch.int64)
    assignments = torch.empty(tokens * choices, dtype=torch.int64)
    routed = _library().experts_sort(
        *(tokens, choices, len(w_up), tokens * choices if capacity is None else capacity),
        *(tensor.data_ptr() for tensor in (expert_ids, counts, rows, assignments)),
    )
    if routed < 0:
        raise IndexError(f"expert ids outside [0, {len(w_up)})")
    sorting = (counts, assignments[:routed], rows)
    y: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        x, expert_weights, w_gate, w_up, w_down, sorting, dtype, torch.is_grad_enabled()
    )
    return y, counts


def run_experts(
    tokens: Tensor, counts: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor
) -> Tensor:
    """Answer every routed row with its own expert; see ``deltamoe.ops.experts``."""
    y: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        *(tokens, None, w_gate, w_up, w_down, (counts.contiguous(), None, None)),
        *(tokens.dtype, torch.is_grad_enabled()),
    )
    return y


def feed_forward(
    x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, dtype: torch.dtype
) -> Tensor:
    """Answer every token by the one expert there is; see ``deltamoe.ops.experts``."""
    counts = torch.tensor([x.numel() // x.shape[-1]])
    gate = None if w_gate is None else w_gate.unsqueeze(0)
    y: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        *(x.flatten(0, -2), None, gate, w_up.unsqueeze(0), w_down.unsqueeze(0)),
        *((counts, None, None), dtype, torch.is_grad_enabled()),
    )
    return y.view(x.shape)


class _Experts(torch.autograd.Function):
    """Keeps the inputs and, before the activation, the two halves of the hidden vectors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor | None,
        w_gate: Tensor | None,
        w_up: Tensor,
        w_down: Tensor,
        sorting: tuple[Tensor, Tensor | None, Tensor | None],
        dtype: torch.dtype,
        has_gradient: bool,
    ) -> Tensor:
        x, w_up, w_down = x.contiguous(), w_up.contiguous(), w_down.contiguous()
        w_gate = None if w_gate is None else w_gate.contiguous()
        wide = None if weights is None else weights.to(torch.float32).contiguous()
        is_tiled = dtype == torch.bfloat16
        problem = _problem(x, w_up, wide, sorting)
        kept = None
        if has_gradient and any(ctx.needs_input_grad):
            size = _library().experts_kept_bytes(problem, is_tiled, w_gate is not None)
            kept = torch.empty(size, dtype=torch.uint8)
        y = torch.empty_like(x)
        tensors = (x, w_gate, w_up, w_down)
        _library().experts_forward(
            problem, *_kinds(is_tiled, x, w_up), *(address(t) for t in (*tensors, y, kept))
        )
        ctx.save_for_backward(wide, *sorting, *tensors, kept)
        ctx.is_tiled = is_tiled
        ctx.weights_dtype = None if weights is None else weights.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        wide, counts, assignments, rows, *tensors, kept = ctx.saved_tensors
        x, w_gate, w_up, w_down = tensors
        needs_x, needs_weights, *needs_matrices = ctx.needs_input_grad[:5]
        d_y = d_y.to(x.dtype).contiguous()
        d_x = torch.empty_like(x) if needs_x else None
        d_weights = torch.zeros_like(wide) if needs_weights else None
        d_gate, d_up, d_down = (
            torch.empty_like(w) if any(needs_matrices) and w is not None else None
            for w in (w_gate, w_up, w_down)
        )
        gradients = _Gradients(
            *(address(t) for t in (d_y, kept, d_x, d_gate, d_up, d_down, d_weights))
        )
        problem = _problem(x, w_up, wide, (counts, assignments, rows))
        _library().experts_backward(
            problem, *_kinds(ctx.is_tiled, x, w_up), *(address(t) for t in tensors), gradients
        )
        if d_weights is not None:
            d_weights = d_weights.to(ctx.weights_dtype)
        return d_x, d_weights, d_gate, d_up, d_down, None, None, None


def _problem(
    x: Tensor,
    w_up: Tensor,
    weights: Tensor | None,
    sorting: tuple[Tensor, Tensor | None, Tensor | None],
) -> _Problem:
    counts, assignments, rows = sorting
    num_experts, hidden, dim = w_up.shape
    routed = len(x) if assignments is None else len(assignments)
    return _Problem(
        *(len(x), 1 if rows is None or not len(x) else len(rows) // len(x), num_experts, dim),
        *(hidden, routed),
        1 if routed * dim * hidden < _SMALL else torch.get_num_threads(),
        *(address(tensor) for tensor in (counts, assignments, rows, weights)),
    )


def _kinds(is_tiled: bool, x: Tensor, w: Tensor) -> tuple[bool, bool, bool]:
    return is_tiled, x.dtype == torch.bfloat16, w.dtype == torch.bfloat16
