"""The write protocol of a checkpoint, and what its reader notices.

Run as a program, this file is the victim of the crash tests: it writes checkpoints until it dies.
"""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deltamoe.checkpoint.folder import open_checkpoint, step_folder, step_folders, write_checkpoint
from deltamoe.checkpoint.run_folder import (
    clean_run,
    newest_checkpoint,
    prune_checkpoints,
)
from deltamoe.errors import CheckpointError, DoesNotFitError

NAMES = ("model.safetensors", "optimizer.safetensors")


def content(name: str, step: int) -> bytes:
    return f"{name} of step {step}\n".encode() * 2000


def write(run: Path, step: int) -> None:
    files = {name: lambda path, name=name: path.write_bytes(content(name, step)) for name in NAMES}
    write_checkpoint(run, step, files, expected_bytes=100_000)


# ── the order of writing ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch, run: Path) -> list[str]:
    """Every fsync and rename, in order, with paths relative to the run."""
    seen: list[str] = []
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree

    def short(path: object) -> str:
        return os.path.relpath(str(path), run)

    def record_fsync(descriptor: int) -> None:
        seen.append("sync " + short(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        seen.append(f"rename {short(source)} {short(target)}")
        rename(source, target)

    def record_rmtree(path: Path, **kwargs: bool) -> None:
        if path.exists():
            seen.append("remove " + short(path))
        rmtree(path, **kwargs)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(shutil, "rmtree", record_rmtree)
    return seen


def test_everything_is_synced_before_the_rename(run: Path, events: list[str]) -> None:
    write(run, 7)
    assert events == [
        "sync .",  # checkpoints/ is new
        "sync checkpoints/.step-7.writing/model.safetensors",
        "sync checkpoints/.step-7.writing/optimizer.safetensors",
        "sync checkpoints/.step-7.writing/manifest.json",
        "sync checkpoints/.step-7.writing",
        "rename checkpoints/.step-7.writing checkpoints/step-7",
        "sync checkpoints",
    ]


def test_an_old_one_of_the_same_step_goes_last(run: Path, events: list[str]) -> None:
    write(run, 7)
    events.clear()
    write(run, 7)
    assert events[-4:] == [
        "rename checkpoints/step-7 checkpoints/.step-7.old",
        "rename checkpoints/.step-7.writing checkpoints/step-7",
        "sync checkpoints",
        "remove checkpoints/.step-7.old",
    ]


def test_pruned_ones_vanish_before_their_files_do(run: Path, events: list[str]) -> None:
    write(run, 7)
    write(run, 8)
    events.clear()
    prune_checkpoints(run, keep=1)
    assert events == [
        "rename checkpoints/step-7 checkpoints/.step-7.discarded",
        "remove checkpoints/.step-7.discarded",
    ]


def test_files_have_ordinary_permissions(run: Path) -> None:
    old = os.umask(0o022)
    try:
        write(run, 1)
    finally:
        os.umask(old)
    folder = step_folder(run, 1)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


# ── crashes ──────────────────────────────────────────────────────────────────────────────────────


def die_at(operation: int) -> None:
    """Make the process vanish, without cleaning up, at its n-th sync, rename or removal."""
    count = iter(range(operation))

    def mortal(function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            if next(count, None) is None:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    os.fsync, os.rename, shutil.rmtree = map(mortal, (os.fsync, os.rename, shutil.rmtree))
    os.unlink, os.mkdir = mortal(os.unlink), mortal(os.mkdir)


def go_on(run: Path, first: int, last: int) -> None:
    """Write, prune and replace the only one left, step by step; note when one is done."""
    for step in range(first, last + 1):
        write(run, step)
        prune_checkpoints(run, keep=1)
        write(run, step)
        print(step, flush=True)
        (run / "done").write_text(str(step))


def die_at_each(folder: Path) -> None:
    """In one child and run folder for each operation; ends when a child survives."""
    for operation in range(1000):
        run = folder / str(operation)
        run.mkdir()
        write(run, 1)
        child = os.fork()
        if child == 0:
            die_at(operation)
            go_on(run, 2, 3)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            return


def outgrow_the_limit(run: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    with pytest.raises(DoesNotFitError, match="ulimit"):
        write(run, 2)
    print("refused")


def start_victim(verb: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, verb, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def assert_whole(run: Path, last_done: int) -> int:
    """A start after a crash: clean, then the newest opens and is at most one behind."""
    clean_run(run)
    names = sorted(path.name for path in step_folder(run, 0).parent.iterdir())
    assert all(name.startswith("step-") for name in names)
    checkpoint = newest_checkpoint(run)
    assert checkpoint.step >= last_done
    for name in NAMES:
        assert checkpoint.file(name).read_bytes() == content(name, checkpoint.step)
    return checkpoint.step


def test_killed_at_random_times(run: Path) -> None:
    """``kill -9``: every checkpoint that was reported is there, or a newer one is."""
    rng = random.Random(0)
    newest = 0
    for _ in range(10):
        process = start_victim("go_on", run, newest + 1, 10**6)
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        reported = [int(line) for line in [first, *process.stdout.read().split("\n")[:-1]]]
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        newest = assert_whole(run, reported[-1])
        assert newest <= reported[-1] + 1


def test_killed_at_every_operation(run: Path) -> None:
    """The same, at each single sync, rename, unlink, mkdir and removal of two steps."""
    with start_victim("die_at_each", run) as process:
        process.communicate()
    assert process.returncode == 0
    runs = [path for path in run.iterdir() if path.is_dir()]
    assert len(runs) > 30  # the victims did meet that many points, and the last one none
    for victim in runs:
        done = victim / "done"
        assert_whole(victim, int(done.read_text()) if done.exists() else 1)


# ── a disk that refuses ──────────────────────────────────────────────────────────────────────────


def entries(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def refuse(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up_harms_nothing(number: int, run: Path) -> None:
    write(run, 1)
    files = {"a": lambda path: path.write_bytes(b"a"), "b": refuse(number)}
    with pytest.raises(DoesNotFitError) as raised:
        write_checkpoint(run, 2, files, expected_bytes=12_345)
    message = str(raised.value)
    assert "step-2" in message
    assert "12,345 bytes needed" in message
    assert "bytes free" in message
    assert "Earlier checkpoints are untouched" in message
    assert entries(run) == ["step-1"]
    assert newest_checkpoint(run).step == 1


def test_too_little_space_is_noticed_before_writing(run: Path) -> None:
    def never(path: Path) -> None:
        raise AssertionError("was called")

    with pytest.raises(DoesNotFitError, match="1,000,000,000,000,000,000 bytes needed"):
        write_checkpoint(run, 2, {"a": never}, expected_bytes=10**18)
    assert not (run / "checkpoints").exists()


def test_a_file_size_limit_harms_nothing(run: Path) -> None:
    write(run, 1)
    with start_victim("outgrow_the_limit", run) as process:
        assert process.communicate()[0] == "refused\n"
    assert entries(run) == ["step-1"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("function", ["mkdir", "rename", "fsync"])
def test_a_disk_that_refuses_harms_nothing(
    function: str, number: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, refuse(number))
        with pytest.raises(CheckpointError, match=os.strerror(number)) as raised:
            write(run, 2)
    assert "Earlier checkpoints are untouched" in str(raised.value)
    assert entries(run) == ["step-1"]


def test_a_refused_replacement_leaves_the_old_one(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run, 1)
    rename = os.rename

    def refuse_the_new(source: Path, target: Path) -> None:
        if source.name.endswith(".writing"):
            refuse(errno.EIO)()
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse_the_new)
        with pytest.raises(CheckpointError):
            write(run, 1)
    assert entries(run) == ["step-1"]
    assert newest_checkpoint(run).step == 1


def test_a_run_folder_that_vanished(run: Path) -> None:
    run.rmdir()
    with pytest.raises(CheckpointError, match="No such file or directory"):
        write(run, 1)


def test_any_exception_of_a_writer_leaves_nothing_behind(run: Path) -> None:
    def interrupt(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    write(run, 1)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(run, 2, {"a": interrupt}, expected_bytes=4)
    assert entries(run) == ["step-1"]


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


def flip_a_bit(folder: Path) -> None:
    path = folder / NAMES[0]
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)


def truncate(folder: Path) -> None:
    os.truncate(folder / NAMES[1], 100)


def lengthen(folder: Path) -> None:
    with open(folder / NAMES[1], "ab") as file:
        file.write(b"x")


def lose(folder: Path) -> None:
    (folder / NAMES[1]).unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def swap_two(folder: Path) -> None:
    one, two = folder / NAMES[0], folder / NAMES[1]
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


def take_from_another_step(folder: Path) -> None:
    shutil.copy(folder.with_name("step-1") / NAMES[0], folder / NAMES[0])


def rename_the_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-1"), folder)


def put_a_pipe(folder: Path) -> None:
    (folder / NAMES[0]).unlink()
    os.mkfifo(folder / NAMES[0])


def link_outside(folder: Path) -> None:
    (folder / NAMES[0]).rename(folder.parent.parent / "elsewhere")
    (folder / NAMES[0]).symlink_to(folder.parent.parent / "elsewhere")


FAULTS = [
    (flip_a_bit, "model.safetensors", "SHA-256 differs"),
    (truncate, "optimizer.safetensors", "truncated"),
    (lengthen, "optimizer.safetensors", "bytes"),
    (lose, "optimizer.safetensors", "no such file"),
    (lose_the_manifest, "manifest.json", "never finished"),
    (swap_two, "model.safetensors", "swapped"),
    (take_from_another_step, "model.safetensors", "swapped"),
    (rename_the_folder, "step-2", "says step 1"),
    (put_a_pipe, "model.safetensors", "a pipe"),
    (link_outside, "model.safetensors", "leaves its folder"),
]


@pytest.mark.parametrize(
    ("fault", "name", "message"), FAULTS, ids=lambda x: getattr(x, "__name__", "")
)
def test_a_fault_is_named_and_the_one_before_is_used(
    fault: Callable[[Path], None],
    name: str,
    message: str,
    run: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(run, 1)
    write(run, 2)
    fault(step_folder(run, 2))
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(step_folder(run, 2))
    assert name in str(raised.value)
    assert message in str(raised.value)
    assert raised.value.exit_code == 3

    assert newest_checkpoint(run).step == 1
    (warning,) = caplog.records
    assert (warning.name, warning.levelname) == ("deltamoe", "WARNING")
    assert str(raised.value) in warning.getMessage()


def test_without_hashes_a_flipped_bit_is_not_seen(run: Path) -> None:
    write(run, 2)
    flip_a_bit(step_folder(run, 2))
    assert open_checkpoint(step_folder(run, 2), check_hashes=False).step == 2


def test_a_copy_under_another_name_opens(run: Path, tmp_path: Path) -> None:
    write(run, 2)
    shutil.copytree(step_folder(run, 2), tmp_path / "my-model")
    checkpoint = open_checkpoint(tmp_path / "my-model")
    assert checkpoint.step == 2
    assert checkpoint.file(NAMES[0]).parent == tmp_path / "my-model"
    with pytest.raises(CheckpointError, match=r"holds no nothing\.json; it holds model"):
        checkpoint.file("nothing.json")


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "step-3")


def test_step_folders_are_in_numeric_order(run: Path) -> None:
    for step in (9, 20, 100):
        write(run, step)
    (run / "checkpoints" / "step-007").mkdir()
    (run / "checkpoints" / "notes.txt").touch()
    assert [folder.name for folder in step_folders(run)] == ["step-9", "step-20", "step-100"]


if __name__ == "__main__":
    verb, path, *numbers = sys.argv[1:]
    {"go_on": go_on, "die_at_each": die_at_each, "outgrow_the_limit": outgrow_the_limit}[verb](
        Path(path), *map(int, numbers)
    )
