"""The geometry as metadata of a GGUF file, both ways; and what that format cannot say.

``geometry`` is the one table. It writes the keys, and when a file is read it checks them: what
the file says must be what its configuration says. A file of ours carries the configuration itself
under ``deltamoe.config``, so that everything comes back, the parts that only training needs too;
from any other file the configuration is worked out of the keys.

Knows nothing of tensors and of tokenizers. No torch.
Source: llama.cpp's src/models/kimi-linear.cpp; gguf's constants.
"""

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

import numpy as np

from deltamoe.checkpoint.published import refusals as published_refusals
from deltamoe.config import KdaConfig, MlaConfig, ModelConfig, MoeConfig, from_json
from deltamoe.errors import CheckpointError, ConfigError

__all__ = [
    "ARCHITECTURE",
    "CONFIG_KEY",
    "RATES_KEY",
    "check_expressible",
    "config_of",
    "geometry",
    "refusals",
]

ARCHITECTURE = "kimi-linear"
CONFIG_KEY = "deltamoe.config"
RATES_KEY = "deltamoe.A_log"
"""A_log of all KDA layers, one after the other: -exp(A_log) in fp32 does not give it back."""

_SIGMOID = 2  # the format's number for a router that scores each expert on its own


def refusals(config: ModelConfig) -> list[str]:
    """Why a file cannot express a model: a sentence for each key; empty if it can.

    It says what the published config.json says, and less.
    """
    return published_refusals(config) + [
        f"{key} = {value}: it knows only {only}"
        for key, value, is_good, only in _limits(config)
        if not is_good
    ]


def check_expressible(config: ModelConfig) -> None:
    """Refuse a model that llama.cpp would compute otherwise, or not at all.

    Raises:
        ConfigError: the message names each key.
    """
    if reasons := refusals(config):
        raise ConfigError(
            f"a GGUF file of architecture {ARCHITECTURE} cannot express this model:\n  "
            + "\n  ".join(reasons)
        )


def _limits(config: ModelConfig) -> Iterator[tuple[str, object, bool, str]]:
    """Key, value, whether the format can express it, and what it can."""
    mixers = {config.mixer(layer) for layer in range(config.num_layers)}
    yield "model.mixers", " and ".join(sorted(mixers)), len(mixers) == 2, "kda and mla together"
    kda, mla, moe = config.kda, config.mla, config.moe
    if kda is not None and mla is not None:
        heads = kda.num_heads
        yield (
            *("model.mla.num_heads", mla.num_heads, mla.num_heads == heads),
            f"model.kda.num_heads = {heads}",
        )
    if mla is not None:
        yield "model.mla.query_rank", mla.query_rank, mla.query_rank is None, "none"
    channels = [config.channel(layer) for layer in range(config.num_layers)]
    yield (
        *("model.channels", "this list", channels == sorted(channels)),  # "mlp" before "moe"
        "dense layers first, then experts in every layer",
    )
    if moe is not None:
        yield "model.moe.renormalize", moe.renormalize, moe.renormalize, "true"
        several = moe.experts_per_token > 1
        yield "model.moe.experts_per_token", moe.experts_per_token, several, "2 or more"


def geometry(config: ModelConfig) -> dict[str, Any]:
    """The keys of a model that ``check_expressible`` accepts, without the architecture's prefix."""
    kda, mla, moe = config.kda, config.mla, config.moe
    assert kda is not None
    assert mla is not None
    layers = range(config.num_layers)
    num_dense = sum(config.channel(layer) == "mlp" for layer in layers)
    if num_dense == config.num_layers:
        moe = None
    return {
        "vocab_size": config.vocab_size,
        "embedding_length": config.dim,
        "block_count": config.num_layers,
        "feed_forward_length": config.mlp_dim,
        "attention.head_count": mla.num_heads,
        "attention.head_count_kv": [int(config.mixer(layer) == "mla") for layer in layers],
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.kv_lora_rank": mla.latent_dim,
        "attention.key_length": mla.latent_dim + mla.rope_dim,
        "attention.value_length": mla.latent_dim,
        "attention.key_length_mla": mla.query_dim,
        "attention.value_length_mla": mla.value_dim,
        "rope.dimension_count": mla.rope_dim,
        "ssm.conv_kernel": kda.conv_size,
        "kda.head_dim": kda.key_dim,
        "leading_dense_block_count": num_dense,
        "expert_count": moe.num_experts if moe else 0,
        "expert_used_count": moe.experts_per_token if moe else 0,
        "expert_feed_forward_length": moe.expert_dim if moe else 0,
        "expert_shared_count": moe.num_shared_experts if moe else 0,
        "expert_group_count": moe.num_groups if moe else 0,
        "expert_group_used_count": moe.groups_per_token if moe else 0,
        "expert_gating_func": _SIGMOID,
        "expert_weights_norm": True,
        "expert_weights_scale": moe.routed_scale if moe else 1.0,
    }


