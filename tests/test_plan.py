"""The arithmetic of plan against figures that were counted by other means.

tests/model/test_plan_matches_modules.py holds it against the modules themselves.
"""

import dataclasses
import os
import subprocess
import sys

import pytest

from deltamoe.config import (
    KdaConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    preset,
)
from deltamoe.config.run import DataConfig
from deltamoe.plan import (
    activation_bytes,
    cache_bytes_per_token,
    flops_per_token,
    machine_memory,
    parameters,
    plan,
    state_bytes_per_sequence,
    weights,
)

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


def small(**changes):
    """A model whose sizes are all different, so that one cannot stand for another."""
    parts = {
        "kda": KdaConfig(num_heads=2, num_value_heads=4, key_dim=3, value_dim=5, decay_rank=7),
        "mla": MlaConfig(num_heads=3, latent_dim=11, nope_dim=6, rope_dim=2, value_dim=9),
        "moe": MoeConfig(num_experts=8, experts_per_token=2, expert_dim=13),
    }
    base = {"vocab_size": 50, "dim": 17, "num_layers": 4, "mlp_dim": 19, "first_dense_layers": 1}
    return ModelConfig(**(base | parts | changes))


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


def test_state_and_cache_by_hand():
    # 3 KDA layers: memory [4, 3, 5] fp32 and 3 inputs of 6 + 6 + 20 channels.
    assert state_bytes_per_sequence(small(), "bf16") == 3 * (4 * 60 + 2 * 3 * 32)
    assert state_bytes_per_sequence(small(), "fp32") == 3 * (4 * 60 + 4 * 3 * 32)
    assert cache_bytes_per_token(small(), "fp32") == 4 * (11 + 2)
    no_conv = dataclasses.replace(small().kda, conv_size=0)
    assert state_bytes_per_sequence(small(kda=no_conv)) == 3 * 4 * 60
    assert state_bytes_per_sequence(small(mla_every=1, kda=None)) == 0
    assert cache_bytes_per_token(small(mla_every=0, mla=None)) == 0


def test_a_part_that_no_layer_uses_costs_nothing():
    assert state_bytes_per_sequence(small(mla_every=1)) == 0
    assert cache_bytes_per_token(small(mla_every=0)) == 0
    assert flops_per_token(small(mla_every=0), context=10**6) == flops_per_token(
        small(mla_every=0, mla=None), context=0
    )


def test_flops_by_hand():
    matrices = 0
    for w in weights(small()):
        if len(w.shape) > 1 and w.name != "embedding.weight":
            matrices += 2 * w.active
    heads, K, V, C = 4, 3, 5, 64
    kda = 3 * heads * (6 * K * V + C * (2 * K + V) + C * C)
    # A token attends to 1 to 100 positions, 50.5 on average.
    mla = 3 * 2 * (6 + 2 + 9) * 50.5
    assert flops_per_token(small(), context=100) == matrices + kda + mla
    absorbed = 3 * 2 * (2 * 11 + 2) * 101
    next_token = matrices + 3 * heads * 6 * K * V + absorbed
    assert flops_per_token(small(), context=100, form="recurrent") == next_token
    # A tied matrix works as the head all the same.
    assert flops_per_token(small(tie_embeddings=True), context=9) == flops_per_token(
        small(), context=9
    )


def test_flops_of_the_chunk_form_are_the_papers():
    d, C = 128, 64
    chunk, recurrent = (flops_per_token(KIMI, context=0, form=f) for f in ("chunk", "recurrent"))
    expanded, absorbed = 192 + 128, 2 * (2 * 512 + 64)  # of one head and one position
    kda = 20 * 32 * (3 * C * d + C * C)  # beyond the 6 d^2 that both forms have
    assert chunk - recurrent == kda + 7 * 32 * (expanded - absorbed)


def run_of(model, **train):
    return RunConfig(
        model=model, data=DataConfig(context=16, rows=3), train=TrainConfig(steps=10, **train)
    )


