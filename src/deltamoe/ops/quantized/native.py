"""Products of a quantised weight on the CPU, in C++, and the matrix it stands for.

In products the rows are rounded to 8 bits in groups of 32 (``quantize_activations``); sums within a
group are exact, and everything else is fp32.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from deltamoe.ops.native import open_library
from deltamoe.ops.native.arguments import num_threads
from deltamoe.ops.quantized.format import QuantizedWeight

__all__ = ["Matrix", "matrix_of", "multiply", "unpack"]

_KINDS = {torch.float32: 0, torch.bfloat16: 1}


class Matrix(ctypes.Structure):
    """``Matrix`` of ``ops/native/matrix.h``; it does not keep its tensors alive."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("kind", ctypes.c_int64),
    )


def matrix_of(weight: Tensor | QuantizedWeight) -> Matrix:
    """Describe a contiguous weight, or the first of those stacked along leading axes."""
    if isinstance(weight, QuantizedWeight):
        values, scales = weight.values, weight.scales
        kind = {8: 2, 4: 3}[weight.bits]
        if not (values.is_contiguous() and scales.is_contiguous()):
            raise ValueError("a quantised weight must lie in one piece")
        return Matrix(
            values.data_ptr(), scales.data_ptr(), weight.out_features, weight.in_features, kind
        )
    if not weight.is_contiguous():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} must lie in one piece")
    return Matrix(weight.data_ptr(), None, *weight.shape[-2:], _KINDS[weight.dtype])


@cache
def _library() -> ctypes.CDLL:
    library = open_library("matvec")
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    library.matvec.argtypes = [pointer, pointer, whole, whole, pointer, whole, ctypes.c_int]
    library.matvec.restype = None
    library.unpack.argtypes = [pointer, whole, pointer, ctypes.c_int, ctypes.c_int]
    library.unpack.restype = None
    return library


def multiply(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """``x @ weight.T`` for x [rows, in] fp32, one pass over the weight."""
    matrix = matrix_of(weight)
    x = x.contiguous()
    y = x.new_empty(len(x), matrix.rows)
    _library().matvec(
        ctypes.byref(matrix),
        *(x.data_ptr(), x.shape[1], len(x), y.data_ptr(), y.shape[1]),
        num_threads(matrix.rows * matrix.columns),
    )
    return y


def unpack(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """``dequantize`` in fp32 or bf16, bit for bit."""
    matrix = matrix_of(weight)
    unpacked = torch.empty(weight.shape, dtype=dtype)
    _library().unpack(
        ctypes.byref(matrix),
        *(weight.shape[:-2].numel(), unpacked.data_ptr(), _KINDS[dtype]),
        num_threads(unpacked.numel()),
    )
    return unpacked
