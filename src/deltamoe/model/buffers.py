"""Where a decoder writes the states after a token, so that those before it stay as they are.

KDA's memory is written to whichever of its buffers no state holds any more; MLA's latents are
appended behind the newest state that shares their buffer, and copied first if the state at hand is
not the newest. A buffer is in use as long as a tensor looks at it, which weak references tell.
Knows nothing of weights or of what C++ computes.
"""

import weakref
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltamoe.layers import KdaState, MlaState

__all__ = ["Latents", "Memories"]

_LINE = 64
_LEAST_CAPACITY = 64
"""Tokens that the first buffer of a row has room for."""

_Bytes = NDArray[np.uint8]


class Memories:
    """Buffers for the states of all KDA layers, used again when no tensor looks at them."""

    def __init__(self) -> None:
        self._buffers: list[_Bytes] = []
        self._users: list[weakref.ref[_Bytes]] = []

    def advance(self, places: list[int], layers: list[Any], described: Any) -> None:
        """Describe the states at ``places``, and put the tensors for those after in their place."""
        first = layers[places[0]]
        sizes = [len(places) * part.nbytes for part in (first.memory, first.conv)]
        flat = self._take(_in_lines(sizes[0]) + sizes[1])
        memories, convs = (
            flat[start : start + size].view(part.dtype).view(len(places), *part.shape).unbind()
            for start, size, part in zip(
                (0, _in_lines(sizes[0])), sizes, (first.memory, first.conv), strict=True
            )
        )
        for place, conv, memory in zip(places, convs, memories, strict=True):
            before, here = layers[place], described[place]
            here.conv, here.conv_after = before.conv.data_ptr(), conv.data_ptr()
            here.memory, here.memory_after = before.memory.data_ptr(), memory.data_ptr()
            here.conv_stride, here.memory_stride = conv.stride(0), memory.stride(0)
            layers[place] = KdaState(conv, memory)

    def _take(self, size: int) -> Tensor:
        free = [at for at, user in enumerate(self._users) if user() is None]
        fitting = [at for at in free if len(self._buffers[at]) == size]
        buffer = self._buffers[fitting[0]] if fitting else _aligned(np.empty, size)
        # Two are needed in turn; what else is free belongs to batches of another size.
        held = [at for at in range(len(self._buffers)) if at not in free]
        spare = fitting[1:2]
        self._buffers = [self._buffers[at] for at in (*held, *spare)]
        self._users = [self._users[at] for at in (*held, *spare)]
        user = buffer[:]  # lives as long as a tensor looks at it
        self._buffers.append(buffer)
        self._users.append(weakref.ref(user))
        return torch.from_numpy(user)


class Latents:
    """Buffers for the latents of all MLA layers, each with room for tokens to come."""

    def __init__(self) -> None:
        self._buffers: dict[int, _LatentBuffer] = {}  # by where their first latents lie

    def advance(self, places: list[int], layers: list[Any], described: Any, past: list[int]) -> int:
        """Describe the caches at ``places``, and put the tensors with one token more there.

        Returns:
            Tokens of a row's only page.
        """
        before = [layers[place] for place in places]
        buffer = self._buffers.get(before[0].latent.data_ptr())
        memory = None if buffer is None else buffer.memory()
        if buffer is None or memory is None or not buffer.continues(before, past):
            buffer, memory = self._copied(before, past)
        buffer.lengths = [length + 1 for length in past]
        for place, after in zip(places, buffer.states(memory, 1 + max(past)), strict=True):
            here = described[place]
            here.latent, here.rope_key = after.latent.data_ptr(), after.rope_key.data_ptr()
            here.latent_stride, here.rope_key_stride = (
                after.latent.stride(0),
                after.rope_key.stride(0),
            )
            layers[place] = after
        return buffer.capacity

    def _copied(self, before: list[MlaState], past: list[int]) -> tuple["_LatentBuffer", _Bytes]:
        size = max(past)
        buffer = _LatentBuffer(before, capacity=max(_LEAST_CAPACITY, 2 * size))
        # Fresh memory is zero, and not there before it is written to.
        memory = _aligned(np.zeros, buffer.nbytes)
        where = memory.ctypes.data
        buffer.memory = weakref.ref(memory, lambda _: self._buffers.pop(where, None))
        for new, old in zip(buffer.states(memory, size), before, strict=True):
            for part, old_part in zip(new, old, strict=True):
                part.copy_(old_part[:, :size])
        self._buffers[where] = buffer
        return buffer, memory


class _LatentBuffer:
    """What is known of one buffer; the buffer itself is held by the tensors that look at it.

    Attributes:
        capacity: tokens of a row.
        lengths: tokens of each row that the newest state has.
        memory: the bytes, as long as a tensor looks at them.
    """

    memory: weakref.ref[_Bytes]

    def __init__(self, before: list[MlaState], capacity: int) -> None:
        self.capacity = capacity
        self.lengths: list[int] = []
        self._dtype = before[0].latent.dtype
        self._shapes = [
            (len(before), len(part), capacity, part.shape[2])
            for part in (before[0].latent, before[0].rope_key)
        ]
        self._sizes = [prod(shape) * self._dtype.itemsize for shape in self._shapes]

    @property
    def nbytes(self) -> int:
        """Of all layers' latents and shared keys."""
        return _in_lines(self._sizes[0]) + self._sizes[1]

    def states(self, memory: _Bytes, size: int) -> list[MlaState]:
        """Every layer's first ``size`` tokens."""
        flat = torch.from_numpy(memory)
        latents, rope_keys = (
            flat[start : start + nbytes].view(self._dtype).view(shape)[:, :, :size].unbind()
            for start, nbytes, shape in zip(
                (0, _in_lines(self._sizes[0])), self._sizes, self._shapes, strict=True
            )
        )
        return list(map(MlaState, latents, rope_keys))

    def continues(self, states: list[MlaState], past: list[int]) -> bool:
        """Whether these are its newest states and there is room for one token more."""
        if past != self.lengths or max(past) >= self.capacity:
            return False
        first, step = states[0].latent.data_ptr(), self._sizes[0] // len(states)
        return all(
            state.latent.data_ptr() == first + at * step
            and state.latent.stride()[1:] == (self._shapes[0][3], 1)
            for at, state in enumerate(states)
        )


def _in_lines(size: int) -> int:
    return -(-size // _LINE) * _LINE


def _aligned(make: Callable[..., _Bytes], size: int) -> _Bytes:
    """Bytes that begin with a line of the processor's cache."""
    room = make(size + _LINE, dtype=np.uint8)
    start = -room.ctypes.data % _LINE
    return room[start : start + size]
