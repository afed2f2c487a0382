"""The geometry of a model, as frozen facts.

A model is a stack of ``num_layers`` blocks. Each block has a *mixer* (``kda`` or ``mla``), which
moves information between tokens, and a *channel* (``mlp`` or ``moe``), which works within one.
Which block has which is data: the rule (every fourth mixer and the last one is MLA, the first
``first_dense_layers`` channels are dense) or an explicit list that overrides the rule.

Layers are counted from 0. Knows nothing of torch. Letters: docs/notation.md.
Source: Kimi Linear (arXiv 2510.26692) sections 3 to 5 and the published config.json.
"""

from dataclasses import dataclass
from typing import Literal

from deltamoe.errors import ConfigError

__all__ = ["Channel", "KdaConfig", "Mixer", "MlaConfig", "ModelConfig", "MoeConfig"]

Mixer = Literal["kda", "mla"]
Channel = Literal["mlp", "moe"]

# Far beyond any model, and small enough that nothing is allocated or looped over on a hostile
# file's word before these bounds were checked.
_MOST = 1 << 24
_MOST_LAYERS = 1_000


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key} = {value!r}: expected {expected}")


def _at_least(minimum: int, section: str, *, most: int = _MOST, **values: int) -> None:
    for name, value in values.items():
        expected = f"a whole number from {minimum} to {most:,}"
        _require(minimum <= value <= most, f"{section}.{name}", value, expected)


@dataclass(frozen=True, kw_only=True)
class KdaConfig:
    """Kimi Delta Attention: a memory [K, V] per head that forgets per channel.

    Attributes:
        num_heads: H, heads of queries and keys.
        num_value_heads: heads of values, decay, beta and memory; a multiple of ``num_heads``
            (value head j reads query/key head ``j // (num_value_heads / num_heads)``).
            None means ``num_heads``.
        key_dim: K, channels of one key.
        value_dim: V, channels of one value.
        conv_size: W, taps of the short causal convolution on q, k and v; 0 leaves it out.
        decay: "softplus" (the 48B's, unbounded below) or "bounded" (lower bound times sigmoid).
        decay_lower_bound: the least log-decay of one step when bounded, in [-5, 0).
        decay_rank: width of the bottleneck that makes the decay logits; None means ``key_dim``.
        output_gate: "sigmoid", "swish" or "none".
        output_gate_rank: width of the output gate's bottleneck; None means ``value_dim``.
        max_beta: largest write strength, 1 or 2 (2 lets the memory's transition have negative
            eigenvalues).
    """

    num_heads: int
    num_value_heads: int | None = None
    key_dim: int = 128
    value_dim: int = 128
    conv_size: int = 4
    decay: Literal["softplus", "bounded"] = "softplus"
    decay_lower_bound: float = -5.0
    decay_rank: int | None = None
    output_gate: Literal["sigmoid", "swish", "none"] = "sigmoid"
    output_gate_rank: int | None = None
    max_beta: float = 1.0

    def __post_init__(self) -> None:
        _at_least(
            1, "model.kda", num_heads=self.num_heads, key_dim=self.key_dim, value_dim=self.value_dim
        )
        _at_least(0, "model.kda", conv_size=self.conv_size)
        _require(
            self.value_heads % self.num_heads == 0 and self.value_heads > 0,
            "model.kda.num_value_heads",
            self.num_value_heads,
            f"a multiple of model.kda.num_heads = {self.num_heads}",
        )
        _at_least(1, "model.kda", num_value_heads=self.value_heads)
        _at_least(
            1,
            "model.kda",
            decay_rank=self.decay_bottleneck,
            output_gate_rank=self.gate_bottleneck,
        )
        _require(
            -5.0 <= self.decay_lower_bound < 0.0,
            "model.kda.decay_lower_bound",
            self.decay_lower_bound,
            "a number in [-5, 0)",
        )
        _require(self.max_beta in (1.0, 2.0), "model.kda.max_beta", self.max_beta, "1 or 2")

    @property
    def value_heads(self) -> int:
        """Heads of values, decay, beta and memory."""
        return self.num_heads if self.num_value_heads is None else self.num_value_heads

    @property
    def decay_bottleneck(self) -> int:
        """Width of the bottleneck that makes the decay logits."""
        return self.key_dim if self.decay_rank is None else self.decay_rank

    @property
    def gate_bottleneck(self) -> int:
        """Width of the output gate's bottleneck."""
        return self.value_dim if self.output_gate_rank is None else self.output_gate_rank

    @property
    def conv_channels(self) -> int:
        """Channels that pass through the short convolution: all of q, k and v."""
        return 2 * self.num_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True, kw_only=True)
