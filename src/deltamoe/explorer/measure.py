"""From what the hooks saw of one layer to the arrays of a trace, and the checks of each.

Every function takes one row of tokens. Numbers are fp32 on the CPU when they leave. Where a fast
kernel hides what is wanted (the memory after each token, each expert's own answer, the attention
weights) it is computed again by the definition from the same inputs, and a ``Check`` says how far
the two are apart.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltamoe.explorer.format import Array
from deltamoe.explorer.hooks import Captured
from deltamoe.explorer.quantities import QUANTITIES
from deltamoe.layers import Kda, KdaInputs, Mla, Moe, Routing
from deltamoe.model import HybridLM
from deltamoe.ops.kda import kda_recurrent
from deltamoe.ops.short_conv import short_conv

__all__ = ["Check", "as_array", "measure_layer", "memories"]

_LONGEST_HALF_LIFE = 1e9
_LEAST_LOG_DECAY = -1e30  # a trace holds finite numbers; exp of this is 0 as well
_CLOSED = 65_535
# Relative to the largest number compared. In fp32 the kernels and the definitions differ by
# rounding of sums over some hundred numbers; in bf16 or fewer bits every product may be rounded.
_TOLERANCE_FP32, _TOLERANCE_NARROW = 1e-3, 5e-2


@dataclass(frozen=True)
class Check:
    """A number that was found in two ways.

    Attributes:
        name: which; docs/explorer.md lists them.
        layer: where; None for the whole model.
        difference: the largest, relative to the largest number compared (absolute for whole
            numbers).
        tolerance: what is allowed.
    """

    name: str
    layer: int | None
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the two agree; NaN does not."""
        return self.difference <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        finite = self.difference if math.isfinite(self.difference) else None
        return {
            "name": self.name,
            "layer": self.layer,
            "difference": finite,
            "tolerance": self.tolerance,
            "holds": self.holds,
        }


def measure_layer(
    model: HybridLM, layer: int, captured: Captured
) -> tuple[dict[str, Array], list[Check]]:
    """All arrays of one layer but the lens's, and what was checked."""
    block = model.blocks[layer]
    mixer, channel = block.get_submodule("mixer"), block.get_submodule("channel")
    tensors = {
        f"residual.{ours}": captured[hook][0].float().norm(dim=-1)
        for ours, hook in (
            ("before", "before"),
            ("mixer", "mixer.output"),
            ("between", "between"),
            ("channel", "channel.output"),
            ("after", "after"),
        )
    }
    for name in ("mixer.input", "mixer.output", "channel.input", "channel.output"):
        tensors[name] = captured[name][0]
    tolerance = _TOLERANCE_FP32
    if _is_narrow(model):
        tolerance = _TOLERANCE_NARROW
    checks = []
    if isinstance(mixer, Kda):
        found, difference = _measure_kda(mixer, captured)
        checks.append(Check("memory", layer, difference, tolerance))
    else:
        assert isinstance(mixer, Mla)
        found, difference = _measure_mla(mixer, captured)
        checks.append(Check("attention", layer, difference, tolerance))
    tensors |= found
    if isinstance(channel, Moe):
        found, more = _measure_moe(channel, captured, layer, tolerance)
        checks += more
    else:
        found, difference = _measure_mlp(channel, captured)
        checks.append(Check("mlp", layer, difference, tolerance))
    tensors |= found
    return {name: as_array(name, tensor) for name, tensor in tensors.items()}, checks


def as_array(name: str, tensor: Tensor) -> Array:
    """The array of one quantity, in the dtype its file has."""
    dtype = {"f32": np.float32, "i32": np.int32, "u16": np.uint16}[QUANTITIES[name].dtype]
    if tensor.is_floating_point():
        tensor = tensor.float()
    return tensor.detach().cpu().numpy().astype(dtype)


def memories(inputs: KdaInputs) -> Iterator[Tensor]:
    """The memory [HV, K, V] after each token, by the definition."""
    memory = None
    wide = KdaInputs(*(part.float() for part in inputs))
    for t in range(wide.q.shape[1]):
        token = KdaInputs(*(part[:, t : t + 1] for part in wide))
        _, memory = kda_recurrent(*token, memory, backend="reference")
        yield memory[0]