def test_training_by_hand():
    run = run_of(small(), accumulate=2, precision="fp32")
    costs = plan(run, memory_bytes=1 << 30)
    total = parameters(small()).total
    biases = 3 * 8
    by_muon = sum(w.size for w in weights(small()) if w.optimizer == "muon")
    moments = 2 * (total - biases) - by_muon
    assert 0 < by_muon < total
    assert costs.training.tokens_per_step == 96
    assert costs.training.tokens == 960
    assert costs.training.flops == 3 * 960 * flops_per_token(small(), context=16)
    assert costs.training.weight_bytes == 4 * total
    assert costs.training.gradient_bytes == 4 * (total - biases)
    assert costs.training.optimizer_bytes == 4 * moments
    assert costs.training.checkpoint_bytes == 4 * (total + moments)
    assert costs.training.compute_copies == 0
    adamw = dataclasses.replace(run, optimizer=OptimizerConfig(name="adamw"))
    assert plan(adamw).training.optimizer_bytes == 8 * (total - biases)
    for precision in ("bf16", "auto"):  # what "auto" is on the machine that trains is not known
        copied = plan(run_of(small(), precision=precision)).training.compute_copies
        assert copied == 2 * (total - biases)


def test_training_total_is_the_sum_of_its_parts():
    for train in ({}, {"precision": "bf16"}, {"checkpoint_activations": True}):
        cost = plan(run_of(small(), **train)).training
        assert cost.total_bytes == (
            cost.weight_bytes + cost.gradient_bytes + cost.optimizer_bytes
            + cost.compute_copies + cost.activation_bytes
        )  # fmt: skip


def test_activations_grow_with_tokens_and_shrink_by_recomputing():
    nano = preset("nano")
    longer = dataclasses.replace(nano, data=dataclasses.replace(nano.data, rows=16))
    assert activation_bytes(longer) == 2 * activation_bytes(nano)
    saving = dataclasses.replace(nano.train, checkpoint_activations=True)
    assert activation_bytes(dataclasses.replace(nano, train=saving)) < activation_bytes(nano)
    in_bf16 = dataclasses.replace(nano.train, precision="bf16")
    assert activation_bytes(dataclasses.replace(nano, train=in_bf16)) < activation_bytes(nano)


def test_generation_and_the_verdict():
    run = run_of(small())
    needed = plan(run, dtype="bf16").generation.total_bytes
    weight_bytes = sum(w.size * (4 if w.is_fp32 else 2) for w in weights(small()))
    sequence = state_bytes_per_sequence(small()) + 16 * cache_bytes_per_token(small())
    assert needed == weight_bytes + sequence
    assert {w.name.split(".")[-1] for w in weights(small()) if w.is_fp32} == {
        "A_log", "dt_bias", "balance_bias",
    }  # fmt: skip
    assert plan(run, dtype="bf16", memory_bytes=needed).generation.fits
    assert not plan(run, dtype="bf16", memory_bytes=needed - 1).generation.fits
    roomy = plan(run, dtype="bf16", memory_bytes=weight_bytes + 3 * sequence)
    assert roomy.generation.sequences_that_fit == 3
    assert plan(run, memory_bytes=0).generation.sequences_that_fit == 0


def test_the_context_is_an_option():
    run = preset("kimi-linear-48b-a3b")
    short, long = plan(run, context=0), plan(run, context=1 << 20)
    assert short.generation.sequence_bytes == 43_417_600
    assert long.generation.sequence_bytes == 43_417_600 + (1 << 20) * 8_064
    assert long.flops_per_next_token > short.flops_per_next_token
    assert plan(run).context == run.data.context
    assert long.training == short.training  # it has its own context


def test_this_machines_memory_is_the_default():
    assert plan(preset("nano")).memory_bytes == machine_memory() > 1 << 28


def test_a_thousand_layers_are_a_thousand_times_one():
    assert parameters(small(num_layers=1000)).by_layer[1:3] == parameters(small()).by_layer[1:3]
    deep = parameters(small(num_layers=1000, mla_every=1, first_dense_layers=0))
    assert len(set(deep.by_layer)) == 1
    assert deep.total == 1000 * deep.by_layer[0] + 2 * 50 * 17 + 17


def test_plan_does_not_import_torch():
    code = "import deltamoe.plan, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_container_has_less_memory_than_its_machine(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("deltamoe.plan._CONTAINER_LIMITS", (tmp_path / "none", limit))
    limit.write_text("max\n")
    whole = machine_memory()
    limit.write_text("1048576\n")
    assert machine_memory() == 1048576 < whole