_OPTIONAL = {
    "vocab_size": None,
    "attention.value_length": None,
    "expert_group_count": 1,
    "expert_group_used_count": 1,
    "expert_weights_norm": True,
    "expert_weights_scale": 1.0,
    "leading_dense_block_count": 0,
}
"""Keys that other writers leave out, with what llama.cpp then takes; None is not compared."""


def config_of(fields: Mapping[str, Any], *, vocab_size: int, source: str) -> ModelConfig:
    """The model a file describes.

    Args:
        fields: the file's metadata.
        vocab_size: rows of its embedding.
        source: what messages call the file.

    Raises:
        CheckpointError: another architecture, a key that is missing or cannot be, keys that
            disagree with one another or with ``deltamoe.config``.
    """
    if fields.get("general.architecture") != ARCHITECTURE:
        raise CheckpointError(
            f"{source}: architecture {fields.get('general.architecture')!a:.40}; "
            f"expected {ARCHITECTURE!r}"
        )
    try:
        if isinstance(text := fields.get(CONFIG_KEY), str):
            config = from_json(text, ModelConfig, source=f"{source}: {CONFIG_KEY}")
        else:
            config = _worked_out(_Keys(fields, source), vocab_size)
        check_expressible(config)
    except ConfigError as fault:
        raise CheckpointError(f"{source}: {fault}") from fault
    _check_agreement(fields, config, source)
    return config


def _check_agreement(fields: Mapping[str, Any], config: ModelConfig, source: str) -> None:
    for key, expected in geometry(config).items():
        found = fields.get(f"{ARCHITECTURE}.{key}", _OPTIONAL.get(key, _MISSING))
        if found is None:
            continue
        if isinstance(expected, float) and type(found) in (int, float):
            agrees = bool(np.float32(found) == np.float32(expected))
        else:
            agrees = type(found) is type(expected) and found == expected
        if not agrees:
            said = "is missing" if found is _MISSING else f"is {found!a:.60}"
            raise CheckpointError(
                f"{source}: {ARCHITECTURE}.{key} {said}; the configuration says {expected!a:.60}"
            )


class _Missing:
    """What ``_check_agreement`` finds where there is nothing: unlike every value."""


_MISSING = _Missing()


class _Keys:
    """Typed access to the metadata of a file that somebody else wrote."""

    def __init__(self, fields: Mapping[str, Any], source: str) -> None:
        self._fields = fields
        self._source = source

    def get(self, key: str, kind: type) -> Any:
        """The value of a key, of this type."""
        value = self._fields.get(f"{ARCHITECTURE}.{key}", _OPTIONAL.get(key))
        if type(value) is not kind:
            raise CheckpointError(
                f"{self._source}: {ARCHITECTURE}.{key} is {value!a:.60}; expected {kind.__name__}"
            )
        return value

    def whole(self, key: str) -> int:
        """A whole number."""
        number: int = self.get(key, int)
        return number

    def real(self, key: str) -> float:
        """A real number, spelled as short as fp32 allows: 1e-05 and not 9.999999747e-06."""
        number = float(str(np.float32(self.get(key, float))))
        if not isfinite(number):
            raise CheckpointError(f"{self._source}: {ARCHITECTURE}.{key} is {number}")
        return number


def _worked_out(keys: _Keys, vocab_size: int) -> ModelConfig:
    heads, rope_dim = keys.whole("attention.head_count"), keys.whole("rope.dimension_count")
    head_dim = keys.whole("kda.head_dim")
    kv_heads = keys.get("attention.head_count_kv", list)
    dense = keys.whole("leading_dense_block_count")
    return ModelConfig(
        vocab_size=vocab_size,
        dim=keys.whole("embedding_length"),
        num_layers=keys.whole("block_count"),
        mlp_dim=keys.whole("feed_forward_length"),
        first_dense_layers=dense,
        mixers=tuple("mla" if count else "kda" for count in kv_heads),
        norm_eps=keys.real("attention.layer_norm_rms_epsilon"),
        kda=KdaConfig(
            num_heads=heads,
            key_dim=head_dim,
            value_dim=head_dim,
            conv_size=keys.whole("ssm.conv_kernel"),
        ),
        mla=MlaConfig(
            num_heads=heads,
            latent_dim=keys.whole("attention.kv_lora_rank"),
            nope_dim=keys.whole("attention.key_length_mla") - rope_dim,
            rope_dim=rope_dim,
            value_dim=keys.whole("attention.value_length_mla"),
        ),
        moe=_experts(keys) if keys.whole("expert_count") else None,
    )


def _experts(keys: _Keys) -> MoeConfig:
    return MoeConfig(
        num_experts=keys.whole("expert_count"),
        experts_per_token=keys.whole("expert_used_count"),
        expert_dim=keys.whole("expert_feed_forward_length"),
        num_shared_experts=keys.whole("expert_shared_count"),
        num_groups=keys.whole("expert_group_count"),
        groups_per_token=keys.whole("expert_group_used_count"),
        routed_scale=keys.real("expert_weights_scale"),
    )
