"""Training runs as the page follows them: torn tails, thinning, events."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deltamoe.checkpoint import write_run_config
from deltamoe.checkpoint.lock import LOCK, lock_run
from deltamoe.config import RunConfig, TrainConfig
from deltamoe.errors import ConfigError, DataError
from deltamoe.explorer import runs
from deltamoe.explorer.runs import list_runs, read_run, runs_folder
from deltamoe.testing import tiny_config

CONFIG = RunConfig(model=tiny_config(), train=TrainConfig(steps=1000, checkpoint_every=20))


def line(step: int, **more: Any) -> str:
    return json.dumps({"format": 1, "step": step, "loss": 5.0 / step, **more}) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "a"
    run.mkdir()
    write_run_config(run, CONFIG)
    more = {20: {"validation_bits_per_byte": 2.5}, 40: {"sample": "<b>text"}}
    lines = [line(step, **more.get(step, {})) for step in range(1, 51)]
    (run / "metrics.jsonl").write_text("".join(lines))
    (run / "checkpoints" / "step-40").mkdir(parents=True)
    return tmp_path


def test_a_run_is_read_from_its_files(folder: Path) -> None:
    found = read_run(folder, "a")
    assert [record["step"] for record in found["records"]] == list(range(1, 51))
    assert found["is_anew"]
    assert not found["has_more"]
    assert found["config"]["model"]["dim"] == 24
    assert [(event["step"], event["kind"], event["text"]) for event in found["events"]] == [
        (20, "validation", "2.500 bits/byte"),
        (40, "checkpoint", "step-40"),
        (40, "sample", "<b>text"),
    ]


def test_stops_and_faults_are_seen_in_the_folder(folder: Path) -> None:
    """Checkpoints come every 20 steps; one at 33 was a stop."""
    (folder / "a" / "checkpoints" / "step-33").mkdir()
    (folder / "a" / "nonfinite-step-51.json").write_text("{}")
    (folder / "a" / "checkpoints" / "step-x").mkdir()
    kinds = [(event["step"], event["kind"]) for event in read_run(folder, "a")["events"]]
    assert (33, "stop") in kinds
    assert (34, "resume") in kinds
    assert (51, "nan") in kinds
    assert kinds == sorted(kinds)


def test_only_what_is_new_is_sent_and_a_torn_line_waits(folder: Path) -> None:
    metrics = folder / "a" / "metrics.jsonl"
    first = read_run(folder, "a")
    torn = line(51)
    with open(metrics, "a") as file:
        file.write(torn[:20])
    found = read_run(folder, "a", cursor=first["next"])
    assert found["records"] == []
    assert found["next"] == first["next"]
    assert not found["is_anew"]
    with open(metrics, "a") as file:
        file.write(torn[20:] + "garbage\n" + line(52, sample="text"))
    found = read_run(folder, "a", cursor=found["next"])
    assert [record["step"] for record in found["records"]] == [51, 52]
    assert [event["kind"] for event in found["events"]] == ["checkpoint", "sample"]
    assert read_run(folder, "a", cursor=found["next"])["records"] == []


def test_no_byte_is_read_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the answers' size, together they are the file; what is left is told of."""
    monkeypatch.setattr(runs, "_MOST_BYTES", 700)
    found, cursor, has_more = [], None, True
    while has_more:
        answer = read_run(folder, "a", cursor=cursor)
        assert answer["is_anew"] == (cursor is None)
        found += [record["step"] for record in answer["records"]]
        cursor, has_more = answer["next"], answer["has_more"]
    assert found == list(range(1, 51))


