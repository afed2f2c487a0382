"""What a configuration costs before anything is built: parameters, FLOPs, bytes.

``weights`` lists every tensor a model will have, by name and shape; the counts are sums over that
list, and a test holds it against the real modules. The rest is arithmetic with its formula in the
docstring of the function that does it. A FLOP is one addition or one multiplication, so that a
multiply-add is two; elementwise work (norms, activations, the decay) is left out, as usual.

Knows nothing of torch. Letters: docs/notation.md.
Source: Kimi Linear (arXiv 2510.26692), sections 3 to 5, also for the FLOPs of the chunk form.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

from deltamoe.config import KdaConfig, MlaConfig, ModelConfig, MoeConfig, RunConfig

__all__ = [
    "BITS",
    "PARTS",
    "Bits",
    "GenerationPlan",
    "Parameters",
    "Plan",
    "TrainingPlan",
    "Weight",
    "activation_bytes",
    "cache_bytes_per_token",
    "flops_per_token",
    "generation_plan",
    "machine_memory",
    "parameters",
    "plan",
    "quantized_bits",
    "quantized_shapes",
    "state_bytes_per_sequence",
    "weights",
]

Dtype = Literal["fp32", "bf16"]
Bits = Literal[8, 4]
BITS: tuple[Bits, ...] = (8, 4)
Part = Literal[
    "embedding", "kda", "mla", "mlp", "router", "experts", "shared_expert", "norm", "head"
]
PARTS: tuple[Part, ...] = (
    "embedding",
    "kda",
    "mla",
    "mlp",
    "router",
    "experts",
    "shared_expert",
    "norm",
    "head",
)

_BYTES: dict[Dtype, int] = {"fp32": 4, "bf16": 2}
_CHUNK = 64  # C, tokens per chunk of the published kernels
_TILE, _GROUP = 16, 32  # outputs and inputs of a quantised matrix, filled up to multiples of these
_PROGRAM_BYTES = 1 << 30  # the program and torch, 500 MiB, and the activations of a prompt


class Weight(NamedTuple):
    """One tensor of a model's state_dict.

    Attributes:
        name: as in the state_dict.
        shape: [out, in] for a matrix, [E, ...] for a stack of experts.
        part: where it is counted.
        layer: its block, counted from 0; None outside the blocks.
        optimizer: what moves it when the optimizer is "muon"; "none" for the balance bias.
        active: elements that one token uses.
        is_fp32: kept in fp32 whatever the model's dtype.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    layer: int | None
    optimizer: Literal["muon", "adamw", "none"]
    active: int
    is_fp32: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def weights(config: ModelConfig) -> Iterator[Weight]:
    """Every tensor of the model's state_dict, in no promised order."""
    yield _adamw("embedding.weight", (config.vocab_size, config.dim), "embedding")
    for layer in range(config.num_layers):
        for norm in ("mixer_norm", "channel_norm"):
            yield _adamw(f"blocks.{layer}.{norm}.weight", (config.dim,), "norm", layer)
        block = [*_mixer_weights(config, layer), *_channel_weights(config, layer)]
        yield from (w._replace(name=f"blocks.{layer}.{w.name}", layer=layer) for w in block)
    yield _adamw("norm.weight", (config.dim,), "norm")
    if not config.tie_embeddings:
        yield _adamw("head.weight", (config.vocab_size, config.dim), "head")


def _mixer_weights(config: ModelConfig, layer: int) -> Iterator[Weight]:
    if config.mixer(layer) == "kda":
        assert config.kda is not None
        return _kda_weights(config.kda, config.dim)
    assert config.mla is not None
    return _mla_weights(config.mla, config.dim)


