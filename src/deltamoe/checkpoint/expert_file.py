"""Experts read one by one from a quantised model's file, into the slots of a cache.

Each read asks for exactly the expert's bytes and then lets the system forget them: what is kept is
in the slots, so that the memory in use is the budget and not the size of the file.

Knows nothing of which experts are worth a slot.
"""

import os
import weakref
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltamoe.checkpoint.header import Header
from deltamoe.checkpoint.quantized import parts_of
from deltamoe.config.strict_json import open_regular
from deltamoe.errors import CheckpointError
from deltamoe.layers.expert_cache import CachedExperts, ExpertCache
from deltamoe.layers.quantized import QuantizedExperts, QuantizedMatrix
from deltamoe.model import HybridLM
from deltamoe.model.quantized import replace_modules

__all__ = ["cache_experts"]

_EXPONENT = 0x7C00  # an fp16 in which all these bits are set is infinite or NaN


class _Piece(NamedTuple):
    """One of a layer's tensors in the file, and the slots for it in memory, [slots, bytes]."""

    name: str
    begin: int
    slots: NDArray[np.uint8]


def cache_experts(model: HybridLM, header: Header, *, num_slots: int) -> ExpertCache:
    """Give a quantised model experts that stay on the disk.

    Args:
        model: built empty, its experts still without memory; they are replaced.
        header: of its file, found to agree with the model's configuration.
        num_slots: experts in memory at a time, >= 1.

    Returns:
        the cache that all its layers share.
    """
    layers = [name for name, m in model.named_modules() if isinstance(m, QuantizedExperts)]
    example = model.get_submodule(layers[0])
    assert isinstance(example, QuantizedExperts)
    pool = _room_for(example, num_slots)
    cache = ExpertCache(
        pool,
        num_layers=len(layers),
        num_experts=len(example.w_up.values),
        read=_ExpertFile(header, layers, pool).read,
    )
    replace_modules(
        model, QuantizedExperts, lambda name, _: CachedExperts(cache, layers.index(name))
    )
    return cache


def _room_for(example: QuantizedExperts, num_slots: int) -> QuantizedExperts:
    """Experts like these in memory, as many as there are slots."""

    def room(matrix: QuantizedMatrix | None) -> QuantizedMatrix | None:
        if matrix is None:
            return None
        values, scales = (
            torch.empty(num_slots, *tensor.shape[1:], dtype=tensor.dtype)
            for tensor in (matrix.values, matrix.scales)
        )
        return QuantizedMatrix(matrix.quantized._replace(values=values, scales=scales))

    up, down = room(example.w_up), room(example.w_down)
    assert up is not None
    assert down is not None
    return QuantizedExperts(room(example.w_gate), up, down)


class _ExpertFile:
    """Reads an expert of a layer into a slot of the pool."""

    def __init__(self, header: Header, layers: list[str], pool: QuantizedExperts) -> None:
        self._path = header.path
        with open_regular(header.path, error=CheckpointError) as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        if hasattr(os, "posix_fadvise"):  # reading ahead would read the expert behind this one
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._layers = [
            [
                _Piece(name, header.data_begin + header.tensors[name].begin, _as_bytes(slots))
                for stack, matrix in pool.named_children()
                if isinstance(matrix, QuantizedMatrix)
                for name, slots in zip(
                    parts_of(f"{layer}.{stack}"), (matrix.values, matrix.scales), strict=True
                )
            ]
            for layer in layers
        ]

    def read(self, layer: int, expert: int, slot: int) -> int:
        """Read all matrices of one expert; return their bytes.

        Raises:
            CheckpointError: the file is shorter than it was, cannot be read, or holds a scale that
                is NaN or infinite.
        """
        num_bytes = 0
        for piece in self._layers[layer]:
            target = piece.slots[slot]
            self._fill(target, piece.begin + expert * len(target))
            if piece.name.endswith(".scales"):
                scales = target.view(np.uint16)
                if np.any(scales & _EXPONENT == _EXPONENT):
                    raise CheckpointError(
                        f"{self._path}: tensor {piece.name!r}: a scale of expert {expert} is NaN "
                        "or infinite; quantise the model again"
                    )
            num_bytes += len(target)
        return num_bytes

    def _fill(self, target: NDArray[np.uint8], begin: int) -> None:
        done = 0
        while done < len(target):
            try:
                read = os.preadv(self._descriptor, [target[done:].data], begin + done)
            except OSError as fault:
                raise CheckpointError(f"{self._path}: cannot be read ({fault.strerror})") from fault
            if read == 0:
                raise CheckpointError(f"{self._path}: shorter than it was when it was opened")
            done += read
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, begin, len(target), os.POSIX_FADV_DONTNEED)


def _as_bytes(slots: Tensor) -> NDArray[np.uint8]:
    """A pool's tensor as the bytes of its slots; the two share memory."""
    return slots.view(torch.uint8).view(len(slots), -1).numpy()
