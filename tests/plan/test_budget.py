"""What a run costs as a whole, and whether it fits."""

import dataclasses

from deltamoe.config import OptimizerConfig, preset
from deltamoe.plan import (
    cache_bytes_per_token,
    flops_per_token,
    machine_memory,
    parameters,
    plan,
    state_bytes_per_sequence,
    weights,
)
from tests.plan.small import run_of, small


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


def test_a_container_has_less_memory_than_its_machine(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("deltamoe.plan.budget._CONTAINER_LIMITS", (tmp_path / "none", limit))
    limit.write_text("max\n")
    whole = machine_memory()
    limit.write_text("1048576\n")
    assert machine_memory() == 1048576 < whole
