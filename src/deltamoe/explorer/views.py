"""What each view of the page shows, as numbers: one table for the API and the command line.

The names are the page's own (``static/views/index.js``), with ``tokens`` for what colours the
tokens and ``block`` for the opened block. The page works the same numbers out by itself; formulas
stand in ``derive.py``. No torch.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from deltamoe.errors import ConfigError, DataError
from deltamoe.explorer import derive
from deltamoe.explorer.format import Array, Trace
from deltamoe.explorer.quantities import QUANTITIES

__all__ = ["VIEWS", "Place", "View", "show"]

_CLOSED = 65_535
_MOST_MAP = 1024  # tokens of a whole attention map
_POINTS = 101  # of the curve of state and cache


class Place(NamedTuple):
    """Where in a trace a view looks, each counted from 0."""

    layer: int
    head: int
    token: int


class View(NamedTuple):
    """One view.

    Attributes:
        over: the array whose layers it is about; None where it shows no single layer.
        depends: what of a place it looks at.
        of: its numbers, as arrays and plain data.
    """

    over: str | None
    depends: tuple[str, ...]
    of: Callable[[Trace, Place], dict[str, Any]]


def show(
    trace: Trace, name: str, *, layer: int | None = None, head: int = 0, token: int = 0
) -> dict[str, Any]:
    """The numbers of a view as plain data; docs/explorer.md lists them.

    Args:
        trace: where they come from.
        name: of the view.
        layer: None is the first that has what the view shows.
        head: of values in a KDA layer, of queries in an MLA layer.
        token: -1 is the last.

    Raises:
        ConfigError: no such view.
        DataError: no such layer, head or token, or it was not recorded.
    """
    if name not in VIEWS:
        raise ConfigError(f"no view {name[:40]!r}; the views are {', '.join(VIEWS)}")
    view = VIEWS[name]
    if not -trace.num_tokens <= token < trace.num_tokens:
        raise DataError(
            f"token = {token}: this trace has {trace.num_tokens} tokens, counted from 0"
        )
    if layer is None:
        layers = trace.layers(view.over) if view.over and view.over in trace.arrays else None
        layer = layers[0] if layers else 0
    if not 0 <= layer < trace.config.num_layers:
        raise DataError(
            f"layer = {layer}: this model has {trace.config.num_layers}, counted from 0"
        )
    place = Place(layer, head, token % trace.num_tokens)
    if "head" in view.depends:
        derive.check_head(head, _num_heads(trace, layer))
    found = {part: getattr(place, part) for part in view.depends}
    with np.errstate(all="ignore"):  # of a hostile file's numbers; what comes of them is refused
        numbers = view.of(trace, place)
    return {"view": name, **found, **_plain(numbers, f"the view {name}")}


def _tokens(trace: Trace, place: Place) -> dict[str, Any]:
    """What can colour the tokens, of the layer or the nearest that has it."""
    found: dict[str, Any] = {
        "surprise": trace.array("tokens.surprise"),
        "rank": trace.array("tokens.ranks"),
    }
    for name, array, of in (
        ("first_expert", "router.expert_ids", lambda ids: ids[:, 0]),
        ("router_entropy", "router.entropy", lambda nats: nats),
        ("half_life", "kda.decay_mean", lambda decay: derive.half_life(decay.mean(axis=1))),
        ("memory_change", "kda.change_norm", lambda norms: norms.mean(axis=1)),
    ):
        layers = (trace.layers(array) if array in trace.arrays else None) or ()
        nearest = min(layers, key=lambda layer: abs(layer - place.layer), default=None)
        if nearest is not None:
            found[name] = {"layer": nearest, "values": of(trace.array(array, nearest))}
    return found


def _block(trace: Trace, place: Place) -> dict[str, Any]:
    """Every array of the layer at the token, of one head where it has heads."""
    boxes = {}
    for name in trace.arrays:
        axes = QUANTITIES[name].axes
        if axes[0] != "token" or place.layer not in (trace.layers(name) or ()):
            continue
        values = trace.array(name, place.layer)[place.token]
        if len(axes) > 1 and axes[1] in ("head", "value_head", "mla_head"):
            shared = _num_heads(trace, place.layer) // len(values)
            values, axes = values[place.head // shared], (axes[0], *axes[2:])
        boxes[name] = {"axes": axes[1:], "unit": QUANTITIES[name].unit, "values": values}
    return {"boxes": boxes}


def _sparse(trace: Trace, place: Place) -> dict[str, Any]:
    def at(name: str) -> Any:
        return trace.array(name, place.layer)[place.token]

    bias = trace.array("router.balance_bias", place.layer)
    weights, norms = at("router.expert_weights"), at("experts.norms")
    found: dict[str, Any] = {
        "chosen": at("router.expert_ids"),
        "weights": weights,
        "sum_of_weights": weights.sum(dtype=np.float64),
        "answer_norms": norms,
        "weighted_answer_norms": weights * norms,
        "shared_norm": at("experts.shared_norm"),
        "balance_bias": bias,
    }
    if _has(trace, "router.scores", place.layer):
        scores = at("router.scores")
        ranks = at("router.ranks").tolist()
        found |= {
            "scores": scores,
            "scores_with_bias": scores + bias,
            "ranks": [None if rank == _CLOSED else rank + 1 for rank in ranks],
        }
    return found


def _experts(trace: Trace, place: Place) -> dict[str, Any]:
    found = {
        "chosen": trace.array("router.expert_ids", place.layer),
        "weights": trace.array("router.expert_weights", place.layer),
    }
    if _has(trace, "router.scores", place.layer):
        found["scores"] = trace.array("router.scores", place.layer)
    return found


def _load(trace: Trace, place: Place) -> dict[str, Any]:
    counts = trace.array("experts.counts")
    num_experts = counts.shape[1]
    fair = trace.num_tokens * trace.array("router.expert_ids").shape[2] / num_experts
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=1)
    return {
        "layers": trace.layers("experts.counts"),
        "counts": counts,
        "fair_share": fair,
        "fair_shares": counts / fair,
        "max_vio": counts.max(axis=1) / fair - 1,
        "dormant_experts": (counts == 0).sum(axis=1),
        "entropy": entropy,
        "evenness": entropy / math.log(num_experts) if num_experts > 1 else None,
    }


def _decay(trace: Trace, place: Place) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: derive.half_life(trace.array(f"kda.{array}", place.layer))
        for name, array in (
            ("half_life", "decay_mean"),
            ("half_life_p10", "decay_p10"),
            ("half_life_p90", "decay_p90"),
        )
    }
    found["beta"] = trace.array("kda.beta", place.layer)
    if _has(trace, "kda.log_decay", place.layer):
        channels = trace.array("kda.log_decay", place.layer)[:, place.head]
        found["channel_half_life"] = derive.half_life(channels)
    return found


def _memory(trace: Trace, place: Place) -> dict[str, Any]:
    layer, head, token = place
    found: dict[str, Any] = {
        f"{name}s": trace.array(f"kda.{name}", layer)
        for name in ("memory_norm", "change_norm", "write_norm")
    }
    if not (_has(trace, "kda.key", layer) and _has(trace, "kda.log_decay", layer)):
        return found
    step = derive.step(trace, layer, token, head)
    before, after, recalled, delta = (part[0] for part in step)
    query = trace.array("kda.query", layer)[token]
    asked = query[head * len(query) // _num_heads(trace, layer)]
    value = trace.array("kda.value", layer)[token, head]
    found |= {
        "memory": after,
        "change": after - before,
        "recalled": recalled,
        "value": value,
        "delta": delta,
        "answer": asked @ after,
        "beta": trace.array("kda.beta", layer)[token, head],
        "recall": derive.recall(trace, layer, token, head)[:, 0],
        "retention": derive.retention(trace, layer, token, head)[:, 0],
    }
    lengths = {
        f"{name}_norm": np.linalg.norm(found[name])
        for name in ("memory", "change", "recalled", "value", "delta")
    }
    return {**found, **lengths}


def _attention(trace: Trace, place: Place) -> dict[str, Any]:
    layer, head, token = place
    found: dict[str, Any] = {
        "heads": derive.attention(trace, layer, token=token)[:, : token + 1],
    }
    if trace.num_tokens <= _MOST_MAP:
        rows = derive.attention(trace, layer, head=head)
        found["map"] = [row[: t + 1] for t, row in enumerate(rows)]
    return found


def _state(trace: Trace, place: Place) -> dict[str, Any]:
    model = trace.summary["model"]
    fixed, each = model["state_bytes"], model["cache_bytes_per_token"]
    crossover = -(-fixed // each) if each > 0 else None
    longest = max(trace.num_tokens, 2 * (crossover or 0), 16)
    tokens = [longest * i / (_POINTS - 1) for i in range(_POINTS)]
    kept = ("weight_bytes", "parameters", "flops_per_next_token")
    return {
        "state_bytes": fixed,
        "cache_bytes_per_token": each,
        "crossover_tokens": crossover,
        **{key: model.get(key) for key in kept},
        "now": trace.summary["bytes"],
        "curve": {
            "tokens": tokens,
            "fixed": [fixed] * _POINTS,
            "growing": [each * count for count in tokens],
        },
    }


def _next(trace: Trace, place: Place) -> dict[str, Any]:
    token = place.token
    chances = trace.array("next.probabilities")[token]
    found: dict[str, Any] = {
        "candidates": _spelled(trace, trace.array("next.ids")[token], chances),
        "all_others": max(0.0, 1.0 - float(chances.sum(dtype=np.float64))),
        "entropy": trace.array("next.entropy")[token],
        "came": None,
    }
    if token + 1 < trace.num_tokens:
        surprise = float(trace.array("tokens.surprise")[token + 1])
        found["came"] = {
            **{key: trace.summary["tokens"][token + 1][key] for key in ("id", "text")},
            "surprise": surprise,
            "probability": math.exp(-surprise),
            "rank": int(trace.array("tokens.ranks")[token + 1]) + 1,
        }
    if "lens.ids" in trace.arrays:
        found["lens"] = [
            {"layer": layer, "candidates": _spelled(trace, ids[token], chance[token])}
            for layer, ids, chance in zip(
                trace.layers("lens.ids") or (),
                trace.array("lens.ids"),
                trace.array("lens.probabilities"),
                strict=True,
            )
        ]
    return found


VIEWS: Mapping[str, View] = {
    "tokens": View(None, ("layer",), _tokens),
    "block": View(None, ("layer", "head", "token"), _block),
    "sparse": View("router.expert_ids", ("layer", "token"), _sparse),
    "experts": View("router.expert_ids", ("layer",), _experts),
    "load": View(None, (), _load),
    "decay": View("kda.beta", ("layer", "head"), _decay),
    "memory": View("kda.memory_norm", ("layer", "head", "token"), _memory),
    "attention": View("mla.query", ("layer", "head", "token"), _attention),
    "state": View(None, (), _state),
    "next": View(None, ("token",), _next),
}


def _has(trace: Trace, name: str, layer: int) -> bool:
    return name in trace.arrays and layer in (trace.layers(name) or ())


def _num_heads(trace: Trace, layer: int) -> int:
    config = trace.config
    if config.mixer(layer) == "mla":
        return 1 if config.mla is None else config.mla.num_heads
    return 1 if config.kda is None else config.kda.value_heads


def _spelled(trace: Trace, ids: Array, chances: Array) -> list[dict[str, Any]]:
    texts = trace.summary["texts"]
    return [
        {"id": i, "text": texts.get(str(i), ""), "probability": chance}
        for i, chance in zip(ids.tolist(), chances.tolist(), strict=True)
    ]


def _plain(value: Any, where: str) -> Any:
    """Arrays as lists, all the way down; every number finite."""
    if isinstance(value, dict):
        return {key: _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    if not isinstance(value, np.ndarray | np.generic):
        return value
    derive.check_finite(value, where)
    return value.tolist()
