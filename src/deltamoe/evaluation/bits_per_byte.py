"""Bits per byte, and how the loss falls along the context.

Bits per byte compares models whatever their tokenizers, and models with compressors: it is what the
text would weigh, in bits for each byte of its UTF-8, if the model coded it.
"""

import math
from typing import NamedTuple

import numpy as np

from deltamoe.errors import DataError
from deltamoe.evaluation.token_losses import ScoredTokens
from deltamoe.tokenizer import Tokenizer

__all__ = ["PositionLoss", "bits_per_byte", "loss_by_position"]


def bits_per_byte(scored: ScoredTokens, tokenizer: Tokenizer) -> float:
    """Total loss in bits over the UTF-8 bytes of the tokens it was paid for.

    Raises:
        DataError: no token was scored.
    """
    num_bytes = len(tokenizer.decode_bytes(scored.token_ids[scored.is_scored].tolist()))
    if num_bytes == 0:
        raise DataError("the text is empty: there is nothing to evaluate")
    return float(np.nansum(scored.losses, dtype=np.float64)) / math.log(2) / num_bytes


class PositionLoss(NamedTuple):
    """The mean loss of the tokens predicted from ``first`` to ``last`` tokens."""

    first: int
    last: int
    num_tokens: int
    loss: float  # nats a token


def loss_by_position(scored: ScoredTokens) -> list[PositionLoss]:
    """Mean loss by how many tokens were visible, in ranges that double: 1, 2-3, 4-7, 8-15, ...

    A model that uses its context keeps falling to the end of it. Empty ranges are left out.
    """
    num_visible = scored.num_visible[scored.is_scored]
    losses = scored.losses[scored.is_scored].astype(np.float64)
    octaves = np.log2(num_visible).astype(np.int64)
    return [
        PositionLoss(
            first=2**octave,
            last=min(2 ** (octave + 1) - 1, int(num_visible.max())),
            num_tokens=int((octaves == octave).sum()),
            loss=float(losses[octaves == octave].mean()),
        )
        for octave in np.unique(octaves).tolist()
    ]
