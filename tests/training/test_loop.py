"""A run from its first step to its last, through every kind of interruption."""

import json
import math
import shutil

import pytest
import torch

from deltamoe.checkpoint import lock_run, newest_checkpoint, read_tensors, step_folders
from deltamoe.data import PreparedData
from deltamoe.errors import (
    CheckpointError,
    ConfigError,
    DoesNotFitError,
    Interrupted,
    NonFiniteError,
    RunInUseError,
)
from deltamoe.training import loop
from deltamoe.training.loop import train
from deltamoe.training.metrics import read_metrics
from deltamoe.training.progress import Progress
from deltamoe.training.signals import StopRequest
from deltamoe.training.trainer import Trainer

TIMES = {"seconds", "tokens_per_s", "matmul_fraction"}  # what no two runs share


@pytest.fixture(scope="session")
def run(data):
    """Train; keyword arguments of ``train`` pass through."""

    def run(config, folder, *, data=data, stop=None, **options):
        stop = StopRequest() if stop is None else stop
        with Progress(every=1e9) as progress:
            return train(config, folder, data, stop=stop, progress=progress, **options)

    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The uninterrupted run of six steps."""
    from tests.training.conftest import make_config

    folder = tmp_path_factory.mktemp("whole") / "run"
    run(make_config(), folder)
    return folder


def records(folder) -> list[dict]:
    return [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def assert_same_run(folder, other) -> None:
    assert records(folder) == records(other)
    one, two = newest_checkpoint(folder), newest_checkpoint(other)
    assert one.step == two.step
    for name in ("model.safetensors", "optimizer.safetensors"):
        before, after = read_tensors(one.file(name)), read_tensors(two.file(name))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name


def test_a_run_leaves_one_line_a_step_and_its_newest_checkpoints(whole):
    written = records(whole)
    assert [record["step"] for record in written] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(record["loss"]) for record in written)
    assert [r["step"] for r in written if "validation_bits_per_byte" in r] == [2, 4, 6]
    assert written[5]["validation_tokens"] > written[3]["validation_tokens"]  # the last reads all
    assert [folder.name for folder in step_folders(whole)] == ["step-4", "step-6"]
    names = {path.name for path in whole.iterdir()}
    assert names >= {"config.json", "tokenizer.json", "data.json", "README.md", "metrics.jsonl"}
    assert {path.name for path in (whole / "checkpoints" / "step-6").iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "train_state.json",
        "config.json",
        "tokenizer.json",
        "manifest.json",
    }
    assert f"deltamoe train --resume {whole}" in (whole / "README.md").read_text()


def test_a_record_holds_what_the_balance_needs(whole):
    record = records(whole)[0]
    assert record["load"].keys() == record["max_vio"].keys() == {"1", "2", "3"}
    tokens = 4 * 24
    assert all(sum(load) == 2 * tokens for load in record["load"].values())
    assert record["half_life"].keys() == record["memory_norm"].keys() == {"0", "1", "2"}
    assert record["tokens"] == tokens


def test_two_halves_are_the_whole(run, whole, config, tmp_path):
    run(config(train={"stop_at": 3}), tmp_path / "run")
    assert newest_checkpoint(tmp_path / "run").step == 3
    run(config(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_a_crash_between_checkpoints_lives_its_steps_again(run, whole, config, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step-6")
    run(config(), folder, resume=True)
    assert_same_run(folder, whole)


def test_a_crash_between_a_checkpoint_and_its_record_leaves_no_gap(run, whole, config, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    path = folder / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    run(config(), folder, resume=True)
    assert_same_run(folder, whole)


def test_a_damaged_checkpoint_is_passed_over(run, whole, config, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "checkpoints" / "step-6" / "model.safetensors").write_bytes(b"torn")
    run(config(), folder, resume=True)
    assert_same_run(folder, whole)


def test_a_run_may_be_made_longer(run, config, tmp_path):
    constant = {"schedule": "constant"}
    run(config(optimizer=constant, train={"steps": 4}), tmp_path / "a")
    run(config(optimizer=constant, train={"steps": 6}), tmp_path / "a", resume=True)
    run(config(optimizer=constant, train={"steps": 6}), tmp_path / "b")
    losses = [[r["loss"] for r in records(tmp_path / name)] for name in ("a", "b")]
    assert losses[0] == losses[1]


def test_resuming_a_finished_run_changes_nothing(run, whole, config, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    run(config(), folder, resume=True)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("where", ["train_step", "save", "validate", "sample"])
def test_a_signal_anywhere_saves_and_can_be_resumed(
    where, run, whole, config, tmp_path, monkeypatch
):
    folder, stop = tmp_path / "run", StopRequest()
    owner = Trainer if hasattr(Trainer, where) else loop
    original = getattr(owner, where, lambda model, step: "text")

    def signalled(*arguments, **options):
        stop.name = "SIGTERM"
        return original(*arguments, **options)

    sampler = signalled if where == "sample" else None
    with monkeypatch.context() as patch:
        if where != "sample":
            patch.setattr(owner, where, signalled)
        with pytest.raises(Interrupted, match=f"deltamoe train --resume {folder}"):
            run(config(train={"sample_every": 2}), folder, stop=stop, sampler=sampler)
    step = newest_checkpoint(folder).step
    assert step == (1 if where == "train_step" else 2)
    assert [r["step"] for r in records(folder)] == list(range(1, step + 1))
    run(config(), folder, resume=True)
    assert [r["loss"] for r in records(folder)] == [r["loss"] for r in records(whole)]


def test_an_interrupted_last_validation_is_made_up_for(run, whole, config, tmp_path):
    folder, stop = tmp_path / "run", StopRequest()
    shutil.copytree(whole, folder)
    path = folder / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    stop.name = "SIGTERM"
    with pytest.raises(Interrupted):
        run(config(), folder, stop=stop, resume=True)
    assert "validation_bits_per_byte" not in records(folder)[-1]
    run(config(), folder, resume=True)
    assert_same_run(folder, whole)


def test_samples_are_taken_at_their_steps(run, config, tmp_path):
    asked = []

    def sampler(model, step):
        asked.append((step, model.training, torch.is_grad_enabled()))
        return f"text of {step}"

    run(config(train={"steps": 4, "sample_every": 2}), tmp_path / "run", sampler=sampler)
    assert asked == [(2, False, False), (4, False, False)]
    assert [r.get("sample") for r in records(tmp_path / "run")] == [
        None,
        "text of 2",
        None,
        "text of 4",
    ]


def test_a_folder_with_a_run_is_refused_without_resume(run, whole, config):
    with pytest.raises(ConfigError, match=f"deltamoe train --resume {whole}"):
        run(config(), whole)


def test_a_folder_with_other_things_is_refused(run, config, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not empty"):
        run(config(), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model": {"dim": 32}}, "model.dim"),
        ({"train": {"seed": 1}}, "train.seed"),
        ({"data": {"rows": 2}}, "data.rows"),
        ({"train": {"steps": 5}}, "train.steps = 5"),
    ],
)
def test_what_a_resumed_run_may_not_change_is_named(changes, key, run, whole, config):
    with pytest.raises(ConfigError, match=key):
        run(config(**changes), whole, resume=True)


def test_other_data_is_refused(run, whole, config):
    other = PreparedData.in_memory(["Another text, long enough for a row or two."], ["Held out."])
    with pytest.raises(CheckpointError, match="other data"):
        run(config(), whole, data=other, resume=True)


def test_a_second_trainer_is_refused(run, config, tmp_path):
    with lock_run(tmp_path), pytest.raises(RunInUseError, match="pid"):
        run(config(), tmp_path)


def full_disk(trainer, *arguments, **options):
    raise DoesNotFitError("step-2: does not fit on the disk")


def test_a_full_disk_stops_by_default(run, config, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "save", full_disk)
    with pytest.raises(DoesNotFitError, match="does not fit"):
        run(config(), tmp_path / "run")
    assert [r["step"] for r in records(tmp_path / "run")] == [1]


def test_a_full_disk_may_be_warned_about(run, whole, config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "save", full_disk)
    run(config(train={"on_full_disk": "warn"}), tmp_path / "run")
    assert records(tmp_path / "run") == records(whole)
    assert step_folders(tmp_path / "run") == []
    assert capsys.readouterr().err.count("Training goes on without it") == 3


def test_too_little_room_is_said_before_the_first_step(run, config, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DoesNotFitError, match="3 more checkpoints"):
        run(config(), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_sample_that_fails_does_not_stop_training(run, whole, config, tmp_path, capsys):
    def sampler(model, step):
        raise NonFiniteError("the logits are not finite")

    run(config(train={"sample_every": 2}), tmp_path / "run", sampler=sampler)
    assert records(tmp_path / "run") == records(whole)
    assert "no sample: the logits are not finite" in capsys.readouterr().err


def test_a_nan_stops_before_the_update_and_leaves_a_note(run, config, tmp_path, monkeypatch):
    original = Trainer.train_step

    def poisoned(trainer):
        if trainer.step == 2:
            with torch.no_grad():
                trainer.model.get_parameter("blocks.0.channel.w_up.weight")[0] = math.nan
        return original(trainer)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    with pytest.raises(NonFiniteError, match=r"blocks\.0\.channel"):
        run(config(), tmp_path / "run")
    note = json.loads((tmp_path / "run" / "nonfinite-step-3.json").read_text())
    assert "blocks.0.channel" in note["first_not_finite"]
    assert len(note["batches"][0]) == 64  # the batch's SHA-256
    assert newest_checkpoint(tmp_path / "run").step == 2


def test_out_of_memory_says_what_to_lower(run, config, tmp_path, monkeypatch):
    def exhausted(trainer):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(Trainer, "train_step", exhausted)
    with pytest.raises(DoesNotFitError, match=r"data\.rows"):
        run(config(), tmp_path / "run")


def test_keep_every_keeps_for_good(run, config, tmp_path):
    run(config(train={"checkpoint_every": 1, "keep_every": 3, "steps": 5}), tmp_path / "run")
    assert [f.name for f in step_folders(tmp_path / "run")] == ["step-3", "step-4", "step-5"]
