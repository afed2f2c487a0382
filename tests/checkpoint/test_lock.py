"""One trainer per run: the second is refused by name, a dead one is forgotten."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deltamoe.checkpoint.lock import lock_run
from deltamoe.errors import CheckpointError, RunInUseError

HOLD = """
import sys
from deltamoe.checkpoint.lock import lock_run
with lock_run(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_is_refused_by_name(run: Path) -> None:
    with lock_run(run), pytest.raises(RunInUseError) as raised, lock_run(run):
        pass
    assert f"pid {os.getpid()}" in str(raised.value)
    assert repr(socket.gethostname()) in str(raised.value)


def test_the_lock_ends_with_the_block(run: Path) -> None:
    for _ in range(2):
        with lock_run(run):
            pass
    with pytest.raises(KeyError), lock_run(run):
        raise KeyError
    with lock_run(run):
        pass


def test_the_lock_ends_with_its_process(run: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunInUseError, match=f"pid {holder.pid}"), lock_run(run):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert str(holder.pid) in (run / "run.lock").read_text()  # left behind, and no obstacle
        with lock_run(run):
            pass


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1, "host": "h", "since": 1e99}', "\0\xff"]
)
def test_a_nameless_holder(content: str, run: Path) -> None:
    with lock_run(run):
        (run / "run.lock").write_text(content)
        with pytest.raises(RunInUseError, match="it left no name"), lock_run(run):
            pass


def test_old_content_is_no_lock(run: Path) -> None:
    (run / "run.lock").write_text('{"pid": 1, "host": "elsewhere", "since": 0}' + " " * 500)
    with lock_run(run), pytest.raises(RunInUseError, match=f"pid {os.getpid()} "), lock_run(run):
        pass


def test_a_file_system_without_locks_is_warned_about(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_run(run):
        pass
    assert "has no locks" in caplog.text


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"), lock_run(tmp_path / "nowhere"):
        pass
