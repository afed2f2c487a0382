"""The list of weights against figures that were counted by other means.

tests/model/test_plan_matches_modules.py holds it against the modules themselves.
"""

import dataclasses
import os
import subprocess
import sys

import pytest

from deltamoe.config import KdaConfig, preset
from deltamoe.plan import cache_bytes_per_token, parameters, state_bytes_per_sequence, weights
from tests.plan.small import small

KIMI = preset("kimi-linear-48b-a3b").model


def sizes(config, prefix):
    return {
        w.name.removeprefix(prefix): w.size for w in weights(config) if w.name.startswith(prefix)
    }


def test_the_released_model():
    counted = parameters(KIMI)
    # The published checkpoint's 98,245,528,576 bytes are 2 a parameter and 2 more for each of the
    # 82,560 that it keeps in fp32.
    assert counted.total == 49_122_681_728
    assert counted.total * 2 + 2 * (20 * 32 + 20 * 4096) == 98_245_528_576
    assert counted.active == 3_484_459_904
    assert counted.active_without_embeddings == 3_484_459_904 - 2 * 377_487_360
    assert sum(counted.by_part.values()) == counted.total
    assert sum(counted.by_layer) == counted.total - 2 * 377_487_360 - 2304
    assert state_bytes_per_sequence(KIMI) == 43_417_600
    assert cache_bytes_per_token(KIMI) == 8_064


@pytest.mark.parametrize(
    ("prefix", "size"),
    [
        ("blocks.0.mixer.", 39_514_272),
        ("blocks.3.mixer.", 29_114_880),
        ("blocks.0.channel.", 63_700_992),
        ("blocks.1.channel.", 1_819_607_296),
        ("embedding.", 377_487_360),
        ("head.", 377_487_360),
    ],
)
def test_the_released_models_layers(prefix, size):
    assert sum(sizes(KIMI, prefix).values()) == size


def test_the_balance_biases_are_counted():
    without = dataclasses.replace(KIMI, moe=dataclasses.replace(KIMI.moe, has_balance_bias=False))
    assert parameters(KIMI).total - parameters(without).total == 6_656
    assert parameters(KIMI).active - parameters(without).active == 6_656


def test_grouped_values_change_the_values_side_only():
    assert sizes(small(), "blocks.0.mixer.") == {
        "q_proj.weight": 6 * 17,
        "k_proj.weight": 6 * 17,
        "v_proj.weight": 20 * 17,
        "q_conv.weight": 6 * 4,
        "k_conv.weight": 6 * 4,
        "v_conv.weight": 20 * 4,
        "A_log": 4,
        "dt_bias": 12,
        "decay_down.weight": 7 * 17,
        "decay_up.weight": 12 * 7,
        "beta_proj.weight": 4 * 17,
        "output_gate_down.weight": 5 * 17,
        "output_gate_up.weight": 20 * 5,
        "output_norm.weight": 5,
        "o_proj.weight": 17 * 20,
    }


def test_parts_that_a_variant_leaves_out():
    bare = KdaConfig(num_heads=2, key_dim=3, value_dim=5, conv_size=0, output_gate="none")
    names = set(sizes(small(kda=bare), "blocks.0.mixer."))
    assert names == {
        "q_proj.weight", "k_proj.weight", "v_proj.weight", "A_log", "dt_bias", "decay_down.weight",
        "decay_up.weight", "beta_proj.weight", "output_norm.weight", "o_proj.weight",
    }  # fmt: skip
    assert "head.weight" not in sizes(small(tie_embeddings=True), "")
    tied = parameters(small(tie_embeddings=True))
    assert tied.total == parameters(small()).total - 50 * 17
    assert tied.active_without_embeddings == parameters(small()).active_without_embeddings


def test_a_query_bottleneck():
    mla = dataclasses.replace(small().mla, query_rank=10)
    found = sizes(small(mla=mla), "blocks.3.mixer.")
    assert "q_proj.weight" not in found
    assert (found["q_down.weight"], found["q_norm.weight"]) == (10 * 17, 10)
    assert found["q_up.weight"] == 24 * 10


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"router.weight": 136, "router.balance_bias": 8, "experts": 3 * 8 * 221,
              "shared_expert": 3 * 221}),
        ({"expert": "ffn", "num_shared_experts": 2}, {"router.weight": 136,
         "router.balance_bias": 8, "experts": 2 * 8 * 221, "shared_expert": 2 * 2 * 221}),
        ({"num_shared_experts": 0, "has_balance_bias": False}, {"router.weight": 136,
         "experts": 3 * 8 * 221}),
        ({"has_noisy_topk": True, "capacity_factor": 1.25}, {"router.weight": 136,
         "router.balance_bias": 8, "router.noise_proj.weight": 136, "experts": 3 * 8 * 221,
         "shared_expert": 3 * 221}),
    ],
)  # fmt: skip
def test_a_sparse_channel(changes, expected):
    found = {}
    for name, size in sizes(
        small(moe=dataclasses.replace(small().moe, **changes)), "blocks.1.channel."
    ).items():
        key = name if name.startswith("router") else name.split(".")[0]
        found[key] = found.get(key, 0) + size
    assert found == expected


def test_a_token_uses_its_own_experts_only():
    active = {w.name: w.active for w in weights(small()) if w.layer == 1}
    assert active["blocks.1.channel.experts.w_down"] == 2 * 13 * 17
    assert active["blocks.1.channel.shared_expert.w_down.weight"] == 13 * 17
    assert active["blocks.1.channel.router.weight"] == 8 * 17


def test_a_thousand_layers_are_a_thousand_times_one():
    assert parameters(small(num_layers=1000)).by_layer[1:3] == parameters(small()).by_layer[1:3]
    deep = parameters(small(num_layers=1000, mla_every=1, first_dense_layers=0))
    assert len(set(deep.by_layer)) == 1
    assert deep.total == 1000 * deep.by_layer[0] + 2 * 50 * 17 + 17


def test_plan_does_not_import_torch():
    code = "import deltamoe.plan, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
