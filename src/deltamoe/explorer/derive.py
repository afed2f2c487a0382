"""What follows from a trace: memories, what is left of them, attention maps.

Plain NumPy over the arrays of one trace, the same for a live model and for a file.
Source: docs/kda.md for the memory; docs/mla.md for attention.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from deltamoe.errors import DataError
from deltamoe.explorer.format import Array, Trace

__all__ = ["DERIVED", "attention", "memories", "memory", "memory_change", "recall", "retention"]


def memories(trace: Trace, layer: int) -> Iterator[Array]:
    """The memory [HV, K, V] of a KDA layer after each token, fp32.

    Raises:
        DataError: what it follows from was not recorded for this layer.
    """
    key, value, log_decay, beta = _writes(trace, layer)
    memory = np.zeros((*log_decay.shape[1:], value.shape[2]), np.float32)
    for t in range(len(key)):
        memory = memory * np.exp(log_decay[t])[:, :, None]  # forget
        recalled = np.einsum("hk,hkv->hv", key[t], memory)  # recall
        delta = beta[t][:, None] * (value[t] - recalled)
        memory = memory + key[t][:, :, None] * delta[:, None, :]  # correct
        yield memory


def memory(trace: Trace, layer: int, token: int) -> Array:
    """The memory [HV, K, V] after a token."""
    for t, found in enumerate(memories(trace, layer)):
        if t == token:
            return found
    raise _no_such_token(trace, token)


def memory_change(trace: Trace, layer: int, token: int) -> Array:
    """The memory after a token less the one before it, [HV, K, V]."""
    before: Array | float = 0.0
    for t, found in enumerate(memories(trace, layer)):
        if t == token:
            change: Array = found - before
            return change
        before = found
    raise _no_such_token(trace, token)


def recall(trace: Trace, layer: int, token: int) -> Array:
    """How much of a token's value its key still brings back later: [T - token, HV].

    1 is all of it, along the value's own direction; 0 is nothing. A value of zero gives 0.
    """
    key, value, _, _ = _writes(trace, layer)
    _check_token(trace, token)
    asked, written = key[token], value[token]
    size = np.maximum((written * written).sum(axis=-1), 1e-30)
    later = [
        (np.einsum("hk,hkv->hv", asked, found) * written).sum(axis=-1) / size
        for t, found in enumerate(memories(trace, layer))
        if t >= token
    ]
    return np.stack(later).astype(np.float32)


def retention(trace: Trace, layer: int, token: int) -> Array:
    """What forgetting alone leaves of what a token wrote: [T - token, HV], 1 at the token."""
    key, _, log_decay, _ = _writes(trace, layer)
    _check_token(trace, token)
    since = log_decay[token:].astype(np.float64)
    since[0] = 0.0
    left = np.exp(since.cumsum(axis=0))  # [later, HV, K]
    found: Array = (left * key[token].astype(np.float64) ** 2).sum(axis=-1).astype(np.float32)
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
    if head is not None and not 0 <= head < query.shape[1]:
        raise DataError(f"head = {head}: this layer has {query.shape[1]}, counted from 0")
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


DERIVED: Mapping[str, tuple[Callable[[Trace, int, int], Array], tuple[str, ...], str]] = {
    "memory": (memory, ("value_head", "key_channel", "value_channel"), ""),
    "memory_change": (memory_change, ("value_head", "key_channel", "value_channel"), ""),
    "recall": (recall, ("later", "value_head"), "fraction of the value"),
    "retention": (retention, ("later", "value_head"), "fraction of what was written"),
}
"""What follows of one layer and token: how, its axes, its unit. ``attention`` stands apart."""


def _writes(trace: Trace, layer: int) -> tuple[Array, Array, Array, Array]:
    """Keys (repeated for the value heads), values, log-decay and beta of a KDA layer."""
    key = trace.array("kda.key", layer)
    value = trace.array("kda.value", layer)
    key = key.repeat(value.shape[1] // key.shape[1], axis=1)
    return key, value, trace.array("kda.log_decay", layer), trace.array("kda.beta", layer)


def _check_token(trace: Trace, token: int) -> None:
    if not 0 <= token < trace.num_tokens:
        raise _no_such_token(trace, token)


def _no_such_token(trace: Trace, token: int) -> DataError:
    return DataError(f"token = {token}: this trace has {trace.num_tokens} tokens, counted from 0")
