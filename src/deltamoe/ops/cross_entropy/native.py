"""Cross entropy on the CPU, called through ``loss.cpp``."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from deltamoe.ops.native.build import open_library

__all__ = ["cross_entropy_"]

_SMALL = 2**14
"""Logits below which waking the other threads costs more than they bring."""


@cache
def _library() -> ctypes.CDLL:
    library = open_library("loss")
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    library.cross_entropy.argtypes = [
        *(ctypes.c_int, pointer, size, size, size),
        *(pointer, size, pointer, ctypes.c_int, ctypes.c_float, size),
    ]
    library.cross_entropy.restype = None
    return library


def cross_entropy_(
    logits: Tensor, targets: Tensor, no_target: int, gradient_scale: float | None
) -> Tensor:
    """Return each row's loss; see ``deltamoe.ops.cross_entropy``."""
    rows, vocab_size = logits.shape
    if logits.stride(1) != 1:
        raise ValueError(f"logits of strides {logits.stride()}: expected rows that are contiguous")
    targets = targets.contiguous()
    if bool(((targets != no_target) & ((targets < 0) | (targets >= vocab_size))).any()):
        raise IndexError(f"a target lies outside the {vocab_size} columns of the logits")
    losses = torch.empty(rows, dtype=torch.float32)
    _library().cross_entropy(
        *(logits.dtype == torch.bfloat16, logits.data_ptr(), logits.stride(0), rows, vocab_size),
        *(targets.data_ptr(), no_target, losses.data_ptr()),
        *(gradient_scale is not None, gradient_scale or 0.0),
        1 if logits.numel() < _SMALL else torch.get_num_threads(),
    )
    return losses
