"""A file is replaced in one step or not at all."""

import errno
import os
from pathlib import Path

import pytest

from deltamoe.checkpoint.durable import replace_file
from deltamoe.errors import CheckpointError, DoesNotFitError


def test_replace(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for text in ("one", "two"):
        replace_file(path, lambda new, text=text: new.write_text(text))
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.ENOSPC, DoesNotFitError), (errno.EROFS, CheckpointError), (errno.EIO, CheckpointError)],
)
@pytest.mark.parametrize("function", ["fsync", "rename"])
def test_a_refusal_leaves_the_old_file(
    function: str, number: int, error: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "f"
    path.write_text("old")
    monkeypatch.setattr(os, function, refuse)
    with pytest.raises(error, match="untouched"):
        replace_file(path, lambda new: new.write_text("new"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        replace_file(tmp_path / "nowhere" / "f", lambda new: new.touch())


def test_a_folder_that_cannot_be_synced_is_tolerated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def no_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)
    replace_file(tmp_path / "f", lambda new: new.write_text("new"))
    assert (tmp_path / "f").read_text() == "new"