def _kda_weights(kda: KdaConfig, dim: int) -> Iterator[Weight]:
    keys, values = kda.num_heads * kda.key_dim, kda.value_heads * kda.value_dim
    decays = kda.value_heads * kda.key_dim
    for name, channels in (("q", keys), ("k", keys), ("v", values)):
        yield _muon(f"mixer.{name}_proj.weight", (channels, dim), "kda")
        if kda.conv_size > 0:
            yield _adamw(f"mixer.{name}_conv.weight", (channels, kda.conv_size), "kda")
    yield _adamw("mixer.A_log", (kda.value_heads,), "kda")._replace(is_fp32=True)
    yield _adamw("mixer.dt_bias", (decays,), "kda")._replace(is_fp32=True)
    yield _muon("mixer.decay_down.weight", (kda.decay_bottleneck, dim), "kda")
    yield _muon("mixer.decay_up.weight", (decays, kda.decay_bottleneck), "kda")
    yield _adamw("mixer.beta_proj.weight", (kda.value_heads, dim), "kda")
    if kda.output_gate != "none":
        yield _muon("mixer.output_gate_down.weight", (kda.gate_bottleneck, dim), "kda")
        yield _muon("mixer.output_gate_up.weight", (values, kda.gate_bottleneck), "kda")
    yield _adamw("mixer.output_norm.weight", (kda.value_dim,), "kda")
    yield _muon("mixer.o_proj.weight", (dim, values), "kda")


def _mla_weights(mla: MlaConfig, dim: int) -> Iterator[Weight]:
    queries = mla.num_heads * mla.query_dim
    if mla.query_rank is None:
        yield _muon("mixer.q_proj.weight", (queries, dim), "mla")
    else:
        yield _muon("mixer.q_down.weight", (mla.query_rank, dim), "mla")
        yield _adamw("mixer.q_norm.weight", (mla.query_rank,), "mla")
        yield _muon("mixer.q_up.weight", (queries, mla.query_rank), "mla")
    yield _muon("mixer.latent_proj.weight", (mla.latent_dim + mla.rope_dim, dim), "mla")
    yield _adamw("mixer.latent_norm.weight", (mla.latent_dim,), "mla")
    expanded = mla.num_heads * (mla.nope_dim + mla.value_dim)
    yield _muon("mixer.latent_up.weight", (expanded, mla.latent_dim), "mla")
    yield _muon("mixer.o_proj.weight", (dim, mla.num_heads * mla.value_dim), "mla")


def _channel_weights(config: ModelConfig, layer: int) -> Iterator[Weight]:
    if config.channel(layer) == "mlp":
        return _mlp_weights("channel", config.dim, config.mlp_dim, "mlp")
    assert config.moe is not None
    return _moe_weights(config.moe, config.dim)


def _mlp_weights(name: str, dim: int, hidden: int, part: Part) -> Iterator[Weight]:
    yield _muon(f"{name}.w_gate.weight", (hidden, dim), part)
    yield _muon(f"{name}.w_up.weight", (hidden, dim), part)
    yield _muon(f"{name}.w_down.weight", (dim, hidden), part)


