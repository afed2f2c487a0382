from dataclasses import replace

import pytest

from deltamoe.config import KdaConfig, MlaConfig, ModelConfig, MoeConfig, preset
from deltamoe.errors import ConfigError

NANO = preset("nano").model


@pytest.mark.parametrize(
    ("changes", "schedule", "channels"),
    [
        ({}, "kkkm", "mlp moe moe moe"),
        ({"num_layers": 6}, "kkkmkm", "mlp moe moe moe moe moe"),
        ({"num_layers": 6, "mla_last": False}, "kkkmkk", "mlp moe moe moe moe moe"),
        ({"mla_every": 1}, "mmmm", "mlp moe moe moe"),
        ({"mla_every": 0, "first_dense_layers": 4}, "kkkk", "mlp mlp mlp mlp"),
        ({"num_layers": 2, "mixers": ("mla", "kda"), "channels": ("moe", "mlp")}, "mk", "moe mlp"),
    ],
)
def test_the_schedule_is_a_rule_or_a_list(changes, schedule, channels):
    config = replace(NANO, **changes)
    assert config.schedule == schedule
    assert " ".join(config.channel(i) for i in range(config.num_layers)) == channels


@pytest.mark.parametrize(
    ("part", "changes", "key"),
    [
        (NANO, {"dim": 0}, "model.dim"),
        (NANO, {"num_layers": 1_001}, "model.num_layers"),
        (NANO, {"vocab_size": (1 << 24) + 1}, "model.vocab_size"),
        (NANO, {"mixers": ("kda",)}, "model.mixers"),
        (NANO, {"norm_eps": 0.0}, "model.norm_eps"),
        (NANO, {"moe": None}, "model.moe"),
        (NANO.kda, {"num_value_heads": 6}, "model.kda.num_value_heads"),
        (NANO.kda, {"num_value_heads": 0}, "model.kda.num_value_heads"),
        (NANO.kda, {"conv_size": -1}, "model.kda.conv_size"),
        (NANO.kda, {"decay_rank": 0}, "model.kda.decay_rank"),
        (NANO.kda, {"decay_lower_bound": 0.0}, "model.kda.decay_lower_bound"),
        (NANO.kda, {"max_beta": 1.5}, "model.kda.max_beta"),
        (NANO.mla, {"rope_dim": 3, "has_rope": True}, "model.mla.rope_dim"),
        (NANO.mla, {"query_rank": 0}, "model.mla.query_rank"),
        (NANO.moe, {"experts_per_token": 17}, "model.moe.experts_per_token"),
        (NANO.moe, {"num_groups": 3}, "model.moe.num_groups"),
        (NANO.moe, {"num_groups": 16}, "model.moe.experts_per_token"),
        (NANO.moe, {"capacity_factor": 0.0}, "model.moe.capacity_factor"),
        (NANO.moe, {"router_jitter": 1.0}, "model.moe.router_jitter"),
    ],
)
def test_what_cannot_work_is_refused_by_its_dotted_key(part, changes, key):
    with pytest.raises(ConfigError) as caught:
        replace(part, **changes)
    assert str(caught.value).startswith(f"{key} ")


def test_derived_widths():
    kda = KdaConfig(num_heads=2, num_value_heads=6, key_dim=4, value_dim=5)
    assert (kda.value_heads, kda.conv_channels) == (6, 2 * 8 + 30)
    assert (kda.decay_bottleneck, kda.gate_bottleneck) == (4, 5)
    assert MlaConfig(num_heads=1, nope_dim=10, rope_dim=3).query_dim == 13
    moe = MoeConfig(num_experts=2, experts_per_token=1, expert_dim=7, num_shared_experts=3)
    assert moe.shared_dim == 21


def test_a_part_that_no_layer_uses_may_be_left_out():
    config = ModelConfig(
        vocab_size=2, dim=2, num_layers=1, mlp_dim=2, mla_every=0, kda=KdaConfig(num_heads=1)
    )
    assert config.moe is None
    assert config.mla is None
