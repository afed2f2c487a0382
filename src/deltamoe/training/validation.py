"""Bits per byte on held-out text: what the model would need to compress it.

The same windows every time, read as in training. Document borders are not scored, since they have
no bytes. Comparable across tokenizers and with any compressor.
"""

import math
from typing import NamedTuple

import torch

from deltamoe.data import NO_TARGET, TokenStream, validation_batches
from deltamoe.model import HybridLM
from deltamoe.tokenizer import Tokenizer
from deltamoe.training.loss import next_token_loss
from deltamoe.training.signals import StopRequest

__all__ = ["Validation", "validate"]


class Validation(NamedTuple):
    """What a pass over held-out text found.

    Attributes:
        bits_per_byte: total loss in bits over the UTF-8 bytes of the tokens predicted.
        loss: nats a token.
        num_tokens: tokens predicted.
    """

    bits_per_byte: float
    loss: float
    num_tokens: int


@torch.no_grad()
def validate(
    model: HybridLM,
    stream: TokenStream,
    tokenizer: Tokenizer,
    *,
    context: int,
    rows: int,
    max_tokens: int | None = None,
    stop: StopRequest | None = None,
) -> Validation | None:
    """Measure a model on about ``max_tokens`` of a stream (None: on all of it).

    Leaves the model in the mode it was in. Autocast is the caller's.

    Args:
        model: to be measured.
        stream: held-out tokens.
        tokenizer: of the stream.
        context: tokens of a window.
        rows: windows in one forward pass.
        max_tokens: how much to read, evenly spread over the stream.
        stop: polled between forward passes.

    Returns:
        the measurement, or None if a stop was asked for before it was complete.
    """
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    nats, num_tokens, num_bytes = 0.0, 0, 0
    try:
        for batch in validation_batches(stream, context, rows, max_tokens):
            if stop is not None and stop.is_requested:
                return None
            is_border = batch.targets == tokenizer.end_id
            targets = batch.targets.masked_fill(is_border, NO_TARGET)
            ids, cu_seqlens = batch.ids.to(device), batch.cu_seqlens.to(device)
            hidden = model.hidden(ids[None], cu_seqlens=cu_seqlens).hidden[0]
            nats += next_token_loss(
                hidden, targets.to(device), model.head_weight, num_targets=1
            ).item()
            predicted = targets[targets != NO_TARGET]
            num_tokens += len(predicted)
            num_bytes += len(tokenizer.decode_bytes(predicted.numpy()))
    finally:
        model.train(was_training)
    return Validation(
        bits_per_byte=nats / math.log(2) / max(1, num_bytes),
        loss=nats / max(1, num_tokens),
        num_tokens=num_tokens,
    )
