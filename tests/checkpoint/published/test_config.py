"""The published config.json: both spellings, there and back, and what is refused by name."""

import json
from dataclasses import replace
from typing import Any

import pytest

from deltamoe.checkpoint.published import model_config, published_config, refusals
from deltamoe.config import KdaConfig, ModelConfig, preset
from deltamoe.errors import CheckpointError, ConfigError
from tests.saved_model import publishable_config

KIMI = preset("kimi-linear-48b-a3b").model
MLA_LAYERS = (4, 8, 12, 16, 20, 24, 27)  # counted from 1, as there

RELEASED: dict[str, Any] = {
    "architectures": ["KimiLinearForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_kimi.KimiLinearConfig"},
    "bos_token_id": 163584,
    "dtype": "bfloat16",
    "eos_token_id": 163586,
    "first_k_dense_replace": 1,
    "head_dim": 72,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": list(MLA_LAYERS),
        "head_dim": 128,
        "kda_layers": [layer for layer in range(1, 28) if layer not in MLA_LAYERS],
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "model_type": "kimi_linear",
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "pad_token_id": 163839,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "transformers_version": "4.57.0",
    "use_cache": True,
    "use_grouped_topk": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}

# As transformers 5.23 writes the same: other words, and layer types in place of lists.
NATIVE = {
    key: value
    for key, value in RELEASED.items()
    if key
    not in {
        *("auto_map", "first_k_dense_replace", "linear_attn_config", "mla_use_nope"),
        *("moe_layer_freq", "moe_renormalize", "moe_router_activation_func", "num_expert_group"),
        *("num_experts", "num_experts_per_token", "num_nextn_predict_layers"),
        *("num_shared_experts", "use_grouped_topk", "model_max_length"),
    }
} | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "layer_types": [
        "full_attention" if i + 1 in MLA_LAYERS else "linear_attention" for i in range(27)
    ],
    "linear_conv_kernel_dim": 4,
    "linear_head_dim": 128,
    "linear_num_heads": 32,
    "max_position_embeddings": 1048576,
    "mlp_layer_types": ["dense"] + 26 * ["sparse"],
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_local_experts": 256,
    "output_router_logits": False,
    "pretraining_tp": 1,
    "qk_head_dim": 192,
}


def read(data: dict[str, Any]) -> ModelConfig:
    return model_config(json.loads(json.dumps(data)), source="config.json")


@pytest.mark.parametrize("data", [RELEASED, NATIVE, {**NATIVE, **RELEASED}], ids=range(3))
def test_both_spellings_are_the_released_model(data: dict[str, Any]) -> None:
    assert read(data) == KIMI


def test_what_we_write_has_every_key_of_the_released_one() -> None:
    ids = {"bos_token_id": 163584, "eos_token_id": 163586, "pad_token_id": 163839}
    written = published_config(KIMI, dtype="BF16", token_ids=ids)
    for key, value in RELEASED.items():
        if key not in ("auto_map", "rope_scaling", "transformers_version"):
            assert written.pop(key) == value, key
    # transformers would otherwise guess these two
    assert written == {key: NATIVE[key] for key in ("layer_types", "mlp_layer_types")}