def test_a_run_that_was_cut_back_is_read_anew(folder: Path) -> None:
    """Resuming rewrites the file up to the checkpoint, and lives the steps behind it again."""
    metrics = folder / "a" / "metrics.jsonl"
    cursor = read_run(folder, "a")["next"]
    kept = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(kept))  # another file with the same text: nothing is new
    found = read_run(folder, "a", cursor=cursor)
    assert (found["is_anew"], found["records"]) == (False, [])
    metrics.write_text("".join(kept[:40]))
    found = read_run(folder, "a", cursor=cursor)
    assert found["is_anew"]
    assert [record["step"] for record in found["records"]] == list(range(1, 41))
    again = [line(step, seconds=2.0) for step in range(41, 61)]
    metrics.write_text("".join([*kept[:40], *again]))
    found = read_run(folder, "a", cursor=cursor)
    assert found["is_anew"]
    assert len(found["records"]) == 60


def test_who_trains_is_known_by_the_lock(folder: Path) -> None:
    run = folder / "a"
    with lock_run(run):
        os.utime(run / "metrics.jsonl", (0, 0))  # however long a step takes
        assert read_run(folder, "a")["is_running"]
        assert list_runs(folder)[0]["is_running"]
    os.utime(run / "metrics.jsonl")
    assert not read_run(folder, "a")["is_running"]
    with lock_run(run):  # asking took nothing away
        pass
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (run / LOCK).write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname()}))
    assert not read_run(folder, "a")["is_running"]


@pytest.mark.parametrize("lock", [None, "", "[]", '{"host": "elsewhere", "pid": 1}', "{}"])
def test_a_run_of_another_machine_is_known_by_its_file(folder: Path, lock: str | None) -> None:
    run = folder / "a"
    if lock is not None:
        (run / LOCK).write_text(lock)
    assert read_run(folder, "a")["is_running"]
    os.utime(run / "metrics.jsonl", (0, 0))
    assert not read_run(folder, "a")["is_running"]
    with open(run / "metrics.jsonl", "a") as file:
        file.write(line(1000))
    assert not read_run(folder, "a")["is_running"]  # its last step


def test_thinning_keeps_extremes_and_events(folder: Path) -> None:
    metrics = folder / "a" / "metrics.jsonl"
    lines = [line(step) for step in range(1, 3001)]
    lines[1233] = line(1234, loss=99.0)
    lines[2000] = line(2001, validation_bits_per_byte=2.0)
    metrics.write_text("".join(lines))
    found = read_run(folder, "a", points=100)
    steps = [record["step"] for record in found["records"]]
    assert found["num_records"] == 3000
    assert len(steps) <= 110
    assert {1, 1234, 2001, 3000} <= set(steps)
    assert steps == sorted(steps)


def test_the_list_of_runs(folder: Path) -> None:
    (folder / "no run").mkdir()
    assert list_runs(folder, folder / "a")[0]["is_open"]
    [run] = list_runs(folder)
    assert (run["name"], run["step"], run["steps"]) == (
        "a",
        50,
        CONFIG.train.steps,
    )


def test_a_name_is_no_path(folder: Path) -> None:
    for name in ("../a", "", ".", "a/../a", "b", "a\0"):
        with pytest.raises(DataError, match="no run"):
            read_run(folder, name)


def test_bounds(folder: Path) -> None:
    with pytest.raises(ConfigError, match="points"):
        read_run(folder, "a", points=9)
    for cursor in ("", "5", "-1-00000000", "1-0", "1" * 30 + "-00000000", "x"):
        with pytest.raises(ConfigError, match="from"):
            read_run(folder, "a", cursor=cursor)
    assert read_run(folder, "a", cursor="999999999999-00000000")["is_anew"]


def test_which_folder_is_shown(folder: Path) -> None:
    assert runs_folder(folder / "a") == folder
    assert runs_folder(folder / "a" / "checkpoints" / "step-40") == folder
    assert runs_folder(folder) is None


def test_numbers_that_are_none_do_not_reach_the_page(folder: Path) -> None:
    """JSON has no NaN; a browser would refuse the whole answer."""
    cursor = read_run(folder, "a")["next"]
    with open(folder / "a" / "metrics.jsonl", "a") as file:
        file.write('{"step": 51, "loss": NaN, "grad_norm": Infinity}\n')
    [record] = read_run(folder, "a", cursor=cursor)["records"]
    assert record == {"step": 51, "loss": None, "grad_norm": None}
