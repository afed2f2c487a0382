"""One step: its arithmetic, its resumption bit for bit, and what it does with a NaN."""

import math
import subprocess
import sys

import pytest
import torch

from deltamoe.checkpoint import open_checkpoint
from deltamoe.config import RunConfig
from deltamoe.errors import CheckpointError, ConfigError
from deltamoe.plan import weights
from deltamoe.testing import tiny_config
from deltamoe.training.nonfinite import StepNotFiniteError
from deltamoe.training.optimizer import rule_for
from deltamoe.training.trainer import Trainer


def restarted(trainer: Trainer, config: RunConfig, data, folder) -> Trainer:
    """Another trainer, that knows of the first only what is on the disk."""
    saved = trainer.save(folder, record={})
    return Trainer(config, data, checkpoint=open_checkpoint(saved.path))


def assert_same_future(a: Trainer, b: Trainer, *, num_steps: int) -> None:
    for _ in range(num_steps):
        one, other = a.train_step(), b.train_step()
        assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
        assert {k: v.tolist() for k, v in one.counts.items()} == {
            k: v.tolist() for k, v in other.counts.items()
        }
    before, after = a.tensors(), b.tensors()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    assert a.loader.position == b.loader.position
    assert a.num_tokens == b.num_tokens


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": {"name": "adamw"}},
        {"train": {"accumulate": 3}},
        {"train": {"accumulate": 2, "precision": "bf16"}},
        {"data": {"rows": 25}},  # passes the end of an epoch
        {"balance": {"bias_update": "sign", "load_balance_loss": 1e-2}},
        {"train": {"checkpoint_activations": True}},
    ],
    ids=["muon", "adamw", "accumulate", "bf16", "epoch", "sign", "recompute"],
)
def test_a_restored_run_has_the_same_future(changes, config, data, tmp_path):
    run = config(**changes)
    trainer = Trainer(run, data)
    for _ in range(3):
        trainer.train_step()
    assert_same_future(trainer, restarted(trainer, run, data, tmp_path), num_steps=3)


def test_router_noise_is_a_function_of_the_step(config, data, tmp_path):
    moe = tiny_config().moe
    noisy = type(moe)(
        num_experts=5, experts_per_token=2, expert_dim=16, has_noisy_topk=True, router_jitter=0.1
    )
    run = config(model={"moe": noisy})
    trainer = Trainer(run, data)
    trainer.train_step()
    other = restarted(trainer, run, data, tmp_path)
    torch.rand(7)  # whatever else draws from the generator between two steps changes nothing
    assert_same_future(trainer, other, num_steps=2)


def test_the_fastest_dtype_stays_with_the_run(config, data, tmp_path, monkeypatch):
    monkeypatch.setattr("deltamoe.training.trainer.fastest_dtype", lambda device: torch.bfloat16)
    run = config(train={"precision": "auto"})
    trainer = Trainer(run, data)
    trainer.train_step()
    monkeypatch.setattr("deltamoe.training.trainer.fastest_dtype", lambda device: torch.float32)
    other = restarted(trainer, run, data, tmp_path)
    assert other.optimizer.newton_schulz_dtype == torch.bfloat16
    assert other.forward_dtype == torch.bfloat16
    assert Trainer(run, data).forward_dtype == torch.float32
    named = config(train={"precision": "bf16"})
    assert Trainer(named, data).forward_dtype == torch.bfloat16


def test_cutting_a_step_into_micro_batches_changes_only_rounding(config, data):
    # The losses that look across tokens of a micro-batch are switched off: those do change.
    off = {"sequence_balance_loss": 0.0, "z_loss": 0.0}
    whole = Trainer(config(balance=off, data={"rows": 4}), data)
    parts = Trainer(config(balance=off, data={"rows": 1}, train={"accumulate": 4}), data)
    for _ in range(2):
        one, four = whole.train_step(), parts.train_step()
        # fp32 sums of a few hundred terms in another order
        assert four.loss == pytest.approx(one.loss, rel=1e-5)
        assert four.grad_norm == pytest.approx(one.grad_norm, rel=1e-3)
        assert four.num_tokens == one.num_tokens
        assert {k: v.tolist() for k, v in four.counts.items()} == {
            k: v.tolist() for k, v in one.counts.items()
        }