CHANGES = [
    {},
    {"mixers": ("mla", "kda", "kda", "mla")},
    {"mixers": ("kda", "mla", "mla", "kda")},
    {"mla_every": 2, "mla_last": False},
    {"mla_every": 0, "mla": None},
    {"mla_every": 1, "kda": None},
    {"first_dense_layers": 0},
    {"first_dense_layers": 3},
    {"first_dense_layers": 4, "moe": None},
    {"channels": ("moe", "mlp", "moe", "mlp")},
    {"channels": ("mlp", "mlp", "moe", "mlp")},
    {"norm_eps": 1e-6, "init_std": 0.1},
    {"mla": replace(publishable_config().mla, query_rank=7)},
    {"kda": KdaConfig(num_heads=3, key_dim=6, value_dim=6, conv_size=2)},
    {
        "moe": replace(
            publishable_config().moe,
            num_experts=8,
            num_groups=4,
            groups_per_token=2,
            num_shared_experts=3,
            renormalize=False,
            routed_scale=1.5,
        )
    },
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_there_and_back(change: dict[str, Any]) -> None:
    config = publishable_config(**change)
    back = read(published_config(config, dtype="F32"))
    assert [back.mixer(i) for i in range(4)] == [config.mixer(i) for i in range(4)]
    assert [back.channel(i) for i in range(4)] == [config.channel(i) for i in range(4)]
    for key in ("vocab_size", "dim", "num_layers", "mlp_dim", "norm_eps", "init_std"):
        assert getattr(back, key) == getattr(config, key)
    for part in ("kda", "mla", "moe"):
        assert getattr(back, part) in (getattr(config, part), None)


def test_parts_without_layers_may_be_described() -> None:
    """transformers writes its defaults for them."""
    config = read({**NATIVE, "layer_types": 27 * ["linear_attention"]})
    assert (config.mla, config.schedule) == (None, 27 * "k")
    config = read({**NATIVE, "mlp_layer_types": 27 * ["dense"]})
    assert (config.moe, config.channel(26)) == (None, "mlp")
    config = read({**NATIVE, "layer_types": 27 * ["full_attention"]})
    assert (config.kda, config.schedule) == (None, 27 * "m")


MOE, K = publishable_config().moe, publishable_config().kda
REFUSED = [
    ({"moe": replace(MOE, scoring="softmax")}, "model.moe.scoring = softmax"),
    ({"moe": replace(MOE, scoring="topk_softmax")}, "model.moe.scoring = topk_softmax"),
    ({"moe": replace(MOE, expert="ffn")}, "model.moe.expert = ffn"),
    ({"moe": replace(MOE, has_balance_bias=False)}, "model.moe.has_balance_bias"),
    ({"moe": replace(MOE, has_biased_weights=True)}, "model.moe.has_biased_weights"),
    ({"moe": replace(MOE, has_noisy_topk=True)}, "model.moe.has_noisy_topk"),
    ({"moe": replace(MOE, num_shared_experts=0)}, "model.moe.num_shared_experts = 0"),
    ({"moe": replace(MOE, num_groups=5, groups_per_token=2)}, "model.moe.num_groups = 5"),
    ({"kda": replace(K, value_dim=12)}, "model.kda.value_dim = 12: it knows only key_dim = 8"),
    ({"kda": replace(K, num_value_heads=4)}, "model.kda.num_value_heads = 4"),
    ({"kda": replace(K, decay="bounded")}, "model.kda.decay = bounded"),
    ({"kda": replace(K, decay_rank=5)}, "model.kda.decay_rank = 5"),
    ({"kda": replace(K, output_gate="none")}, "model.kda.output_gate = none"),
    ({"kda": replace(K, output_gate="swish")}, "model.kda.output_gate = swish"),
    ({"kda": replace(K, output_gate_rank=5)}, "model.kda.output_gate_rank = 5"),
    ({"kda": replace(K, max_beta=2.0)}, "model.kda.max_beta = 2.0"),
    ({"kda": replace(K, conv_size=0)}, "model.kda.conv_size = 0"),
    ({"mla": replace(publishable_config().mla, has_rope=True)}, "model.mla.has_rope"),
    ({"mla": replace(publishable_config().mla, latent_norm_eps=1e-6)}, "latent_norm_eps = 1e-06"),
    ({"channels": ("moe", "moe", "mlp", "moe")}, "model.channels"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_the_format_cannot_say(change: dict[str, Any], message: str) -> None:
    config = publishable_config(**change)
    with pytest.raises(ConfigError, match="cannot express this model") as raised:
        published_config(config, dtype="F32")
    assert message in str(raised.value)
    assert len(refusals(config)) == 1


def test_every_reason_is_given_at_once() -> None:
    reasons = refusals(preset("moe-2-of-4").model)
    assert [reason.split(" = ")[0] for reason in reasons] == [
        "model.moe.expert",
        "model.moe.scoring",
        "model.moe.has_balance_bias",
        "model.moe.num_shared_experts",
    ]


def test_what_no_layer_has_is_no_reason() -> None:
    unused = {"kda": replace(K, value_dim=12), "mla_every": 1}
    assert refusals(publishable_config(**unused)) == []


def test_one_expert_a_token_is_never_divided_by_itself() -> None:
    """Some readers would make its weight 1; ours and the released code's leave it as it is."""
    one = publishable_config(moe=replace(MOE, experts_per_token=1))
    assert published_config(one, dtype="F32")["moe_renormalize"] is False


UNREADABLE = [
    ({"model_type": "deepseek_v3"}, "model_type = 'deepseek_v3'"),
    ({"model_type": None}, "model_type is missing"),
    ({"num_hidden_layers": 10**15}, "num_hidden_layers"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"num_hidden_layers": 26}, "linear_attn_config"),
    ({"num_hidden_layers": 28}, "linear_attn_config"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": 2304.0}, "hidden_size = 2304.0"),
    ({"hidden_size": -1}, "hidden_size = -1"),
    ({"hidden_size": 1 << 30}, "hidden_size"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"rms_norm_eps": 0}, "norm_eps"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
    ({"routed_scaling_factor": None}, "routed_scaling_factor is missing"),
    ({"num_shared_experts": None}, "num_shared_experts or n_shared_experts is missing"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"mla_use_nope": False}, "mla_use_nope = False"),
    ({"attention_bias": True}, "attention_bias = True"),
    ({"num_key_value_heads": 8}, "num_key_value_heads = 8"),
    ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers = 1"),
    ({"moe_router_activation_func": "relu"}, "moe_router_activation_func = 'relu'"),
    ({"num_experts_per_token": 257}, "experts_per_token = 257"),
    ({"num_expert_group": 3}, "num_groups = 3"),
    ({"num_expert_group": 2, "use_grouped_topk": False}, "use_grouped_topk = False"),
    ({"norm_topk_prob": False}, "norm_topk_prob = False disagrees with moe_renormalize = True"),
    ({"n_group": 2}, "n_group = 2 disagrees"),
    ({"layer_types": 27 * ["linear_attention"]}, "layer_types disagrees"),
    ({"layer_types": 27 * ["mamba"]}, "layer_types holds 'mamba'"),
    ({"layer_types": 26 * ["linear_attention"]}, "layer_types must be a list of 27"),
    ({"mlp_layer_types": 27 * ["sparse"]}, "mlp_layer_types disagrees"),
    ({"moe_layer_freq": 0}, "moe_layer_freq = 0"),
    ({"linear_attn_config": []}, "linear_attn_config = a list"),
    ({"linear_attn_config": None}, "linear_attn_config is missing"),
    ({"quantization_config": {"bits": 4}}, "quantization_config = a dict"),
    ({"attn_res_block_size": 6}, "attn_res_block_size = 6: this program does not know the key"),
    ({"a\x1b[2J": 1}, r"a\x1b[2J = 1: this program does not know the key"),
]


@pytest.mark.parametrize(("change", "message"), UNREADABLE, ids=[m for _, m in UNREADABLE])
def test_what_cannot_be_read_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        read({**RELEASED, **change})
    assert message in str(raised.value)
    assert str(raised.value).startswith("config.json: ")
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kda_layers", [0, *range(2, 28)]),
        ("kda_layers", list(range(1, 28))),
        ("kda_layers", 10**6 * [1]),
        ("full_attn_layers", [4, 8, 12, 16, 20, 24, 28]),
        ("full_attn_layers", [4, 8, 12, 16, 20, 24]),
        ("full_attn_layers", "4"),
        ("head_dim", 0),
        ("head_dim", "128"),
        ("gate_lower_bound", -5.0),
    ],
)
def test_linear_attn_config_is_held_to_its_word(key: str, value: object) -> None:
    linear = {**RELEASED["linear_attn_config"], key: value}
    with pytest.raises(CheckpointError, match=r"linear_attn_config|key_dim"):
        read({**RELEASED, "linear_attn_config": linear})


def test_both_places_of_kdas_sizes_must_agree() -> None:
    with pytest.raises(CheckpointError, match="linear_head_dim = 64"):
        read({**RELEASED, "linear_head_dim": 64})
