"""``deltamoe train`` from outside: exit codes, signals, sudden death, and the same run after it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deltamoe.checkpoint import newest_checkpoint, read_tensors, step_folders
from deltamoe.cli import main
from deltamoe.config import RunConfig, TrainConfig, to_json
from deltamoe.config.run import DataConfig, OptimizerConfig
from deltamoe.testing import tiny_config
from deltamoe.training.metrics import read_metrics

STEPS = 12


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A config.json of a tiny run on a small text."""
    folder = tmp_path_factory.mktemp("project")
    text = folder / "text"
    text.mkdir()
    for i in range(6):
        (text / f"{i}.txt").write_text(f"The {i}th sheep jumps over the fence. " * 20)
    run = RunConfig(
        model=tiny_config(init_std=0.1),
        data=DataConfig(path=str(text), context=16, rows=2, cache=str(folder / "cache")),
        optimizer=OptimizerConfig(warmup_steps=2),
        # one thread: a busy machine makes two wait for each other
        train=TrainConfig(steps=STEPS, checkpoint_every=3, validate_every=0, threads=1),
    )
    path = folder / "tiny.json"
    path.write_text(to_json(run))
    return path


@pytest.fixture(autouse=True)
def _threads_of_others():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    """The uninterrupted run, in a process of its own."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = subprocess.run(
        program(config, "--out", run), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return run


def program(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "deltamoe", "train", *map(str, arguments)]


def started(*arguments: object) -> "subprocess.Popen[bytes]":
    """A training process whose steps are slow enough to be caught in one."""
    slow = (
        "import sys, time\n"
        "from deltamoe.cli import main\n"
        "from deltamoe.training.trainer import Trainer\n"
        "step = Trainer.train_step\n"
        "Trainer.train_step = lambda self: (time.sleep(0.05), step(self))[1]\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", slow, "train", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def wait_until(is_so: Callable[[], bool], *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def num_steps(run: Path) -> int:
    return len(read_metrics(run / "metrics.jsonl"))


def assert_same_result(run: Path, other: Path) -> None:
    losses = [[r["loss"] for r in read_metrics(f / "metrics.jsonl")] for f in (run, other)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
    for name in ("model.safetensors", "optimizer.safetensors"):
        before, after = (read_tensors(newest_checkpoint(f).file(name)) for f in (run, other))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")]
)
def test_a_signal_saves_exits_75_and_a_new_process_goes_on(number, name, config, whole, tmp_path):
    run = tmp_path / "run"
    process = started(config, "--out", run)
    wait_until(lambda: num_steps(run) >= 4)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert f"stopped by {name}".encode() in stderr
    assert newest_checkpoint(run).step == num_steps(run) < STEPS
    done = subprocess.run(program("--resume", run), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same_result(run, whole)


@pytest.mark.parametrize("after", [0, 5])
def test_kill_9_loses_at_most_the_steps_since_the_last_checkpoint(after, config, whole, tmp_path):
    run = tmp_path / "run"
    process = started(config, "--out", run)
    wait_until(lambda: num_steps(run) >= after and (run / "config.json").exists())
    process.kill()
    process.communicate()
    assert not step_folders(run) or newest_checkpoint(run).step >= num_steps(run) - 3
    # The same command may be repeated until it says 0, as batch systems do.
    done = subprocess.run(
        program(config, "--out", run, "--resume"), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert_same_result(run, whole)


def test_death_while_a_checkpoint_is_written_harms_no_older_one(config, whole, tmp_path):
    run = tmp_path / "run"
    dying = (
        "import os, sys\n"
        "from deltamoe.checkpoint import folder\n"
        "from deltamoe.cli import main\n"
        "write = folder._write\n"
        "def die(place, name, writer):\n"
        "    if 'step-6' in place.name and name == 'optimizer.safetensors':\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return write(place, name, writer)\n"
        "folder._write = die\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", dying, "train", str(config), "--out", str(run)]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == -9
    assert newest_checkpoint(run).step == 3
    assert main(["train", "--resume", str(run)]) == 0
    assert_same_result(run, whole)
    assert not list((run / "checkpoints").glob(".*"))


def test_what_is_told_at_the_start(config, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(config), "--out", str(run), "train.steps=1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["step"] == 1
    for part in ("parameters", "active", "FLOP", "fp32", "tokens", "5-gram", "bits/byte"):
        assert part in err


def test_dry_run_leaves_nothing(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(config), "--dry-run"]) == 0
    err = capsys.readouterr().err
    assert "a step took" in err
    assert "of memory at most" in err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["{whole}/config.json", "--out", "{whole}"], "--resume"),
        (["{config}"], "--out"),
        (["{config}", "--out", "x", "train.stepz=3"], "train.steps"),
        (["--resume", "{tmp}/nothing"], "nothing"),
        (["--resume", "{whole}", "model.dim=48"], "model.dim"),
        (["--resume", "{whole}", "train.steps=3"], "step 12 already"),
    ],
)
def test_what_cannot_work_is_said_in_words(arguments, complaint, config, whole, tmp_path, capsys):
    given = [a.format(whole=whole, config=config, tmp=tmp_path) for a in arguments]
    assert main(["train", *given]) == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert "Traceback" not in err


def test_changed_text_is_refused(config, whole, capsys):
    text = config.with_name("text") / "5.txt"
    before = text.read_text()
    text.write_text(before + "One more sheep.")
    try:
        assert main(["train", "--resume", str(whole)]) == 3
    finally:
        text.write_text(before)
    assert "other data" in capsys.readouterr().err


def test_a_signal_during_preparation_is_obeyed_there(config, tmp_path, monkeypatch):
    def prepare(config, *, progress):
        os.kill(os.getpid(), signal.SIGTERM)
        progress("tokenising", 0, 100)
        raise AssertionError("it went on")

    monkeypatch.setattr("deltamoe.data.prepare", prepare)
    assert main(["train", str(config), "--out", str(tmp_path / "run")]) == 75


def test_samples_are_written_on_the_way(config, tmp_path):
    run = tmp_path / "run"
    arguments = ["train.steps=2", "train.sample_every=2", "train.sample_prompt=The"]
    assert main(["train", str(config), "--out", str(run), *arguments]) == 0
    first, second = read_metrics(run / "metrics.jsonl")
    assert "sample" not in first
    assert second["sample"].startswith("The")
