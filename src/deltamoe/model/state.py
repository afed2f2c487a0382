"""What a model carries from one call to the next.

A ``ModelState`` is a value: nothing modifies it in place, a call returns a new one. A
``PooledState`` is a place: the states of many texts that come and go, changed where they are.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from deltamoe.layers import KdaState, MlaState

__all__ = ["ModelState", "PooledState"]


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


class PooledState(NamedTuple):
    """Room for the states of many texts, each of which has a slot and some pages.

    A text's slot holds its KDA states; its latents are in as many pages as they fill. Which slot
    and which pages are whose is the caller's to know. Between slots, and between pages, there may
    be anything; within one the numbers lie together.

    Attributes:
        layers: in the order of the blocks, ``KdaState`` with tensors [num_slots, ...], and
            ``MlaState`` with tensors [num_pages, page_tokens, L] and [num_pages, page_tokens, P].
    """

    layers: tuple[KdaState | MlaState, ...]
