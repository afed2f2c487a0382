"""What a model weighs, from its own tensors: parameters, FLOPs, state and cache.

Formulas are those of ``deltamoe.plan``; wherever a real tensor can be counted it is.
"""

from typing import Any

from deltamoe.explorer.measure import Check
from deltamoe.model import HybridLM, KdaState, ModelState
from deltamoe.plan import flops_per_token, parameters, weights

__all__ = ["meters", "sequence_bytes"]


def meters(model: HybridLM, *, context: int) -> dict[str, Any]:
    """A model's size and cost as plain data; docs/explorer.md lists the fields.

    Args:
        model: counted tensor by tensor.
        context: tokens, for the FLOPs.
    """
    config = model.config
    counts = parameters(config)
    tensors = model.state_dict()
    flops = flops_per_token(config, context=context, form="recurrent")
    idle = sum(w.size - w.active for w in weights(config) if w.part == "experts")
    state, cache = _state_bytes(model)
    return {
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "weight_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "num_stored_elements": sum(tensor.numel() for tensor in tensors.values()),
        "parameters": {
            "total": counts.total,
            "active": counts.active,
            "by_part": counts.by_part,
            "active_by_part": counts.active_by_part,
        },
        "flops_per_next_token": {
            "context": context,
            "active": flops,
            "all_experts": flops + 2 * idle,
        },
        "state_bytes": state,
        "cache_bytes_per_token": cache,
        "crossover_tokens": -(-state // cache) if cache else None,
        "layers": _layer_costs(model),
    }


def _layer_costs(model: HybridLM) -> list[dict[str, Any]]:
    """Each layer's kind, parameters and bytes a text."""
    config = model.config
    costs: list[dict[str, Any]] = []
    for layer, (state, cache) in enumerate(_layer_bytes(model)):
        own = [w for w in weights(config) if w.layer == layer]
        costs.append(
            {
                "layer": layer,
                "mixer": config.mixer(layer),
                "channel": config.channel(layer),
                "parameters": sum(w.size for w in own),
                "active_parameters": sum(w.active for w in own),
                "state_bytes": state,
                "cache_bytes_per_token": cache,
            }
        )
    return costs


def sequence_bytes(model: HybridLM, state: ModelState) -> tuple[dict[str, Any], Check]:
    """Bytes that one text's state takes, from its tensors, and whether the meters foretold them."""
    layers = [sum(tensor.nbytes for tensor in layer) for layer in state.layers]
    is_fixed = [isinstance(layer, KdaState) for layer in state.layers]
    fixed = sum(nbytes for nbytes, is_ in zip(layers, is_fixed, strict=True) if is_)
    growing = sum(layers) - fixed
    foretold, each = _state_bytes(model)
    difference = abs(fixed - foretold) + abs(growing - each * int(state.lengths))
    found = {"fixed": fixed, "growing": growing, "by_layer": layers}
    return found, Check("bytes", None, float(difference), 0.0)


def _state_bytes(model: HybridLM) -> tuple[int, int]:
    """What a text's state takes before its first token, and grows by with each."""
    layers = _layer_bytes(model)
    return sum(state for state, _ in layers), sum(cache for _, cache in layers)


def _layer_bytes(model: HybridLM) -> list[tuple[int, int]]:
    return [
        (layer.conv.nbytes + layer.memory.nbytes, 0)
        if isinstance(layer, KdaState)
        else (0, sum(part.shape[-1] * part.element_size() for part in layer))
        for layer in model.initial_state(1).layers
    ]
