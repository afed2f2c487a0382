"""Records that survive crashes, sinks that may fail, and measurements with known answers."""

import errno
import json
import math
import sys

import pytest
import torch

from deltamoe.testing import tiny_model
from deltamoe.training.metrics import (
    JsonLines,
    MemoryWatch,
    Metrics,
    decay_half_lives,
    matmul_flops_per_s,
    read_metrics,
)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_steps(folder, steps, *, after=0) -> None:
    sink = JsonLines(folder, step=after)
    for step in steps:
        sink.write({"step": step, "loss": 1.0 / step})
    sink.close()


def test_one_object_a_line(tmp_path):
    write_steps(tmp_path, [1, 2])
    assert lines(tmp_path) == [
        {"format": 1, "step": 1, "loss": 1.0},
        {"format": 1, "step": 2, "loss": 0.5},
    ]


def test_resuming_drops_the_lines_of_a_lost_future(tmp_path):
    write_steps(tmp_path, [1, 2, 3, 4, 5])
    write_steps(tmp_path, [3, 4], after=2)
    assert [r["step"] for r in lines(tmp_path)] == [1, 2, 3, 4]


def test_a_torn_tail_is_no_obstacle(tmp_path):
    write_steps(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"format": 1, "step": 3, "lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    write_steps(tmp_path, [3], after=2)
    assert [r["step"] for r in lines(tmp_path)] == [1, 2, 3]


def test_a_half_written_line_is_taken_back(tmp_path):
    sink = JsonLines(tmp_path, step=0)
    sink.write({"step": 1})
    whole = sink._file

    class Full:
        """A file on a disk that has room for five more bytes."""

        def write(self, line: bytes) -> int:
            return whole.write(line[:5])

        def truncate(self, size: int) -> int:
            return whole.truncate(size)

    sink._file = Full()
    with pytest.raises(OSError, match="No space"):
        sink.write({"step": 2})
    sink._file = whole
    sink.write({"step": 3})
    sink.close()
    assert [r["step"] for r in lines(tmp_path)] == [1, 3]


def test_a_sink_that_fails_is_announced_once_and_the_others_go_on(tmp_path, monkeypatch):
    def fail(self, record):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("deltamoe.training.metrics.TensorBoard.write", fail)
    told = []
    metrics = Metrics(tmp_path, step=0, warn=told.append)
    for step in (1, 2, 3):
        metrics.write({"step": step})
    metrics.close()
    assert [r["step"] for r in lines(tmp_path)] == [1, 2, 3]
    assert len(told) == 1
    assert "TensorBoard" in told[0]
    assert "No space" in told[0]


def test_without_tensorboard_it_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    told = []
    metrics = Metrics(tmp_path, step=0, warn=told.append)
    metrics.write({"step": 1})
    metrics.close()
    assert len(told) == 1
    assert "deltamoe[tensorboard]" in told[0]
    assert len(lines(tmp_path)) == 1


def test_tensorboard_holds_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, step=0, warn=pytest.fail)
    metrics.write({"step": 1, "loss": 2.5, "max_vio": {"1": 0.25}, "load": {"1": [3, 1]}})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("loss")[0].value == 2.5
    assert events.Scalars("max_vio/1")[0].value == 0.25
    assert "load/1" in events.Tags()["histograms"]


def test_half_life_of_a_known_decay():
    model = tiny_model()
    with torch.no_grad():
        # log_decay = -exp(0) softplus(x) with softplus(x) = ln 2 / 10: half is gone in ten tokens
        model.get_parameter("blocks.1.mixer.A_log").zero_()
        x = math.log(math.expm1(math.log(2) / 10))
        model.get_parameter("blocks.1.mixer.dt_bias").fill_(x)
    lives = decay_half_lives(model)
    assert lives.keys() == {0, 1, 2}  # layer 3 is MLA
    assert lives[1] == pytest.approx({"median": 10.0, "min": 10.0, "max": 10.0}, rel=1e-5)


def test_memory_norms_are_those_of_the_last_state():
    model = tiny_model()
    ids = torch.arange(9)[None]
    with MemoryWatch(model) as watch:
        state = model.hidden(ids).state
    expected = state.layers[1].memory.norm(dim=(-2, -1)).mean().item()
    assert watch.norms[1] == pytest.approx(expected)
    assert watch.norms.keys() == {0, 1, 2}
    with torch.no_grad():
        model.hidden(ids * 0)
    assert watch.norms[1] == pytest.approx(expected)  # the watch is over


def test_matmul_speed_is_plausible():
    speed = matmul_flops_per_s(torch.device("cpu"), torch.float32, size=128, seconds=0.01)
    assert 1e7 < speed < 1e14
