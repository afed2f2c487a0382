"""All measurements of one model on one text, as the plain data that ``deltamoe eval`` prints."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamoe.data.baselines import MAX_TRAIN_BYTES, ngram_bits_per_byte, xz_bits_per_byte
from deltamoe.errors import ConfigError, DataError
from deltamoe.evaluation.bits_per_byte import bits_per_byte, loss_by_position
from deltamoe.evaluation.held_out import held_out, training_ids
from deltamoe.evaluation.recall import recall
from deltamoe.evaluation.token_losses import Progress, streamed_losses, window_losses
from deltamoe.inference.opened import OpenedModel

__all__ = ["compare", "measure"]

_TRAINING_TOKENS = 1 << 22  # how much training text says which bigrams are rare
_TOKENS_AT_ONCE = 1 << 13


def measure(
    opened: OpenedModel,
    name: str | None = None,
    *,
    context: int | None = None,
    max_tokens: int | None = None,
    streamed: bool = False,
    baselines: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a text and work out everything this folder knows of it.

    Args:
        opened: the model.
        name: the text, see ``held_out``.
        context: tokens of a window; None takes the run's.
        max_tokens: score only the first so many.
        streamed: score it a second time with the state carried through whole documents.
        baselines: measure a compressor and a 5-gram on the same text; minutes for large ones.
        progress: is told how many tokens are done, out of ``num_tokens``.

    Returns:
        ``data``, ``context``, ``num_tokens`` (scored), ``bits_per_byte``, ``loss`` (nats a token),
        ``streamed_bits_per_byte`` and ``baselines`` if asked for, ``loss_by_position`` and
        ``recall`` (None if the training text, which says what is rare, is not there any more).

    Raises:
        ConfigError: nothing has that name, or a context of no tokens.
        DataError: broken text, or none.
    """
    model, tokenizer = opened.model, opened.tokenizer
    context = opened.config.data.context if context is None else context
    if context < 1:
        raise ConfigError(f"context = {context}: expected a whole number >= 1")
    text = held_out(opened, name, max_tokens=max_tokens)
    known = _training_ids(opened, MAX_TRAIN_BYTES if baselines else _TRAINING_TOKENS)
    tokens, starts = text.token_ids, text.document_starts
    rows = max(1, _TOKENS_AT_ONCE // context)
    scored = window_losses(model, tokens, starts, context=context, rows=rows, progress=progress)
    report: dict[str, Any] = {
        "data": text.name,
        "context": context,
        "num_tokens": int(scored.is_scored.sum()),
        "bits_per_byte": bits_per_byte(scored, tokenizer),
        "loss": float(np.nanmean(scored.losses, dtype=np.float64)),
    }
    if streamed:
        whole = streamed_losses(model, tokens, starts, chunk=context, progress=progress)
        report["streamed_bits_per_byte"] = bits_per_byte(whole, tokenizer)
    if baselines:
        train = None if known is None else tokenizer.decode_bytes(known)[:MAX_TRAIN_BYTES]
        report["baselines"] = _baselines(tokenizer.decode_bytes(tokens), train)
    report["loss_by_position"] = [row._asdict() for row in loss_by_position(scored)]
    report["recall"] = None if known is None else asdict(recall(scored, known))
    return report


def compare(
    report: Mapping[str, Any],
    other: OpenedModel,
    name: str | None = None,
    *,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score another model on the tokens of a report.

    Args:
        report: what ``measure`` returned.
        other: a model with the same tokenizer.
        name, max_tokens, progress: as they were for ``measure``.

    Returns:
        ``path``, ``bits_per_byte`` and ``loss`` of the other model, and ``perplexity_change``: how
        much more perplexed the report's model is, as a share; 0.01 is one per cent.

    Raises:
        ConfigError: the two do not score the same tokens.
    """
    found = measure(
        other, name, context=report["context"], max_tokens=max_tokens, progress=progress
    )
    if (found["data"], found["num_tokens"]) != (report["data"], report["num_tokens"]):
        raise ConfigError(
            f"{other.checkpoint.path} scores {found['num_tokens']:,} tokens of {found['data']}, "
            f"not {report['num_tokens']:,} of {report['data']}: compare models of one tokenizer "
            "and one held-out text, or give --data"
        )
    return {
        "path": str(other.checkpoint.path),
        "bits_per_byte": found["bits_per_byte"],
        "loss": found["loss"],
        "perplexity_change": math.expm1(report["loss"] - found["loss"]),
    }


def _training_ids(opened: OpenedModel, max_tokens: int) -> NDArray[np.int64] | None:
    try:
        return training_ids(opened, max_tokens=max_tokens)
    except (ConfigError, DataError):
        return None


def _baselines(text: bytes, train: bytes | None) -> dict[str, float]:
    """Bits per byte of the same text, by programs that learn almost nothing."""
    found = {"xz": xz_bits_per_byte(text)}
    if train is not None:
        found["xz after the training text"] = xz_bits_per_byte(text, train)
        found["5-gram"] = ngram_bits_per_byte(text, train)
    return found
