"""The rehearsal takes a step, writes and reads a checkpoint, and leaves nothing."""

import pytest

from deltamoe.checkpoint import read_tensors
from deltamoe.errors import CheckpointError
from deltamoe.training.dry_run import dry_run


def test_it_reports_and_leaves_nothing(config, data, tmp_path):
    found = dry_run(config(), data, beside=tmp_path / "runs" / "tiny")
    assert found.seconds_per_step > 0
    assert found.peak_bytes > 10_000_000  # Python with torch
    assert 10_000 < found.checkpoint_bytes < 10_000_000
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_comes_back_changed_is_an_error(config, data, tmp_path, monkeypatch):
    def changed(path, **options):
        tensors = read_tensors(path, **options)
        return {name: tensor + 1 for name, tensor in tensors.items()}

    monkeypatch.setattr("deltamoe.training.trainer.read_tensors", changed)
    with pytest.raises(CheckpointError, match="came back from the disk changed"):
        dry_run(config(), data, beside=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