def _moe_weights(moe: MoeConfig, dim: int) -> Iterator[Weight]:
    experts, hidden = moe.num_experts, moe.expert_dim
    yield _muon("channel.router.weight", (experts, dim), "router")
    if moe.has_balance_bias:
        bias = Weight("channel.router.balance_bias", (experts,), "router", None, "none", experts)
        yield bias._replace(is_fp32=True)
    if moe.has_noisy_topk:
        yield _adamw("channel.router.noise_proj.weight", (experts, dim), "router")
    is_swiglu = moe.expert == "swiglu"
    stacks = [("w_up", (experts, hidden, dim)), ("w_down", (experts, dim, hidden))]
    if is_swiglu:
        stacks.append(("w_gate", (experts, hidden, dim)))
    for name, shape in stacks:
        weight = _muon(f"channel.experts.{name}", shape, "experts")
        yield weight._replace(active=weight.size // experts * moe.experts_per_token)
    if moe.num_shared_experts > 0:
        shared = _mlp_weights("channel.shared_expert", dim, moe.shared_dim, "shared_expert")
        yield from (w for w in shared if is_swiglu or not w.name.endswith("w_gate.weight"))


def quantized_bits(weight: Weight, bits: Bits) -> Bits | None:
    """How many bits an element of ``weight`` takes in a model quantised to ``bits``.

    None means that the tensor stays as it is: whatever is no matrix, the embedding (a token reads
    one row of it), the router and beta (small, and which experts are chosen hangs on it), and MLA's
    ``latent_up`` (decoding multiplies it along the other axis). The head and the decay's two
    matrices take 8 bits at least.
    """
    if weight.part == "head" or ".decay_" in weight.name:
        return 8
    is_matrix = weight.optimizer == "muon" and weight.part != "router"
    return bits if is_matrix and not weight.name.endswith("latent_up.weight") else None


def quantized_shapes(shape: Sequence[int], bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the codes (bytes) and scales (fp16) of a weight at so many bits.

    The layout is that of ``deltamoe.ops.quantized``.
    """
    *lead, rows, columns = shape
    tiles, groups = -(-rows // _TILE), -(-columns // _GROUP)
    return (*lead, tiles, groups, _TILE * _GROUP * bits // 8), (*lead, tiles, groups, _TILE)


def _stored_bytes(weight: Weight, dtype: Dtype, bits: Bits | None) -> int:
    """Bytes of one weight in memory or in a file."""
    own = None if bits is None else quantized_bits(weight, bits)
    if own is not None:
        values, scales = quantized_shapes(weight.shape, own)
        return prod(values) + 2 * prod(scales)
    return weight.size * (4 if weight.is_fp32 else _BYTES[dtype])


def _muon(name: str, shape: tuple[int, ...], part: Part) -> Weight:
    return Weight(name, shape, part, None, "muon", prod(shape))


def _adamw(name: str, shape: tuple[int, ...], part: Part, layer: int | None = None) -> Weight:
    return Weight(name, shape, part, layer, "adamw", prod(shape))


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Elements of a model's tensors, its balance biases included.

    Attributes:
        total: all of them.
        active: those one token uses: everything but the experts it is not sent to.
        active_without_embeddings: ``active`` less the embedding and the head.
        by_part: part -> total; ``active_by_part``: part -> active.
        by_layer: total of each block, its two norms included.
    """

    total: int
    active: int
    active_without_embeddings: int
    by_part: dict[str, int]
    active_by_part: dict[str, int]
    by_layer: tuple[int, ...]


def parameters(config: ModelConfig) -> Parameters:
    """Count a model's parameters by part and by layer."""
    by_part = dict.fromkeys(PARTS, 0)
    active = dict.fromkeys(PARTS, 0)
    by_layer = [0] * config.num_layers
    for weight in weights(config):
        by_part[weight.part] += weight.size
        active[weight.part] += weight.active
        if weight.layer is not None:
            by_layer[weight.layer] += weight.size
    return Parameters(
        total=sum(by_part.values()),
        active=sum(active.values()),
        active_without_embeddings=sum(active.values()) - active["embedding"] - active["head"],
        by_part={part: size for part, size in by_part.items() if size},
        active_by_part={part: size for part, size in active.items() if size},
        by_layer=tuple(by_layer),
    )


def state_bytes_per_sequence(config: ModelConfig, dtype: Dtype = "bf16") -> int:
    """Bytes a sequence needs whatever its length: KDA's memory and its convolution's tail.

    For each KDA layer ``4 Hv K V`` (fp32) and the last ``W - 1`` inputs of the convolution in
    ``dtype``.
    """
    if (kda := config.kda) is None:
        return 0
    memory = 4 * kda.value_heads * kda.key_dim * kda.value_dim
    tail = _BYTES[dtype] * max(kda.conv_size - 1, 0) * kda.conv_channels
    return _count(config, "kda") * (memory + tail)


def cache_bytes_per_token(config: ModelConfig, dtype: Dtype = "bf16") -> int:
    """Bytes a sequence grows by with each token: ``L + P`` numbers in each MLA layer."""
    if (mla := config.mla) is None:
        return 0
    return _count(config, "mla") * _BYTES[dtype] * (mla.latent_dim + mla.rope_dim)


def flops_per_token(
    config: ModelConfig, *, context: int, form: Literal["chunk", "recurrent"] = "chunk"
) -> int:
    """FLOPs of one token's forward pass; the backward pass costs twice as much again.

    Every matrix costs two FLOPs for each element the token uses, the head included and the
    embedding not (it is looked up). On top of the matrices, in each layer:

    * form "chunk", the mean over a sequence of ``context`` tokens read at once:
      KDA ``6 K V + C (2 K + V) + C^2`` a value head with C = 64 (the paper's 6 d^2 + 3 C d + C^2
      for K = V = d); MLA, expanded, ``2 (nope + P + V)`` a head for each of the
      ``(context + 1) / 2`` positions that a token attends to on average.
    * form "recurrent", the next token after ``context``: KDA ``6 K V`` a value head (recall,
      correct, read); MLA, absorbed, ``2 (2 L + P)`` a head for each of ``context + 1`` positions.

    Args:
        config: the model.
        context: tokens, >= 0.
        form: how the tokens are read.
    """
    matrices = [w for w in weights(config) if len(w.shape) > 1 and w.part != "embedding"]
    flops = 2 * sum(w.active for w in matrices)
    if config.tie_embeddings:
        flops += 2 * config.vocab_size * config.dim
    if (kda := config.kda) is not None:
        K, V = kda.key_dim, kda.value_dim
        within_chunk = _CHUNK * (2 * K + V) + _CHUNK**2 if form == "chunk" else 0
        flops += _count(config, "kda") * kda.value_heads * (6 * K * V + within_chunk)
    if (mla := config.mla) is not None:
        if form == "chunk":
            attention = (context + 1) * (mla.query_dim + mla.value_dim)
        else:
            attention = (context + 1) * 2 * (2 * mla.latent_dim + mla.rope_dim)
        flops += _count(config, "mla") * mla.num_heads * attention
    return flops


def activation_bytes(run: RunConfig) -> int:
    """An estimate of what the backward pass of one micro-batch finds stored.

    Numbers kept for each token, ``e`` bytes each (2 in bf16, else 4) unless said otherwise:

    * a block's two norms and residual sums: ``6 D``;
    * KDA: the convolution's inputs, ``Hv K`` decay logits, both bottlenecks, ``4 Hv V`` of values
      and around the output gate, and in fp32 ``2 H K`` of queries and keys, ``Hv (K + 2)`` of
      decay and beta, ``Hv (2 C + V)`` within the chunks, ``Hv K V / C`` of memory;
    * MLA: ``2 L + P`` of the latent, ``H (2 nope + P + 2 V)`` in and behind the attention;
    * an MLP ``2 F``, an expert ``2 F`` for each token it is sent, a router ``4 E`` in fp32;
    * the head keeps ``D``, the hidden vectors' gradient: logits live for one slice.

    With ``checkpoint_activations`` a block keeps its input (D) and only the costliest block counts
    in full. A test holds it within a quarter of what autograd stores with the CPU's kernels;
    PyTorch's own forms keep up to twice as much, allocators waste some: read it as "about".
    """
    config, tokens = run.model, run.data.rows * run.data.context
    precision = _widest_precision(run)
    blocks = [
        _mixer_activation_bytes(config, layer, precision)
        + _channel_activation_bytes(config, layer, precision)
        for layer in range(config.num_layers)
    ]
    if run.train.checkpoint_activations:
        kept = config.num_layers * _BYTES[precision] * config.dim + max(blocks)
    else:
        kept = sum(blocks)
    return tokens * (kept + 4 * config.dim)


def _widest_precision(run: RunConfig) -> Dtype:
    """What "auto" may turn out to be on a machine that is not known here."""
    return "fp32" if run.train.precision == "auto" else run.train.precision


def _mixer_activation_bytes(config: ModelConfig, layer: int, precision: Dtype) -> int:
    e, dim = _BYTES[precision], config.dim
    if config.mixer(layer) == "kda":
        assert config.kda is not None
        kda, heads = config.kda, config.kda.value_heads
        K, V = kda.key_dim, kda.value_dim
        bottlenecks = kda.decay_bottleneck + kda.gate_bottleneck
        in_fp32 = 2 * kda.num_heads * K + heads * (K + 2 + 2 * _CHUNK + V + K * V // _CHUNK)
        kept = 2 * dim + kda.conv_channels + bottlenecks + heads * (K + 4 * V)
        return e * kept + 4 * in_fp32
    assert config.mla is not None
    mla = config.mla
    latent = 2 * mla.latent_dim + mla.rope_dim
    attention = mla.num_heads * (2 * mla.nope_dim + mla.rope_dim + 2 * mla.value_dim)
    return e * (2 * dim + latent + attention)


def _channel_activation_bytes(config: ModelConfig, layer: int, precision: Dtype) -> int:
    e, dim = _BYTES[precision], config.dim
    if config.channel(layer) == "mlp":
        return e * (3 * dim + 2 * config.mlp_dim)
    assert config.moe is not None
    moe = config.moe
    hidden = moe.experts_per_token * moe.expert_dim + moe.shared_dim
    return e * (3 * dim + 2 * hidden) + 16 * moe.num_experts


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What training costs; sizes in bytes.

    Weights, their gradients and the optimizer's moments are fp32: two moments for AdamW, one for a
    matrix under Muon. ``compute_copies`` are the bf16 copies that autocast keeps of the weights.
    ``checkpoint_bytes`` is one checkpoint: weights and moments. ``flops`` is three times the
    forward pass over all ``tokens``; what ``checkpoint_activations`` computes again is not in it.
    """

    tokens_per_step: int
    tokens: int
    flops: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    compute_copies: int
    activation_bytes: int
    total_bytes: int
    checkpoint_bytes: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """What generating costs in ``dtype``; sizes in bytes.

    ``bits`` is what the matrices are quantised to, None if they are not. ``sequence_bytes`` is one
    sequence's state and its cache at ``Plan.context`` tokens; ``sequences_that_fit`` is how many
    find room beside the weights. ``expert_bytes`` is one routed expert, of ``num_experts`` in all
    layers together. ``resident_bytes`` is everything but them: the other weights, one sequence, and
    a generous share for the program; ``cached_experts`` is how many find room beside it, if the
    others stay on the disk.
    """

    dtype: Dtype
    bits: Bits | None
    weight_bytes: int
    expert_bytes: int
    num_experts: int
    resident_bytes: int
    cached_experts: int
    sequence_bytes: int
    total_bytes: int
    sequences_that_fit: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The costs of one run.

    Attributes:
        parameters: counts.
        context: the length, in tokens, that the following figures are for.
        flops_per_token: forward, mean over ``context`` tokens read at once (chunk form).
        flops_per_next_token: forward, one token after ``context`` (recurrent form).
        state_bytes_per_sequence, cache_bytes_per_token: of one sequence, in ``generation.dtype``.
        memory_bytes: what ``fits`` is judged by.
        training, generation: see there.
    """

    parameters: Parameters
    context: int
    flops_per_token: int
    flops_per_next_token: int
    state_bytes_per_sequence: int
    cache_bytes_per_token: int
    memory_bytes: int
    training: TrainingPlan
    generation: GenerationPlan


def plan(
    run: RunConfig,
    *,
    context: int | None = None,
    memory_bytes: int | None = None,
    dtype: Dtype | None = None,
    bits: Bits | None = None,
) -> Plan:
    """Work out what a run costs.

    Args:
        run: the configuration.
        context: tokens of a sequence; None means the training context.
        memory_bytes: memory to fit in; None means this machine's.
        dtype: of weights, convolution tail and cache when generating; None means the precision
            of training.
        bits: of the matrices when generating; None means that they are in ``dtype``.
    """
    context = run.data.context if context is None else context
    memory_bytes = machine_memory() if memory_bytes is None else memory_bytes
    dtype = _widest_precision(run) if dtype is None else dtype
    return Plan(
        parameters=parameters(run.model),
        context=context,
        flops_per_token=flops_per_token(run.model, context=context),
        flops_per_next_token=flops_per_token(run.model, context=context, form="recurrent"),
        state_bytes_per_sequence=state_bytes_per_sequence(run.model, dtype),
        cache_bytes_per_token=cache_bytes_per_token(run.model, dtype),
        memory_bytes=memory_bytes,
        training=_training(run, memory_bytes),
        generation=generation_plan(
            run.model, context=context, memory_bytes=memory_bytes, dtype=dtype, bits=bits
        ),
    )


_CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def machine_memory() -> int:
    """Bytes of memory that this process may come to have: the machine's, or its container's."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in _CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # no container; "max" is no limit
            memory = min(memory, int(limit.read_text()))
    return memory


def _training(run: RunConfig, memory_bytes: int) -> TrainingPlan:
    tokens_per_step = run.data.rows * run.data.context * run.train.accumulate
    tokens = tokens_per_step * run.train.steps
    all_weights = list(weights(run.model))
    size = sum(w.size for w in all_weights)
    trained = sum(w.size for w in all_weights if w.optimizer != "none")
    by_muon = sum(w.size for w in all_weights if w.optimizer == "muon")
    moments = 2 * trained - (by_muon if run.optimizer.name == "muon" else 0)
    copies = 0 if run.train.precision == "fp32" else 2 * trained
    activations = activation_bytes(run)
    total = 4 * (size + trained + moments) + copies + activations
    return TrainingPlan(
        tokens_per_step=tokens_per_step,
        tokens=tokens,
        flops=3 * flops_per_token(run.model, context=run.data.context) * tokens,
        weight_bytes=4 * size,
        gradient_bytes=4 * trained,
        optimizer_bytes=4 * moments,
        compute_copies=copies,
        activation_bytes=activations,
        total_bytes=total,
        checkpoint_bytes=4 * (size + moments),
        fits=total <= memory_bytes,
    )


def generation_plan(
    config: ModelConfig,
    *,
    context: int,
    memory_bytes: int,
    dtype: Dtype,
    bits: Bits | None = None,
) -> GenerationPlan:
    """Work out what generating costs; the arguments are those of ``plan``."""
    sequence = state_bytes_per_sequence(config, dtype)
    sequence += context * cache_bytes_per_token(config, dtype)
    sizes = [(weight.part, _stored_bytes(weight, dtype, bits)) for weight in weights(config)]
    weight_bytes = sum(size for _, size in sizes)
    all_experts = sum(size for part, size in sizes if part == "experts")
    sparse = sum(config.channel(layer) == "moe" for layer in range(config.num_layers))
    num_experts = sparse * config.moe.num_experts if config.moe else 0
    expert_bytes = all_experts // max(num_experts, 1)
    total = weight_bytes + sequence
    resident = total - all_experts + _PROGRAM_BYTES
    return GenerationPlan(
        dtype=dtype,
        bits=bits,
        weight_bytes=weight_bytes,
        expert_bytes=expert_bytes,
        num_experts=num_experts,
        resident_bytes=resident,
        cached_experts=min(num_experts, max(memory_bytes - resident, 0) // max(expert_bytes, 1)),
        sequence_bytes=sequence,
        total_bytes=total,
        sequences_that_fit=max(memory_bytes - weight_bytes, 0) // sequence if sequence else 0,
        fits=total <= memory_bytes,
    )


def _count(config: ModelConfig, mixer: Literal["kda", "mla"]) -> int:
    return config.schedule.count(mixer[0])
