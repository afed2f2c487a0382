"""Which checkpoint of a run is trusted, which are dropped, and what a path may point at."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltamoe.checkpoint.folder import step_folder, step_folders, write_checkpoint
from deltamoe.checkpoint.run_folder import (
    clean_run,
    find_checkpoint,
    load_config,
    load_run_config,
    newest_checkpoint,
    prune_checkpoints,
    write_run_config,
)
from deltamoe.config.parse import to_json
from deltamoe.config.presets import preset
from deltamoe.config.run import RunConfig
from deltamoe.errors import CheckpointError

NANO = preset("nano")
Save = Callable[..., Path]


@pytest.fixture
def save(run: Path) -> Save:
    def write(step: int, config: RunConfig = NANO) -> Path:
        files = {
            "model.safetensors": lambda path: path.write_bytes(b"weights"),
            "config.json": lambda path: path.write_text(to_json(config)),
        }
        return write_checkpoint(run, step, files, expected_bytes=10_000).path

    return write


def steps(run: Path) -> list[str]:
    return [folder.name for folder in step_folders(run)]


# ── the newest good one ──────────────────────────────────────────────────────────────────────────


def test_no_checkpoint_yet(run: Path) -> None:
    assert step_folders(run) == []
    assert step_folders(run / "nowhere") == []
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        newest_checkpoint(run)


def test_newest_is_by_number(run: Path, save: Save, caplog: pytest.LogCaptureFixture) -> None:
    for step in (9, 20, 100):
        save(step)
    assert newest_checkpoint(run).step == 100
    assert caplog.records == []


def test_two_bad_ones_fall_back_to_the_third(
    run: Path, save: Save, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        save(step)
    (step_folder(run, 3) / "manifest.json").unlink()
    (step_folder(run, 2) / "model.safetensors").write_bytes(b"WEIGHTS")
    assert newest_checkpoint(run).step == 1
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_no_good_one_is_an_error_that_lists_all(run: Path, save: Save) -> None:
    for step in (1, 2):
        save(step)
        (step_folder(run, step) / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is good") as raised:
        newest_checkpoint(run)
    for step in (1, 2):
        assert f"step-{step}/model.safetensors" in str(raised.value)


def test_a_checkpoint_of_another_model_is_not_resumed(
    run: Path, save: Save, caplog: pytest.LogCaptureFixture
) -> None:
    write_run_config(run, NANO)
    save(1)
    save(2, replace(NANO, model=replace(NANO.model, dim=128)))
    assert newest_checkpoint(run).step == 1
    assert "another model" in caplog.text


def test_another_recipe_for_the_same_model_is(run: Path, save: Save) -> None:
    write_run_config(run, NANO)
    save(2, replace(NANO, train=replace(NANO.train, steps=7)))
    assert newest_checkpoint(run).step == 2


def test_a_damaged_run_config_is_named_at_once(run: Path, save: Save) -> None:
    save(1)
    (run / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run/config\.json"):
        newest_checkpoint(run)


# ── pruning and cleaning ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"),
    [
        (1, 0, [60]),
        (2, 0, [50, 60]),
        (9, 0, [10, 20, 30, 40, 50, 60]),
        (1, 20, [20, 40, 60]),
        (2, 30, [30, 50, 60]),
        (1, 7, [60]),
    ],
)
def test_prune(keep: int, keep_every: int, kept: list[int], run: Path, save: Save) -> None:
    for step in range(10, 70, 10):
        save(step)
    gone = prune_checkpoints(run, keep=keep, keep_every=keep_every)
    assert steps(run) == [f"step-{step}" for step in kept]
    assert len(gone) == 6 - len(kept)
    assert not any(folder.exists() for folder in gone)


def test_prune_never_empties_a_run(run: Path, save: Save) -> None:
    save(1)
    with pytest.raises(ValueError, match="at least one"):
        prune_checkpoints(run, keep=0)
    prune_checkpoints(run, keep=1)
    assert steps(run) == ["step-1"]


def test_what_was_written_last_is_the_newest(
    run: Path, save: Save, caplog: pytest.LogCaptureFixture
) -> None:
    """A bad or unwanted later step must not be taken for it, nor have it pruned."""
    for step in (10, 20, 30):
        save(step)
    save(15)
    assert steps(run) == ["step-10", "step-15"]
    assert (run / "checkpoints/abandoned-step-20/model.safetensors").exists()
    assert "step-30 is now abandoned-step-30" in caplog.text
    prune_checkpoints(run, keep=1)
    assert newest_checkpoint(run).step == 15
    save(20)
    save(16)
    aside = [path.name for path in (run / "checkpoints").glob("abandoned-step-20*")]
    assert len(aside) == 2


def test_clean_removes_what_a_crash_left(run: Path, save: Save) -> None:
    folder = save(1).parent
    for stray in (".step-2.writing", ".step-3.discarded", ".step-1.old"):
        (folder / stray).mkdir()
        (folder / stray / "model.safetensors").touch()
    (folder / ".notes").touch()
    clean_run(run)
    assert sorted(path.name for path in folder.iterdir()) == [".notes", "step-1"]


def test_clean_gives_a_replaced_checkpoint_its_name_back(run: Path, save: Save) -> None:
    save(1).rename(step_folder(run, 0).with_name(".step-1.old"))
    clean_run(run)
    assert newest_checkpoint(run).step == 1


def test_clean_of_a_new_run(run: Path) -> None:
    clean_run(run)
    assert list(run.iterdir()) == []


# ── what a path may point at ─────────────────────────────────────────────────────────────────────


def test_a_run_and_a_step_are_found(run: Path, save: Save) -> None:
    save(1)
    save(2)
    assert find_checkpoint(run).step == 2
    assert find_checkpoint(str(step_folder(run, 1))).step == 1


def test_what_is_neither(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in [
        (tmp_path / "nowhere", "there is nothing there"),
        (tmp_path / "file", "this is a file"),
        (run, "neither a run folder"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            find_checkpoint(path)
    (run / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        find_checkpoint(run)


def test_a_published_folder_is_a_model_and_no_run(run: Path) -> None:
    (run / "model.safetensors").touch()
    (run / "config.json").write_text('{"model_type": "kimi_linear", "hidden_size": 2304}')
    assert set(find_checkpoint(run).manifest.files) == {"config.json", "model.safetensors"}
    with pytest.raises(CheckpointError, match="num_hidden_layers is missing"):
        load_config(run)
    with pytest.raises(CheckpointError, match="not a run of deltamoe"):
        load_run_config(run)


# ── config.json ──────────────────────────────────────────────────────────────────────────────────


def test_config_there_and_back(run: Path, save: Save) -> None:
    write_run_config(run, NANO)
    assert load_run_config(run) == NANO
    assert load_config(save(1)) == NANO.model
    assert [path.name for path in run.iterdir() if path.is_file()] == ["config.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "written by a newer deltamoe: format 3"),
        ({"format": None}, '"format" is None'),
        ({"model": {}}, "model"),
        ({"model": 1}, "model"),
        ({"moodel": {}}, "moodel"),
        ({"train": {"steps": 1.5}}, r"train\.steps"),
        ({"train": {"steps": -1}}, r"train\.steps"),
    ],
)
def test_a_bad_config_is_a_bad_file(change: dict, message: str, run: Path) -> None:
    write_run_config(run, NANO)
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as raised:
        load_run_config(run)
    assert str(path) in str(raised.value)
    assert raised.value.exit_code == 3


def test_a_config_that_asks_for_endless_layers_is_refused_at_once(run: Path) -> None:
    text = to_json(NANO).replace('"num_layers": 4', '"num_layers": 1000000000000')
    (run / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="num_layers"):
        load_run_config(run)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    at=st.floats(0, 1, exclude_max=True),
    piece=st.sampled_from([b"", b"9", b"-", b'"', b"{", b"]", b",", b"1e999", b"\xff", b"null"]),
    num_removed=st.integers(0, 9),
)
def test_random_damage_to_a_config(at: float, piece: bytes, num_removed: int, run: Path) -> None:
    good = to_json(NANO).encode()
    start = int(at * len(good))
    (run / "config.json").write_bytes(good[:start] + piece + good[start + num_removed :])
    with contextlib.suppress(CheckpointError):
        load_run_config(run)
