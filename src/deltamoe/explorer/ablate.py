"""Parts switched off, and what that changes in the answer.

The text of a trace is read twice: as it is, and with hooks that silence layers, heads or experts.
The weights are not touched, and the hooks come off whatever happens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltamoe.errors import ConfigError
from deltamoe.inference.text_state import evaluating
from deltamoe.layers import Kda, Mla, Moe, Router, Routing
from deltamoe.model import HybridLM
from deltamoe.tokenizer import Tokenizer

__all__ = ["SwitchedOff", "ablate", "switched_off"]


@dataclass(frozen=True, kw_only=True)
class SwitchedOff:
    """What is silent.

    Attributes:
        layers: the stream passes them by unchanged.
        heads: (layer, head): a KDA head (a value head) writes nothing, so that it remembers and
            answers nothing; an MLA head's answer is zero.
        experts: (layer, expert).
        experts_are: "never_chosen", so that the next best takes the place, or "silent": chosen,
            and the answer counts zero.
    """

    layers: tuple[int, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()
    experts: tuple[tuple[int, int], ...] = ()
    experts_are: Literal["never_chosen", "silent"] = "never_chosen"


def ablate(
    model: HybridLM, tokenizer: Tokenizer, ids: Sequence[int], off: SwitchedOff
) -> dict[str, Any]:
    """Read a text with and without some parts; the fields are in docs/explorer.md.

    Raises:
        ConfigError: a layer, a head or an expert that is not there, or fewer experts left than a
            token visits.
    """
    row = torch.tensor([list(ids)], device=model.embedding.weight.device)
    with evaluating(model):
        before = _log_probabilities(model, tokenizer, row)
        with switched_off(model, off):
            after = _log_probabilities(model, tokenizer, row)
        divergence = (before.exp() * (before - after)).sum(dim=-1).clamp(min=0.0)
        return {
            "switched_off": {
                "layers": list(off.layers),
                "heads": [list(pair) for pair in off.heads],
                "experts": [list(pair) for pair in off.experts],
                "experts_are": off.experts_are,
            },
            "before": _outcome(before, row[0], tokenizer),
            "after": _outcome(after, row[0], tokenizer),
            "divergence": float(divergence[-1]),
            "by_token": {
                "surprise_before": _surprise(before, row[0]),
                "surprise_after": _surprise(after, row[0]),
                "divergence": divergence.tolist(),
            },
        }


@contextmanager
def switched_off(model: HybridLM, off: SwitchedOff) -> Iterator[None]:
    """Silence parts of a model for the time of the block.

    Raises:
        ConfigError: as for ``ablate``.
    """
    handles: list[RemovableHandle] = []
    try:
        for layer in off.layers:
            block = _block(model, layer)
            handles.append(block.register_forward_hook(_pass_by))
        for layer, heads in _grouped(off.heads).items():
            handles.append(_silence_heads(_block(model, layer), layer, heads))
        for layer, experts in _grouped(off.experts).items():
            handles.append(_silence_experts(_block(model, layer), layer, experts, off.experts_are))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _block(model: HybridLM, layer: int) -> nn.Module:
    if not 0 <= layer < len(model.blocks):
        raise ConfigError(f"layer {layer}: this model has {len(model.blocks)}, counted from 0")
    return model.blocks[layer]


def _grouped(pairs: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for layer, index in pairs:
        found.setdefault(layer, []).append(index)
    return found


def _pass_by(block: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0], *output[1:])


def _silence_heads(block: nn.Module, layer: int, heads: list[int]) -> RemovableHandle:
    mixer = block.get_submodule("mixer")
    if isinstance(mixer, Kda):
        _check(heads, mixer.config.value_heads, f"head of layer {layer}")

        def never_write(module: nn.Module, inputs: object, logits: Tensor) -> Tensor:
            places = torch.tensor(heads, device=logits.device)
            return logits.index_fill(-1, places, -torch.inf)  # beta, their sigmoid, is zero

        return mixer.beta_proj.register_forward_hook(never_write)
    assert isinstance(mixer, Mla)
    num_heads, width = mixer.config.num_heads, mixer.config.value_dim
    _check(heads, num_heads, f"head of layer {layer}")

    def answer_zero(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        answers = inputs[0].unflatten(-1, (num_heads, width))
        places = torch.tensor(heads, device=answers.device)
        return (answers.index_fill(-2, places, 0.0).flatten(-2),)

    return mixer.o_proj.register_forward_pre_hook(answer_zero)


def _silence_experts(
    block: nn.Module, layer: int, experts: list[int], how: Literal["never_chosen", "silent"]
) -> RemovableHandle:
    channel = block.get_submodule("channel")
    if not isinstance(channel, Moe):
        raise ConfigError(f"layer {layer} has no experts: its channel is dense")
    c = channel.config
    _check(experts, c.num_experts, f"expert of layer {layer}")
    silent: Callable[[Router, object, Routing], Routing]
    if how == "never_chosen":
        if c.num_experts - len(set(experts)) < c.experts_per_token:
            raise ConfigError(
                f"layer {layer}: {c.num_experts - len(set(experts))} experts left; "
                f"a token visits {c.experts_per_token}"
            )

        def silent(router: Router, inputs: object, routing: Routing) -> Routing:
            start = routing.logits if c.scoring == "topk_softmax" else routing.scores
            places = torch.tensor(experts, device=start.device)
            preference = router.preference(start).index_fill(-1, places, -torch.inf)
            return router.decide(routing.logits, routing.logits, routing.scores, preference)
    else:

        def silent(router: Router, inputs: object, routing: Routing) -> Routing:
            is_off = torch.isin(
                routing.expert_ids, torch.tensor(experts, device=routing.expert_ids.device)
            )
            return routing._replace(expert_weights=routing.expert_weights.masked_fill(is_off, 0.0))

    return channel.router.register_forward_hook(silent)


def _check(indices: Sequence[int], size: int, what: str) -> None:
    for index in indices:
        if not 0 <= index < size:
            raise ConfigError(f"{what}: {index}; there are {size}, counted from 0")


def _log_probabilities(model: HybridLM, tokenizer: Tokenizer, row: Tensor) -> Tensor:
    """[T, vocab] over the ids a text can have."""
    logits = model.logits(model.hidden(row).hidden)[0, :, : tokenizer.vocab_size].float()
    unused = torch.tensor(tokenizer.unused_ids, dtype=torch.int64, device=logits.device)
    least = torch.finfo(logits.dtype).min
    return logits.index_fill(-1, unused, least).log_softmax(dim=-1)


def _surprise(log_p: Tensor, ids: Tensor) -> list[float]:
    own = log_p[:-1].gather(-1, ids[1:, None])[:, 0]
    return [0.0, *(-own).tolist()]


def _outcome(log_p: Tensor, ids: Tensor, tokenizer: Tokenizer) -> dict[str, Any]:
    last = log_p[-1]
    best = last.topk(min(20, len(last)))
    surprise = _surprise(log_p, ids)[1:]
    return {
        "loss": sum(surprise) / len(surprise) if surprise else None,
        "entropy": float(-(last.exp() * last).sum()),
        "next": [
            {"id": i, "text": tokenizer.decode([i]), "probability": p}
            for i, p in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
        ],
    }
