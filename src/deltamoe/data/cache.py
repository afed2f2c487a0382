"""Where prepared data is kept, and how a folder comes to be there all at once or not at all.

Knows nothing of what is in a folder.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from deltamoe.checkpoint.durable import storage_faults, sync_file, sync_folder

__all__ = ["TAG", "cache_folder", "mark_as_cache", "new_folder"]

TAG = "CACHEDIR.TAG"
"""The name of the file that marks a folder as a cache (bford.info/cachedir)."""

_UNFINISHED = ".unfinished"


def cache_folder(configured: str | None) -> Path:
    """The folder for prepared data: the configured one, else the user's cache folder."""
    if configured is not None:
        return Path(configured).expanduser()
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rule: a path that is not absolute is to be ignored.
    base = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    return base / "deltamoe"


def mark_as_cache(folder: Path) -> None:
    """Tag a folder, so that no source that happens to lie around it reads what is in it."""
    with storage_faults(folder, _existing(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TAG).write_text("Signature: 8a477f597d28d172789f06886806bc55\n")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder: yields an unfinished one, which takes its name once the block succeeds.

    If another process made it meanwhile, theirs stays. What a killed process left unfinished is
    removed.

    Raises:
        DoesNotFitError: the disk is full.
        CheckpointError: the disk refused otherwise.
    """
    with storage_faults(path, _existing(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}{_UNFINISHED}")
        unfinished.mkdir()
        lock = os.open(unfinished, os.O_RDONLY)
        try:
            _try_lock(lock)
            yield unfinished
            for file in unfinished.iterdir():
                sync_file(file)
            sync_folder(unfinished)
            with contextlib.suppress(FileExistsError):  # another process was first
                _rename(unfinished, path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            os.close(lock)


def _rename(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(target) from None
        raise


def _existing(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _remove_abandoned(parent: Path) -> None:
    """Remove unfinished folders whose process is gone: the kernel has released their lock."""
    for folder in parent.glob(f".*{_UNFINISHED}"):
        try:
            lock = os.open(folder, os.O_RDONLY)
        except OSError:
            continue
        if _try_lock(lock):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks: then nothing is ever removed
        return False
    return True