def _measure_kda(mixer: Kda, captured: Captured) -> tuple[dict[str, Tensor], float]:
    c, state = mixer.config, captured["mixer.state"]
    inputs, _ = mixer.inputs(captured["mixer.input"])
    log_decay = inputs.log_decay[0].float().clamp(min=_LEAST_LOG_DECAY)  # [T, HV, K]
    mean = log_decay.mean(dim=-1)
    p10, p90 = torch.quantile(log_decay, torch.tensor([0.1, 0.9]).to(log_decay), dim=-1)
    query = inputs.q[0].float().repeat_interleave(c.value_heads // c.num_heads, dim=1)
    norms, changes, writes, answers = [], [], [], []
    before = torch.zeros_like(state.memory[0], dtype=torch.float32)
    for asked, faded, memory in zip(query, log_decay.exp(), memories(inputs), strict=True):
        norms.append(memory.norm(dim=(1, 2)))
        changes.append((memory - before).norm(dim=(1, 2)))
        writes.append((memory - faded[..., None] * before).norm(dim=(1, 2)))
        answers.append(torch.einsum("hk,hkv->hv", asked, memory))
        before = memory
    found = {
        **_between(mixer, captured),
        "kda.query": inputs.q[0],
        "kda.key": inputs.k[0],
        "kda.value": inputs.v[0],
        "kda.log_decay": log_decay,
        "kda.decay_mean": mean,
        "kda.decay_p10": p10,
        "kda.decay_p90": p90,
        "kda.half_life": torch.where(mean < 0, math.log(2) / -mean, _LONGEST_HALF_LIFE).clamp(
            max=_LONGEST_HALF_LIFE
        ),
        "kda.beta": inputs.beta[0],
        "kda.answer_normed": mixer.output_norm(torch.stack(answers)),
        "kda.memory_norm": torch.stack(norms),
        "kda.change_norm": torch.stack(changes),
        "kda.write_norm": torch.stack(writes),
        "kda.memory": state.memory[0],
        "kda.conv": state.conv[0],
    }
    return found, _difference(before, state.memory[0])


def _between(mixer: Kda, captured: Captured) -> dict[str, Tensor]:
    """What stands between the stream and the memory's inputs, and the output gate."""
    c = mixer.config
    keys, values, wide = (
        (c.num_heads, c.key_dim),
        (c.value_heads, c.value_dim),
        (c.value_heads, c.key_dim),
    )
    shapes = {
        "query_projected": keys,
        "key_projected": keys,
        "value_projected": values,
        "decay_logits": wide,
        "beta_logits": (c.value_heads,),
        "output_gate_logits": values,
    }
    found = {
        f"kda.{name}": captured[f"mixer.{name}"][0].unflatten(-1, shape)
        for name, shape in shapes.items()
        if f"mixer.{name}" in captured
    }
    for part in ("query", "key"):
        flat = captured[f"mixer.{part}_projected"]
        if c.conv_size:
            taps = mixer.q_conv if part == "query" else mixer.k_conv
            flat, _ = short_conv(flat, taps.weight)
        else:
            flat = F.silu(flat)
        found[f"kda.{part}_convolved"] = flat[0].unflatten(-1, keys)
    if c.output_gate != "none":
        logits = found["kda.output_gate_logits"].float()
        is_sigmoid = c.output_gate == "sigmoid"
        found["kda.output_gate"] = logits.sigmoid() if is_sigmoid else F.silu(logits)
    return found


def _measure_mla(mixer: Mla, captured: Captured) -> tuple[dict[str, Tensor], float]:
    inputs = mixer.inputs(captured["mixer.input"])
    w_key, w_value = mixer.head_maps()
    latent, wide = inputs.latent[0].float(), torch.float32
    query = torch.cat([inputs.q_nope, inputs.q_rope], dim=-1)[0].float()  # [T, H, K + P]
    shared = inputs.rope_key[0].float()[:, None].expand(-1, query.shape[1], -1)
    key = torch.cat([torch.einsum("tl,hkl->thk", latent, w_key.to(wide)), shared], dim=-1)
    value = torch.einsum("tl,hvl->thv", latent, w_value.to(wide))
    mixed = torch.empty_like(value)
    for head in range(query.shape[1]):  # one map at a time
        mixed[:, head] = _attention(query[:, head], key[:, head]) @ value[:, head]
    answer = mixer.o_proj(mixed.flatten(1).to(captured["mixer.output"].dtype))
    found = {
        "mla.query": query,
        "mla.key": key,
        "mla.value": value,
        "mla.answer": captured["mixer.answers"][0].view_as(value),
        "mla.latent_projected": captured["mixer.latent_projected"][0, :, : latent.shape[-1]],
        "mla.latent": latent,
        "mla.latent_norm": latent.norm(dim=-1),
    }
    if "mixer.query_latent" in captured:
        found["mla.query_latent"] = captured["mixer.query_latent"][0]
    return found, _difference(answer, captured["mixer.output"][0])


def _attention(query: Tensor, key: Tensor) -> Tensor:
    scores = query @ key.T * query.shape[-1] ** -0.5
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(diagonal=1)
    weights: Tensor = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return weights


def _measure_mlp(mlp: nn.Module, captured: Captured) -> tuple[dict[str, Tensor], float]:
    x = captured["channel.input"]
    gate, up = (mlp.get_submodule(name)(x) for name in ("w_gate", "w_up"))
    answer = mlp.get_submodule("w_down")(F.silu(gate) * up)
    found = {"mlp.gate": gate[0], "mlp.up": up[0]}
    return found, _difference(answer, captured["channel.output"])


def _measure_moe(
    moe: Moe, captured: Captured, layer: int, tolerance: float
) -> tuple[dict[str, Tensor], list[Check]]:
    routing: Routing = captured["channel.routing"]
    x = captured["channel.input"][0]
    answers = torch.stack(
        [_answers_of_choice(moe, x, routing, choice) for choice in range(_num_choices(routing))], 1
    )  # [T, A, D]
    total = (answers * routing.expert_weights.float()[..., None]).sum(dim=1)
    has_shared = "channel.shared" in captured
    shared = captured["channel.shared"][0].float() if has_shared else torch.zeros_like(total)
    bias = getattr(moe.router, "balance_bias", torch.zeros_like(routing.scores[0]))
    scores = routing.scores.float()
    shares = scores / scores.sum(dim=-1, keepdim=True)
    found = {"experts.shared": shared} if has_shared else {}
    found |= {
        "router.logits": routing.logits,
        "router.scores": scores,
        "router.ranks": _ranks(moe, routing),
        "router.balance_bias": bias,
        "router.entropy": -(shares * shares.clamp(min=1e-30).log()).sum(dim=-1),
        "router.expert_ids": routing.expert_ids,
        "router.expert_weights": routing.expert_weights,
        "experts.counts": routing.counts,
        "experts.answers": answers,
        "experts.routed": captured["channel.routed"],
        "experts.norms": answers.norm(dim=-1),
        "experts.shared_norm": shared.norm(dim=-1),
    }
    checks = [
        Check(
            "experts", layer, _difference(total + shared, captured["channel.output"][0]), tolerance
        ),
        Check("counts", layer, abs(float(routing.counts.sum() - routing.expert_ids.numel())), 0.0),
    ]
    c = moe.config
    if c.scoring == "topk_softmax" or (c.renormalize and c.experts_per_token > 1):
        sums = routing.expert_weights.float().sum(dim=-1)
        if not c.has_biased_weights:
            scale = torch.full_like(sums, c.routed_scale)
            checks.append(Check("weights", layer, _difference(sums, scale), tolerance))
    return found, checks


def _num_choices(routing: Routing) -> int:
    return routing.expert_ids.shape[1]


def _answers_of_choice(moe: Moe, x: Tensor, routing: Routing, choice: int) -> Tensor:
    """What the experts answer that were each token's ``choice``-th, unweighted: [T, D]."""
    ids = routing.expert_ids[:, choice : choice + 1].contiguous()
    alone = routing._replace(
        expert_ids=ids,
        expert_weights=torch.ones_like(routing.expert_weights[:, :1]),
        counts=torch.bincount(ids.flatten(), minlength=len(routing.counts)),
    )
    answers, _ = moe.experts(x, alone)
    result: Tensor = answers.float()
    return result


def _ranks(moe: Moe, routing: Routing) -> Tensor:
    """Each expert's place in the order of choice, [T, E]."""
    c = moe.config
    preference = routing.logits if c.scoring == "topk_softmax" else routing.scores
    order = moe.router.preference(preference).sort(dim=-1, descending=True, stable=True)
    places = torch.arange(c.num_experts, device=preference.device).expand_as(preference)
    ranks = torch.empty_like(places).scatter(-1, order.indices, places)
    is_closed = torch.empty_like(places, dtype=torch.bool).scatter(
        -1, order.indices, order.values.isneginf()
    )
    return ranks.masked_fill(is_closed, _CLOSED)


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number expected."""
    found, expected = found.float(), expected.float()
    scale = expected.abs().max().clamp(min=1e-12)
    return ((found - expected).abs().max() / scale).item()


def _is_narrow(model: HybridLM) -> bool:
    narrow = (torch.bfloat16, torch.float16, torch.uint8)
    return any(tensor.dtype in narrow for tensor in model.state_dict().values())