class MlaConfig:
    """Multi-head latent attention: softmax attention over a compressed key-value latent.

    Attributes:
        num_heads: H, query heads.
        latent_dim: L, the compressed key-value of one token (published: kv_lora_rank).
        nope_dim: key channels of one head that come out of the latent.
        rope_dim: P, key channels shared by all heads, not compressed; 0 leaves them out.
        value_dim: V, channels of one head's value.
        query_rank: width of a query bottleneck with its own norm; None projects directly.
        has_rope: rotate the ``rope_dim`` channels by position. False (NoPE) is Kimi Linear's.
        rope_theta: base of the rotation's frequencies.
        latent_norm_eps: epsilon of the latent's norm; None means the model's ``norm_eps``.
    """

    num_heads: int
    latent_dim: int = 512
    nope_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128
    query_rank: int | None = None
    has_rope: bool = False
    rope_theta: float = 10_000.0
    latent_norm_eps: float | None = None

    def __post_init__(self) -> None:
        _at_least(
            1,
            "model.mla",
            num_heads=self.num_heads,
            latent_dim=self.latent_dim,
            nope_dim=self.nope_dim,
            value_dim=self.value_dim,
        )
        _at_least(0, "model.mla", rope_dim=self.rope_dim)
        if self.query_rank is not None:
            _at_least(1, "model.mla", query_rank=self.query_rank)
        if self.has_rope:
            _require(
                self.rope_dim > 0 and self.rope_dim % 2 == 0,
                "model.mla.rope_dim",
                self.rope_dim,
                "an even number > 0, because model.mla.has_rope is true",
            )
        _require(self.rope_theta > 1.0, "model.mla.rope_theta", self.rope_theta, "a number > 1")
        if self.latent_norm_eps is not None:
            _require(
                self.latent_norm_eps > 0.0, "model.mla.latent_norm_eps", self.latent_norm_eps, "> 0"
            )

    @property
    def query_dim(self) -> int:
        """Channels of one query (and of one expanded key)."""
        return self.nope_dim + self.rope_dim


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """A sparse mixture of experts: each token visits ``experts_per_token`` of ``num_experts``.

    Attributes:
        num_experts: E.
        experts_per_token: A.
        expert_dim: F, hidden width of one expert.
        num_shared_experts: experts every token visits, ungated; they are one MLP of width
            ``num_shared_experts * expert_dim``.
        expert: "swiglu" (three matrices) or "ffn" (two matrices and a GELU between).
        scoring: "sigmoid" (each expert on its own), "softmax" (softmax, then top-k) or
            "topk_softmax" (top-k, then softmax over the chosen).
        renormalize: divide the chosen scores by their sum. "topk_softmax" sums to 1 already.
        routed_scale: factor on the weights after renormalising.
        num_groups, groups_per_token: experts stand in ``num_groups`` equal groups and a token
            may choose only within its best ``groups_per_token``; 1 and 1 switch this off.
        has_balance_bias: a bias per expert that decides selection and, as a rule, never weighs.
        has_biased_weights: the chosen scores weigh with that bias added, as in the published
            modeling code, which adds it in place; its readers (and its paper) leave it out.
        capacity_factor: an expert takes at most ``ceil(factor * N * A / E)`` tokens of one
            sequence batch and drops the rest; None (dropless) drops nothing.
        has_noisy_topk: learned Gaussian noise on the logits while training (Shazeer 2017).
        router_jitter: the router's input is multiplied by U(1 - jitter, 1 + jitter) while
            training (Switch); 0 switches it off.
    """

    num_experts: int
    experts_per_token: int
    expert_dim: int
    num_shared_experts: int = 1
    expert: Literal["swiglu", "ffn"] = "swiglu"
    scoring: Literal["sigmoid", "softmax", "topk_softmax"] = "sigmoid"
    renormalize: bool = True
    routed_scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    has_balance_bias: bool = True
    has_biased_weights: bool = False
    capacity_factor: float | None = None
    has_noisy_topk: bool = False
    router_jitter: float = 0.0

    def __post_init__(self) -> None:
        _at_least(1, "model.moe", num_experts=self.num_experts, expert_dim=self.expert_dim)
        _at_least(0, "model.moe", num_shared_experts=self.num_shared_experts)
        _require(
            1 <= self.experts_per_token <= self.num_experts,
            "model.moe.experts_per_token",
            self.experts_per_token,
            f"1 to model.moe.num_experts = {self.num_experts}",
        )
        _require(
            self.num_groups >= 1 and self.num_experts % self.num_groups == 0,
            "model.moe.num_groups",
            self.num_groups,
            f"a divisor of model.moe.num_experts = {self.num_experts}",
        )
        _require(
            1 <= self.groups_per_token <= self.num_groups,
            "model.moe.groups_per_token",
            self.groups_per_token,
            f"1 to model.moe.num_groups = {self.num_groups}",
        )
        _require(
            not self.has_biased_weights
            or (self.has_balance_bias and self.scoring != "topk_softmax"),
            "model.moe.has_biased_weights",
            self.has_biased_weights,
            "false without model.moe.has_balance_bias, and for scoring topk_softmax",
        )
        reachable = self.groups_per_token * (self.num_experts // self.num_groups)
        _require(
            self.experts_per_token <= reachable,
            "model.moe.experts_per_token",
            self.experts_per_token,
            f"at most {reachable}, the experts in model.moe.groups_per_token groups",
        )
        if self.capacity_factor is not None:
            _require(
                self.capacity_factor > 0.0, "model.moe.capacity_factor", self.capacity_factor, "> 0"
            )
        _require(
            0.0 <= self.router_jitter < 1.0, "model.moe.router_jitter", self.router_jitter, "0 to 1"
        )

    @property
    def shared_dim(self) -> int:
        """Hidden width of the shared experts together."""
        return self.num_shared_experts * self.expert_dim


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides a model's parameters and its function.

    Attributes:
        vocab_size: rows of the embedding.
        dim: D, the width of the residual stream.
        num_layers: blocks.
        mlp_dim: hidden width of a dense channel.
        mla_every: every ``mla_every``-th mixer is MLA, the others KDA; 4 is the 3:1 hybrid, 1 is
            all MLA, 0 is all KDA.
        mla_last: the last mixer is MLA as well.
        first_dense_layers: how many leading channels are dense; the others are MoE.
        mixers, channels: the schedule spelled out; None applies the rule above.
        norm_eps: epsilon of every RMSNorm.
        init_std: standard deviation of the initial weights.
        tie_embeddings: the head shares the embedding's matrix.
        kda, mla, moe: the parts; each is needed only if the schedule uses it.
    """

    vocab_size: int
    dim: int
    num_layers: int
    mlp_dim: int
    mla_every: int = 4
    mla_last: bool = True
    first_dense_layers: int = 1
    mixers: tuple[Mixer, ...] | None = None
    channels: tuple[Channel, ...] | None = None
    norm_eps: float = 1e-5
    init_std: float = 0.02
    tie_embeddings: bool = False
    kda: KdaConfig | None = None
    mla: MlaConfig | None = None
    moe: MoeConfig | None = None

    def __post_init__(self) -> None:
        _at_least(1, "model", vocab_size=self.vocab_size, dim=self.dim)
        _at_least(1, "model", most=_MOST_LAYERS, num_layers=self.num_layers)
        _at_least(1, "model", mlp_dim=self.mlp_dim)
        _at_least(0, "model", mla_every=self.mla_every, first_dense_layers=self.first_dense_layers)
        _require(self.norm_eps > 0.0, "model.norm_eps", self.norm_eps, "> 0")
        _require(self.init_std > 0.0, "model.init_std", self.init_std, "> 0")
        for key, given in (("mixers", self.mixers), ("channels", self.channels)):
            _require(
                given is None or len(given) == self.num_layers,
                f"model.{key}",
                given,
                f"one entry for each of model.num_layers = {self.num_layers}",
            )
        needed: set[str] = {self.mixer(i) for i in range(self.num_layers)}
        needed |= {self.channel(i) for i in range(self.num_layers)}
        for part in ("kda", "mla", "moe"):
            if part in needed and getattr(self, part) is None:
                raise ConfigError(f"model.{part} is missing, but the schedule has {part} layers")

    def mixer(self, layer: int) -> Mixer:
        """The mixer of one block, counted from 0."""
        if self.mixers is not None:
            return self.mixers[layer]
        if self.mla_every == 0:
            return "kda"
        is_last = self.mla_last and layer == self.num_layers - 1
        return "mla" if (layer + 1) % self.mla_every == 0 or is_last else "kda"

    def channel(self, layer: int) -> Channel:
        """The channel of one block, counted from 0."""
        if self.channels is not None:
            return self.channels[layer]
        return "mlp" if layer < self.first_dense_layers else "moe"

    @property
    def schedule(self) -> str:
        """The stack as one letter a mixer, such as "kkkmkkkm"."""
        return "".join(self.mixer(i)[0] for i in range(self.num_layers))
