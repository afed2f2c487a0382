"""Recall on real text: what a repeated rare bigram costs, against one seen for the first time.

A bigram is the previous token and the current one. If it is rare in the training text, the weights
hardly know it; if it stood in what the model has already read, its memory can. Names in code and
people in stories are of this kind. The fall of the loss from the first time to the repeat is what
memory is worth.

Source: the associative-recall split of Zoology (arXiv 2312.04927), section 3.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltamoe.evaluation.token_losses import ScoredTokens

__all__ = ["BigramLoss", "Recall", "recall"]


@dataclass(frozen=True)
class BigramLoss:
    """One kind of token: how many, and their mean loss in nats (None if there are none)."""

    num_tokens: int
    loss: float | None


@dataclass(frozen=True)
class Recall:
    """The scored tokens in three kinds.

    Attributes:
        repeated: rare bigrams that stood in the visible text before (the hits).
        first: rare bigrams that did not.
        common: everything else.
    """

    repeated: BigramLoss
    first: BigramLoss
    common: BigramLoss


def recall(scored: ScoredTokens, training_ids: NDArray[np.int64], *, rare: float = 1e-5) -> Recall:
    """Split the scored tokens by their bigram and average each kind.

    Args:
        scored: a text and its losses.
        training_ids: the text that says which bigrams are rare, or a good part of it.
        rare: the largest share of that text a rare bigram may have.
    """
    vocab_size = int(max(scored.token_ids.max(), training_ids.max(initial=0))) + 1
    bigrams = np.zeros(len(scored.token_ids), dtype=np.int64)
    bigrams[1:] = _bigrams(scored.token_ids, vocab_size)
    is_rare = _is_rare(bigrams, _bigrams(training_ids, vocab_size), rare)

    # Only a bigram of the same segment was visible.
    keys = scored.segments * vocab_size**2 + bigrams
    _, first_at = np.unique(keys, return_index=True)
    is_repeat = np.ones(len(keys), dtype=np.bool_)
    is_repeat[first_at] = False

    def average(chosen: NDArray[np.bool_]) -> BigramLoss:
        losses = scored.losses[chosen & scored.is_scored]
        return BigramLoss(
            len(losses), float(losses.mean(dtype=np.float64)) if len(losses) else None
        )

    return Recall(
        repeated=average(is_rare & is_repeat),
        first=average(is_rare & ~is_repeat),
        common=average(~is_rare),
    )


def _bigrams(token_ids: NDArray[np.int64], vocab_size: int) -> NDArray[np.int64]:
    """Each token but the first together with the one before it, as one number."""
    return token_ids[:-1].astype(np.int64) * vocab_size + token_ids[1:]


def _is_rare(
    bigrams: NDArray[np.int64], training: NDArray[np.int64], rare: float
) -> NDArray[np.bool_]:
    known, counts = np.unique(training, return_counts=True)
    too_common = known[counts > rare * len(training)]
    return ~np.isin(bigrams, too_common)
