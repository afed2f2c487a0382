"""Every tensor that a model will have: name, shape, where it counts, what it takes to store.

Knows nothing of torch, or of what is done with the tensors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

from deltamoe.config import KdaConfig, MlaConfig, ModelConfig, MoeConfig

__all__ = [
    "BITS",
    "BYTES",
    "PARTS",
    "Bits",
    "Dtype",
    "Parameters",
    "Part",
    "Weight",
    "parameters",
    "quantized_bits",
    "quantized_shapes",
    "stored_bytes",
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

BYTES: dict[Dtype, int] = {"fp32": 4, "bf16": 2}
_TILE, _GROUP = 16, 32  # outputs and inputs of a quantised matrix, filled up to multiples of these


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


def stored_bytes(weight: Weight, dtype: Dtype, bits: Bits | None) -> int:
    """Bytes of one weight in memory or in a file."""
    own = None if bits is None else quantized_bits(weight, bits)
    if own is not None:
        values, scales = quantized_shapes(weight.shape, own)
        return prod(values) + 2 * prod(scales)
    return weight.size * (4 if weight.is_fp32 else BYTES[dtype])


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
