"""What follows from a trace: memories, what is left of them, attention maps.

Plain NumPy over the arrays of one trace, the same for a live model and for a file.
Source: docs/kda.md for the memory; docs/mla.md for attention.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from deltamoe.errors import DataError
from deltamoe.explorer.format import Array, Trace

__all__ = [
    "DERIVED",
    "LONGEST_HALF_LIFE",
    "Step",
    "attention",
    "check_finite",
    "check_head",
    "half_life",
    "memory",
    "memory_change",
    "recall",
    "retention",
    "step",
    "steps",
]

LONGEST_HALF_LIFE = 1e9


class Step(NamedTuple):
    """What one token does to the memories of a layer; HV is 1 where one head was asked for.

    Attributes:
        before, after: the memory before the token, and after it, [HV, K, V].
        recalled: what the memory, decayed, answered to the token's key, [HV, V].
        delta: what was written under that key, [HV, V].
    """

    before: Array
    after: Array
    recalled: Array
    delta: Array


def steps(trace: Trace, layer: int, head: int | None = None) -> Iterator[Step]:
    """Each token's step of a KDA layer's memories, fp32.

    Args:
        trace: where keys, values, decay and beta stand.
        layer: counted from 0.
        head: of values; None is all of them.

    Raises:
        DataError: what it follows from was not recorded for this layer, or no such head.
    """
    key, value, log_decay, beta = _writes(trace, layer, head)
    memory = np.zeros((*log_decay.shape[1:], value.shape[2]), np.float32)
    for t in range(len(key)):
        before = memory
        memory = memory * np.exp(log_decay[t])[:, :, None]  # forget
        recalled = np.einsum("hk,hkv->hv", key[t], memory)  # recall
        delta = beta[t][:, None] * (value[t] - recalled)
        memory = memory + key[t][:, :, None] * delta[:, None, :]  # correct
        yield Step(before, memory, recalled, delta)


def step(trace: Trace, layer: int, token: int, head: int | None = None) -> Step:
    """What one token does."""
    _check_token(trace, token)
    return next(found for t, found in enumerate(steps(trace, layer, head)) if t == token)


def memory(trace: Trace, layer: int, token: int, head: int | None = None) -> Array:
    """The memory [HV, K, V] after a token."""
    return step(trace, layer, token, head).after


def memory_change(trace: Trace, layer: int, token: int, head: int | None = None) -> Array:
    """The memory after a token less the one before it, [HV, K, V]."""
    found = step(trace, layer, token, head)
    change: Array = found.after - found.before
    return change


def recall(trace: Trace, layer: int, token: int, head: int | None = None) -> Array:
    """How much of a token's value its key still brings back later: [T - token, HV].

    1 is all of it, along the value's own direction; 0 is nothing. A value of zero gives 0.
    """
    key, value, _, _ = _writes(trace, layer, head)
    _check_token(trace, token)
    asked, written = key[token], value[token]
    size = np.maximum((written * written).sum(axis=-1), 1e-30)
    later = [
        (np.einsum("hk,hkv->hv", asked, found.after) * written).sum(axis=-1) / size
        for t, found in enumerate(steps(trace, layer, head))
        if t >= token
    ]
    return np.stack(later).astype(np.float32)


def retention(trace: Trace, layer: int, token: int, head: int | None = None) -> Array:
    """What forgetting alone leaves of what a token wrote: [T - token, HV], 1 at the token."""
    key, _, log_decay, _ = _writes(trace, layer, head)
    _check_token(trace, token)
    since = log_decay[token:].astype(np.float64)
    since[0] = 0.0
    left = np.exp(since.cumsum(axis=0))  # [later, HV, K]
    found: Array = (left * key[token].astype(np.float64) ** 2).sum(axis=-1).astype(np.float32)
    return found


def half_life(log_decay: Array) -> Array:
    """Tokens until half is left at a rate of forgetting, at most ``LONGEST_HALF_LIFE``; fp32."""
    rate = np.maximum(-log_decay.astype(np.float64), np.log(2) / LONGEST_HALF_LIFE)
    found: Array = (np.log(2) / rate).astype(np.float32)
    return found


def attention(
    trace: Trace, layer: int, *, head: int | None = None, token: int | None = None
) -> Array:
    """Attention weights of an MLA layer, fp32: [T, T] of a head, [H, T] of a token, [T] of both.

    Raises:
        DataError: neither is given, one is out of range, or the layer was not recorded.
    """
    if head is None and token is None:
        raise DataError("attention: name a head, a token or both; all maps at once are too many")
    query, key = trace.array("mla.query", layer), trace.array("mla.key", layer)
    if head is not None:
        check_head(head, query.shape[1])
    heads = slice(None) if head is None else slice(head, head + 1)
    tokens = slice(None)
    if token is not None:
        _check_token(trace, token)
        tokens = slice(token, token + 1)
    scores = np.einsum("thc,shc->hts", query[tokens, heads], key[:, heads])
    scores *= query.shape[-1] ** -0.5
    place = np.arange(len(query))
    scores[:, place[tokens][:, None] < place] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores)
    weights /= weights.sum(axis=-1, keepdims=True)
    found: Array = weights[:, 0] if token is not None else weights[0]
    return found[0] if token is not None and head is not None else found


DERIVED: Mapping[str, tuple[Callable[..., Array], tuple[str, ...], str]] = {
    "memory": (memory, ("value_head", "key_channel", "value_channel"), ""),
    "memory_change": (memory_change, ("value_head", "key_channel", "value_channel"), ""),
    "recall": (recall, ("later", "value_head"), "fraction of the value"),
    "retention": (retention, ("later", "value_head"), "fraction of what was written"),
}
"""What follows of one layer and token: how, its axes, its unit. ``attention`` stands apart."""


def _writes(trace: Trace, layer: int, head: int | None) -> tuple[Array, Array, Array, Array]:
    """Keys (repeated for the value heads), values, log-decay and beta of a KDA layer."""
    key = trace.array("kda.key", layer)
    value = trace.array("kda.value", layer)
    log_decay, beta = trace.array("kda.log_decay", layer), trace.array("kda.beta", layer)
    key = key.repeat(value.shape[1] // key.shape[1], axis=1)
    if head is None:
        return key, value, log_decay, beta
    check_head(head, value.shape[1])
    one = slice(head, head + 1)
    return key[:, one], value[:, one], log_decay[:, one], beta[:, one]


def check_head(head: int, num_heads: int) -> None:
    """Refuse a head that is not there with a DataError."""
    if not 0 <= head < num_heads:
        raise DataError(f"head = {head}: this layer has {num_heads}, counted from 0")


def check_finite(array: Array | np.generic, where: str) -> None:
    """Refuse what only a file's absurd numbers can lead to with a DataError."""
    if not np.isfinite(array).all():
        raise DataError(f"{where}: the numbers of this trace lead to none that is finite")


def _check_token(trace: Trace, token: int) -> None:
    if not 0 <= token < trace.num_tokens:
        raise DataError(
            f"token = {token}: this trace has {trace.num_tokens} tokens, counted from 0"
        )
