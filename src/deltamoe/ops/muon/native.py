"""Muon on a CPU with AMX, called through ``muon.cpp``.

Matrices too large for a core's cache go to PyTorch, whose products then run at full rate.
"""

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from deltamoe.ops.muon import reference
from deltamoe.ops.native.arguments import address
from deltamoe.ops.native.build import open_library

__all__ = ["is_possible", "muon_step_"]

LARGEST = 2**19
"""Numbers of a matrix that a core's cache holds in all the forms the iterations need."""


class _Matrix(ctypes.Structure):
    """What ``muon.cpp`` calls Matrix."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("parameter", "gradient", "momentum")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        ("scale", ctypes.c_float),
    )


class _Step(ctypes.Structure):
    """What ``muon.cpp`` calls Step."""

    _fields_ = (
        *((name, ctypes.c_float) for name in ("beta", "fresh", "keep", "a", "b", "c")),
        *((name, ctypes.c_int64) for name in ("iterations", "threads")),
    )


@cache
def _library() -> ctypes.CDLL:
    library = open_library("muon")
    library.muon_is_possible.argtypes = []
    pointer = ctypes.POINTER
    library.muon_step.argtypes = [pointer(_Matrix), ctypes.c_int64, pointer(_Step)]
    library.muon_step.restype = None
    return library


def is_possible() -> bool:
    """Whether this processor has the tiles."""
    return bool(_library().muon_is_possible())


def muon_step_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    lr: float,
    weight_decay: float,
    beta: float,
    dtype: torch.dtype,
) -> None:
    """Update parameters and momenta in place; see ``deltamoe.ops.muon``."""
    ours: list[_Matrix] = []
    alive: list[Tensor] = []  # until the call returns
    others: list[tuple[Tensor, Tensor, Tensor]] = []
    for three in zip(parameters, gradients, momenta, strict=True):
        parameter, gradient, momentum = three
        rows, columns = parameter.shape[-2:]
        if (
            rows * columns > LARGEST
            or any(x.dtype != torch.float32 for x in three)
            or not (parameter.is_contiguous() and momentum.is_contiguous())
        ):
            others.append(three)
            continue
        gradient = gradient.contiguous()
        alive.append(gradient)
        scale = lr * reference.update_scale(parameter.shape)
        starts = [address(x) or 0 for x in (parameter, gradient, momentum)]
        for at in range(0, 4 * parameter.numel(), 4 * rows * columns):
            ours.append(_Matrix(*(start + at for start in starts), rows, columns, scale))
    if others:
        p, g, m = zip(*others, strict=True)
        reference.muon_step_(p, g, m, lr, weight_decay, beta, dtype)
    step = _Step(
        *(beta, 1 - beta, 1 - lr * weight_decay, *reference.COEFFICIENTS),
        *(reference.NUM_ITERATIONS, torch.get_num_threads()),
    )
    _library().muon_step((_Matrix * len(ours))(*ours), len(ours), step)
