"""The published config.json and our geometry, each out of the other.

The file has two spellings: the released model's, and the one that ``transformers`` writes since it
knows the model itself. Both are read, mixed as well; where two keys say the same thing they must
agree. A key that could change the function and is not understood is an error, never ignored, and
nothing is assumed where the readers of this format assume different things. Written are the
released model's keys, and beside them the two lists that ``transformers`` needs.

Published layer lists count from 1, ours from 0: converted here and nowhere else.
Knows nothing of tensors and folders. No torch.
Source: the released model's config.json and configuration class; transformers 5.23, kimi_linear.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deltamoe.checkpoint.published.keys import Keys
from deltamoe.config.model import (
    Channel,
    KdaConfig,
    Mixer,
    MlaConfig,
    ModelConfig,
    MoeConfig,
)
from deltamoe.errors import CheckpointError, ConfigError

__all__ = [
    "DTYPE_NAMES",
    "MODEL_TYPE",
    "TOKEN_IDS",
    "is_published_config",
    "model_config",
    "published_config",
    "refusals",
]

MODEL_TYPE = "kimi_linear"
DTYPE_NAMES: Mapping[str, str] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""safetensors' word for a dtype -> the published config's."""

# published key -> other spellings of it
_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "moe_renormalize": ("norm_topk_prob",),
    "num_expert_group": ("n_group",),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "num_experts_per_token": ("num_experts_per_tok",),
    "num_shared_experts": ("n_shared_experts",),
}
# What the weights' function does not depend on, in this format. head_dim and rope_theta are
# remainders: neither mixer has heads of that size, and nothing is rotated.
_INERT = frozenset(
    {
        *("_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id"),
        *("chunk_size_feed_forward", "dtype", "eos_token_id", "head_dim", "id2label"),
        *("is_encoder_decoder", "label2id", "max_position_embeddings", "model_max_length"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id"),
        *("pretraining_tp", "problem_type", "qk_head_dim", "return_dict", "rope_parameters"),
        *("rope_interleave", "rope_scaling", "rope_theta", "torch_dtype", "transformers_version"),
        "use_cache",
    }
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""The ids that programs around a model ask its config.json for."""

_MAX_LENGTH = 1_048_576  # the released model's; the architecture itself sets no limit
_KDA_KEYS = ("head_dim", "num_heads", "short_conv_kernel_size")
_MLA_KEYS = (
    *("num_attention_heads", "num_key_value_heads", "q_lora_rank", "kv_lora_rank"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
)
_MOE_KEYS = (
    *("num_experts", "num_experts_per_token", "moe_intermediate_size", "num_shared_experts"),
    *("num_expert_group", "topk_group", "moe_renormalize", "routed_scaling_factor"),
    "moe_router_activation_func",
)
_LAYER_TYPES: Mapping[str, Mixer] = {"linear_attention": "kda", "full_attention": "mla"}
_MLP_TYPES: Mapping[str, Channel] = {"dense": "mlp", "sparse": "moe"}


def is_published_config(data: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json is of a published model rather than one of ours."""
    return "model_type" in data and "model" not in data


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


def model_config(data: Mapping[str, Any], *, source: str) -> ModelConfig:
    """Our geometry out of a published config.json.

    Discrepancies between the format's readers are settled by their majority: the router's bias
    chooses and never weighs (``model.moe.has_biased_weights``), the latent's norm has the model's
    epsilon (``model.mla.latent_norm_eps``). ``dataclasses.replace`` chooses otherwise.

    Args:
        data: the parsed file.
        source: what an error calls it, usually the path.

    Raises:
        CheckpointError: another model_type; a key that is missing, of another type, in
            contradiction to another, unknown, or set to what this program cannot compute. The
            message names the key.
    """
    keys = Keys(data, source, _SPELLINGS)
    keys.require("model_type", MODEL_TYPE)
    num_layers = keys.whole("num_hidden_layers", most=1_000)
    mixers = _read_mixers(keys, num_layers)
    channels = _read_channels(keys, num_layers)
    keys.require("hidden_act", "silu")
    keys.require("attention_bias", False)
    keys.require("mla_use_nope", True)
    keys.require("num_nextn_predict_layers", 0)
    keys.require("topk_method", "noaux_tc")
    try:
        config = ModelConfig(
            vocab_size=keys.whole("vocab_size"),
            dim=keys.whole("hidden_size"),
            num_layers=num_layers,
            mlp_dim=keys.whole("intermediate_size"),
            norm_eps=keys.number("rms_norm_eps"),
            init_std=keys.number("initializer_range", 0.02),
            tie_embeddings=keys.flag("tie_word_embeddings", False),
            kda=_read_kda(keys) if "kda" in mixers else None,
            mla=_read_mla(keys) if "mla" in mixers else None,
            moe=_read_moe(keys) if "moe" in channels else None,
            **_mixer_schedule(mixers),
            **_channel_schedule(channels),
        )
    except ConfigError as fault:
        raise CheckpointError(f"{source}: {fault}") from fault
    keys.require_nothing_left(_INERT | _unused_keys(config))
    return config


def _read_kda(keys: Keys) -> KdaConfig:
    linear = keys.section("linear_attn_config")
    head_dim = _same(keys, linear, "head_dim", "linear_head_dim")
    return KdaConfig(
        num_heads=_same(keys, linear, "num_heads", "linear_num_heads"),
        key_dim=head_dim,
        value_dim=head_dim,
        conv_size=_same(keys, linear, "short_conv_kernel_size", "linear_conv_kernel_dim"),
    )


def _read_mla(keys: Keys) -> MlaConfig:
    heads = keys.whole("num_attention_heads")
    keys.require("num_key_value_heads", heads)
    return MlaConfig(
        num_heads=heads,
        latent_dim=keys.whole("kv_lora_rank"),
        nope_dim=keys.whole("qk_nope_head_dim"),
        rope_dim=keys.whole("qk_rope_head_dim"),
        value_dim=keys.whole("v_head_dim"),
        query_rank=keys.whole("q_lora_rank", 0) or None,
    )


def _read_moe(keys: Keys) -> MoeConfig:
    groups = keys.whole("num_expert_group", 1)
    if groups > 1:
        keys.require("use_grouped_topk", True)
    return MoeConfig(
        num_experts=keys.whole("num_experts"),
        experts_per_token=keys.whole("num_experts_per_token"),
        expert_dim=keys.whole("moe_intermediate_size"),
        num_shared_experts=keys.whole("num_shared_experts"),
        scoring=keys.choice("moe_router_activation_func", ("sigmoid", "softmax"), "sigmoid"),
        renormalize=keys.flag("moe_renormalize", True),
        routed_scale=keys.number("routed_scaling_factor"),
        num_groups=groups,
        groups_per_token=keys.whole("topk_group", 1),
    )


def _read_mixers(keys: Keys, num_layers: int) -> tuple[Mixer, ...]:
    """From the two lists that count from 1, from ``layer_types``, or from both if they agree."""
    named = keys.kinds("layer_types", _LAYER_TYPES, num_layers)
    linear = keys.section("linear_attn_config")
    listed = None
    if linear is not None:
        kda = linear.layers("kda_layers", num_layers)
        mla = linear.layers("full_attn_layers", num_layers)
        if sorted(kda + mla) != list(range(num_layers)):
            raise keys.error(
                "linear_attn_config",
                f"kda_layers and full_attn_layers must name each layer from 1 to {num_layers} once",
            )
        is_mla = frozenset(mla)
        listed = tuple[Mixer, ...]("mla" if i in is_mla else "kda" for i in range(num_layers))
    if listed is not None and named is not None and listed != named:
        raise keys.error("layer_types", "disagrees with the lists of linear_attn_config")
    mixers = listed or named
    if mixers is None:
        raise keys.error("linear_attn_config", "is missing, and so is layer_types")
    return mixers


def _read_channels(keys: Keys, num_layers: int) -> tuple[Channel, ...]:
    named = keys.kinds("mlp_layer_types", _MLP_TYPES, num_layers)
    frequency = keys.whole("moe_layer_freq", 1, least=1)
    if named is not None and keys.get("first_k_dense_replace") is None:
        return named
    if named is None and keys.get("num_experts") is None:
        return tuple[Channel, ...](["mlp"] * num_layers)
    first = keys.whole("first_k_dense_replace", least=0)
    ruled = _ruled_channels(num_layers, first, frequency)
    if named is not None and named != ruled:
        raise keys.error(
            "mlp_layer_types", "disagrees with first_k_dense_replace and moe_layer_freq"
        )
    return ruled


def _ruled_channels(num_layers: int, first_dense: int, frequency: int) -> tuple[Channel, ...]:
    sparse: list[Channel] = [
        "moe" if i >= first_dense and i % frequency == 0 else "mlp" for i in range(num_layers)
    ]
    return tuple(sparse)


def _mixer_schedule(mixers: Sequence[Mixer]) -> dict[str, Any]:
    """As a rule if one describes it, so that it reads like the configuration of a run."""
    if "mla" not in mixers:
        return {"mla_every": 0}
    every = mixers.index("mla") + 1
    final = len(mixers) - 1
    for mla_last in (True, False):
        if all(
            (mixer == "mla") == ((i + 1) % every == 0 or (mla_last and i == final))
            for i, mixer in enumerate(mixers)
        ):
            return {"mla_every": every, "mla_last": mla_last}
    return {"mixers": tuple(mixers)}


def _channel_schedule(channels: Sequence[Channel]) -> dict[str, Any]:
    first_dense = channels.index("moe") if "moe" in channels else len(channels)
    if "mlp" not in channels[first_dense:]:
        return {"first_dense_layers": first_dense}
    return {"channels": tuple(channels)}


def _same(keys: Keys, linear: Keys | None, inner: str, outer: str) -> int:
    """A size of KDA, which the two spellings keep in different places."""
    if linear is None or linear.get(inner) is None:
        return keys.whole(outer)
    size = linear.whole(inner)
    keys.require(outer, size)
    return size


def _unused_keys(config: ModelConfig) -> frozenset[str]:
    """Keys that may stand there although no layer has the part they describe."""
    unused = {"use_grouped_topk", "first_k_dense_replace"}
    if config.kda is None:
        unused |= {"linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim"}
        unused |= {f"linear_attn_config.{key}" for key in _KDA_KEYS}
    if config.mla is None:
        unused |= set(_MLA_KEYS)
    if config.moe is None:
        unused |= {*_MOE_KEYS, *(other for key in _MOE_KEYS for other in _SPELLINGS.get(key, ()))}
    return frozenset(unused)


# ── writing ──────────────────────────────────────────────────────────────────────────────────────


def published_config(
    config: ModelConfig, *, dtype: str, token_ids: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The published config.json of a model of ours.

    Args:
        config: our geometry.
        dtype: of the weights: "F32", "BF16" or "F16".
        token_ids: of ``TOKEN_IDS`` what is known, ids below ``config.vocab_size``.

    Raises:
        ConfigError: the format cannot express the model; the message names each key.
    """
    if reasons := refusals(config):
        raise ConfigError(
            "the published format cannot express this model:\n  " + "\n  ".join(reasons)
        )
    data: dict[str, Any] = {
        "architectures": ["KimiLinearForCausalLM"],
        "dtype": DTYPE_NAMES[dtype],
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "initializer_range": config.init_std,
        "intermediate_size": config.mlp_dim,
        "mla_use_nope": True,
        "model_max_length": _MAX_LENGTH,
        "model_type": MODEL_TYPE,
        "num_hidden_layers": config.num_layers,
        "num_nextn_predict_layers": 0,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    # null, for a reader's own default may lie outside this vocabulary
    data |= dict.fromkeys(TOKEN_IDS) | dict(token_ids or {})
    data |= _published_mixers(config) | _published_channels(config)
    return dict(sorted(data.items()))


_Limit = tuple[str, object, bool, str]  # key, value, whether it can be said, what alone can


def refusals(config: ModelConfig) -> list[str]:
    """Why the published format cannot express a model: a sentence for each key; empty if it can."""
    return [
        f"{key} = {value}: it knows only {only}"
        for key, value, is_good, only in _limits(config)
        if not is_good
    ]


def _limits(config: ModelConfig) -> Iterator[_Limit]:
    mixers = {config.mixer(i) for i in range(config.num_layers)}
    if config.kda is not None and "kda" in mixers:
        yield from _kda_limits(config.kda)
    if (mla := config.mla) is not None and "mla" in mixers:
        eps = mla.latent_norm_eps
        only = f"one epsilon for all norms, model.norm_eps = {config.norm_eps}"
        yield "model.mla.has_rope", mla.has_rope, not mla.has_rope, "false"
        yield "model.mla.latent_norm_eps", eps, eps in (None, config.norm_eps), only
    channels = tuple(config.channel(i) for i in range(config.num_layers))
    only = "dense layers first, then experts in every layer or in every n-th"
    yield "model.channels", "this list", _dense_rule(channels) is not None, only
    if config.moe is not None and "moe" in channels:
        yield from _moe_limits(config.moe)


def _kda_limits(kda: KdaConfig) -> Iterator[_Limit]:
    heads, K, of_keys = kda.num_heads, kda.key_dim, f"key_dim = {kda.key_dim}"
    decay, rank = kda.decay_bottleneck, kda.gate_bottleneck
    output = kda.output_gate
    yield "model.kda.num_value_heads", kda.value_heads, kda.value_heads == heads, f"{heads}"
    yield "model.kda.value_dim", kda.value_dim, kda.value_dim == K, of_keys
    yield "model.kda.conv_size", kda.conv_size, kda.conv_size >= 2, "2 taps or more"
    yield "model.kda.decay", kda.decay, kda.decay == "softplus", "softplus"
    yield "model.kda.decay_rank", decay, decay == K, of_keys
    yield "model.kda.output_gate", output, output == "sigmoid", "sigmoid"
    if kda.output_gate_rank is not None and output != "none":
        yield "model.kda.output_gate_rank", rank, rank == K, of_keys
    yield "model.kda.max_beta", kda.max_beta, kda.max_beta == 1.0, "1.0"


def _moe_limits(moe: MoeConfig) -> Iterator[_Limit]:
    is_grouped, group = moe.num_groups > 1, moe.num_experts // moe.num_groups
    shared = moe.num_shared_experts
    yield "model.moe.expert", moe.expert, moe.expert == "swiglu", "swiglu"
    yield "model.moe.scoring", moe.scoring, moe.scoring == "sigmoid", "sigmoid"
    yield "model.moe.has_balance_bias", moe.has_balance_bias, moe.has_balance_bias, "true"
    yield (
        "model.moe.has_biased_weights",
        moe.has_biased_weights,
        not moe.has_biased_weights,
        "false",
    )
    yield "model.moe.has_noisy_topk", moe.has_noisy_topk, not moe.has_noisy_topk, "false"
    yield "model.moe.num_shared_experts", shared, shared > 0, "1 or more"
    yield "model.moe.num_groups", moe.num_groups, not is_grouped or group > 1, "groups of 2 or more"


def _published_mixers(config: ModelConfig) -> dict[str, Any]:
    mixers = [config.mixer(i) for i in range(config.num_layers)]
    words = {mixer: word for word, mixer in _LAYER_TYPES.items()}
    linear: dict[str, Any] = {
        "full_attn_layers": [i + 1 for i, mixer in enumerate(mixers) if mixer == "mla"],
        "kda_layers": [i + 1 for i, mixer in enumerate(mixers) if mixer == "kda"],
    }
    heads = 1
    if (kda := config.kda) is not None:
        heads = kda.num_heads
        linear |= {
            "head_dim": kda.key_dim,
            "num_heads": kda.num_heads,
            "short_conv_kernel_size": kda.conv_size,
        }
    data: dict[str, Any] = {}
    if (mla := config.mla) is not None:
        heads = mla.num_heads
        data = {
            "kv_lora_rank": mla.latent_dim,
            "q_lora_rank": mla.query_rank,
            "qk_nope_head_dim": mla.nope_dim,
            "qk_rope_head_dim": mla.rope_dim,
            "v_head_dim": mla.value_dim,
        }
    return data | {
        "head_dim": max(config.dim // heads, 1),
        "layer_types": [words[mixer] for mixer in mixers],
        "linear_attn_config": linear,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }


def _published_channels(config: ModelConfig) -> dict[str, Any]:
    channels = tuple(config.channel(i) for i in range(config.num_layers))
    words = {channel: word for word, channel in _MLP_TYPES.items()}
    rule = _dense_rule(channels)
    assert rule is not None, "refusals has seen to it"
    data: dict[str, Any] = {
        "first_k_dense_replace": rule[0],
        "mlp_layer_types": [words[channel] for channel in channels],
        "moe_layer_freq": rule[1],
    }
    if (moe := config.moe) is not None:
        data |= {
            "moe_intermediate_size": moe.expert_dim,
            # a single expert's weight is never divided by itself, which some readers would do
            "moe_renormalize": moe.renormalize and moe.experts_per_token > 1,
            "moe_router_activation_func": "sigmoid",
            "num_expert_group": moe.num_groups,
            "num_experts": moe.num_experts,
            "num_experts_per_token": moe.experts_per_token,
            "num_shared_experts": moe.num_shared_experts,
            "routed_scaling_factor": moe.routed_scale,
            "topk_group": moe.groups_per_token,
            "use_grouped_topk": True,
        }
    return data


def _dense_rule(channels: tuple[Channel, ...]) -> tuple[int, int] | None:
    """``first_k_dense_replace`` and ``moe_layer_freq`` of a schedule; None if no pair gives it."""
    if "moe" not in channels:
        return len(channels), 1
    first = channels.index("moe")
    for frequency in range(1, len(channels) + 1):
        if _ruled_channels(len(channels), first, frequency) == channels:
            return first, frequency
    return None
