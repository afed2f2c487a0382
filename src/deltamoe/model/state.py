"""What a model carries from one call to the next.

A state is a value: nothing modifies it in place, a call returns a new one.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from deltamoe.layers import KdaState, MlaState

__all__ = ["ModelState"]


class ModelState(NamedTuple):
    """One entry a layer, and how many tokens each row has read.

    Attributes:
        layers: ``KdaState`` or ``MlaState``, in the order of the blocks.
        lengths: [B] int64.
    """

    layers: tuple[KdaState | MlaState, ...]
    lengths: Tensor

    def select(self, rows: Tensor) -> "ModelState":
        """Take some rows of the batch (int64 indices; repetition is allowed)."""
        lengths = self.lengths[rows]
        longest = int(lengths.max()) if len(lengths) else 0

        def pick(layer: KdaState | MlaState) -> KdaState | MlaState:
            if isinstance(layer, KdaState):
                return KdaState(layer.conv[rows], layer.memory[rows])
            return MlaState(layer.latent[rows, :longest], layer.rope_key[rows, :longest])

        return ModelState(tuple(pick(layer) for layer in self.layers), lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return self.lengths.nbytes + sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """Every layer's tensors, in order."""
        for layer in self.layers:
            yield from layer