def test_recomputing_activations_changes_nothing(config, data):
    kept = Trainer(config(), data)
    recomputed = Trainer(config(train={"checkpoint_activations": True}), data)
    assert_same_future(kept, recomputed, num_steps=2)


@pytest.mark.slow
def test_compiled_parts_compute_the_same():
    # In a process of its own, for the compiler cannot see through the checks of jaxtyping.
    program = (
        "from tests.training.conftest import make_config, make_data\n"
        "from deltamoe.training.trainer import Trainer\n"
        "for is_compiled in (False, True):\n"
        "    config = make_config(train={'compile': is_compiled})\n"
        "    print(Trainer(config, make_data()).train_step().loss)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plain, compiled = map(float, done.stdout.split())
    assert compiled == pytest.approx(plain, rel=1e-5)  # fp32, fused in another order


def test_training_learns(config, data):
    trainer = Trainer(config(train={"steps": 20}), data)
    losses = [trainer.train_step().loss for _ in range(20)]
    assert losses[0] == pytest.approx(math.log(257), rel=0.2)
    assert losses[-1] < 0.7 * losses[0]


def test_the_bias_moves_against_the_load(config, data):
    trainer = Trainer(config(balance={"bias_rate": 0.5}), data)
    report = trainer.train_step()
    for layer, counts in report.counts.items():
        bias = trainer.model.get_buffer(f"blocks.{layer}.channel.router.balance_bias")
        assert bias[counts.argmax()] < bias[counts.argmin()]


def test_every_weight_of_a_model_is_optimized_as_the_plan_says(config, data):
    trainer = Trainer(config(), data)
    planned = {w.name: w.optimizer for w in weights(trainer.config.model) if w.optimizer != "none"}
    assert planned == {name: rule_for(name).method for name, _ in trainer.model.named_parameters()}


def test_a_module_that_answers_nan_is_named_and_nothing_is_updated(config, data):
    trainer = Trainer(config(), data)
    trainer.train_step()
    weight = trainer.model.get_parameter("blocks.1.mixer.v_proj.weight")
    with torch.no_grad():
        weight[0, 0] = math.nan
    before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    with pytest.raises(
        StepNotFiniteError, match=r"blocks\.1\.mixer\.v_proj \(micro-batch 0\)"
    ) as e:
        trainer.train_step()
    assert e.value.details["step"] == 2
    assert len(e.value.details["batches"]) == 1
    for name, tensor in trainer.tensors().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name


def test_an_infinite_decay_is_named(config, data):
    trainer = Trainer(config(), data)
    with torch.no_grad():
        trainer.model.get_parameter("blocks.2.mixer.A_log").fill_(math.nan)
    with pytest.raises(StepNotFiniteError, match=r"blocks\.2\.mixer"):
        trainer.train_step()


def test_a_nan_gradient_in_one_expert_is_named(config, data):
    trainer = Trainer(config(), data)

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[3, 0, 0] = math.inf
        return gradient

    trainer.model.get_parameter("blocks.2.channel.experts.w_up").register_hook(poison)
    with pytest.raises(StepNotFiniteError, match=r"w_up \(expert 3\)"):
        trainer.train_step()


def test_weights_that_are_not_finite_are_never_saved(config, data, tmp_path):
    trainer = Trainer(config(), data)
    with torch.no_grad():
        trainer.model.get_parameter("head.weight")[3, 2] = math.inf
    with pytest.raises(CheckpointError, match=r"head\.weight"):
        trainer.save(tmp_path, record={})
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(config, data):
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 200"):
        Trainer(config(model={"vocab_size": 200}), data)
