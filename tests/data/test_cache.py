import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deltamoe.data.cache import cache_folder, new_folder
from deltamoe.errors import DoesNotFitError


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "deltamoe"
    assert cache_folder("/elsewhere") == Path("/elsewhere")
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache_folder(None) == tmp_path / ".cache" / "deltamoe"


def test_a_folder_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "data"
    with new_folder(target) as unfinished:
        (unfinished / "file").write_text("words")
        assert not target.exists()
    assert (target / "file").read_text() == "words"
    assert os.listdir(target.parent) == ["data"]


def write_and_fail(target, fault):
    with new_folder(target) as unfinished:
        (unfinished / "file").write_text("words")
        raise fault


@pytest.mark.parametrize("fault", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_fault_leaves_nothing(tmp_path, fault):
    with pytest.raises(type(fault)):
        write_and_fail(tmp_path / "data", fault)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_said_in_words_and_leaves_nothing(tmp_path):
    with pytest.raises(DoesNotFitError, match="bytes free"):
        write_and_fail(tmp_path / "data", OSError(errno.ENOSPC, "No space left on device"))
    assert os.listdir(tmp_path) == []


def test_the_first_of_two_processes_wins(tmp_path):
    target = tmp_path / "data"
    with new_folder(target) as mine:
        (mine / "file").write_text("mine")
        target.mkdir()
        (target / "file").write_text("theirs")
    assert (target / "file").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["data"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from deltamoe.data.cache import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as unfinished:\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "theirs")], stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    with writer:
        assert writer.stdout.readline() == b"writing\n"
        with new_folder(tmp_path / "mine"):
            pass
        assert len(os.listdir(tmp_path)) == 2
        writer.send_signal(signal.SIGKILL)
    time.sleep(0.05)
    with new_folder(tmp_path / "mine too"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["mine", "mine too"]
