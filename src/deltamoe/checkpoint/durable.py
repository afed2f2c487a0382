"""Writing that survives a crash: synced, then renamed into place; and its faults in words.

A file or folder becomes visible under its name only when every byte of it has reached the disk,
so that a reader meets the old one or the new one and never half of either.

Knows nothing of what is written. No torch.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from deltamoe.errors import CheckpointError, DeltamoeError, DoesNotFitError

__all__ = ["FileWriter", "replace_file", "storage_faults", "sync_file", "sync_folder"]

FileWriter = Callable[[Path], None]
"""Writes one new file at the path it is given; raises ``OSError`` when the disk refuses."""

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def sync_file(path: Path) -> None:
    """Wait until the file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Wait until the folder's entries are on the disk, where the file system can say so."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as fault:
        if fault.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def replace_file(path: Path, write: FileWriter) -> None:
    """Write a new file and put it in the place of ``path`` in one step.

    Raises:
        DoesNotFitError: the disk, a quota or a file-size limit is full.
        CheckpointError: the disk refused otherwise.
        In both cases ``path`` is as it was.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with storage_faults(path, path.parent, reassurance="The old file, if any, is untouched."):
            write(unfinished)
            sync_file(unfinished)
            os.rename(unfinished, path)
            sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def storage_faults(
    target: Path, folder: Path, *, needed_bytes: int = 0, reassurance: str = ""
) -> Iterator[None]:
    """Turn what the disk refuses into an error a person can act on.

    Args:
        target: what was being written, for the message.
        folder: an existing folder on the same disk, asked for its free space.
        needed_bytes: what the whole takes; 0 if unknown.
        reassurance: a sentence on what is still safe.

    Raises:
        DoesNotFitError: the disk, a quota or a file-size limit is full.
        CheckpointError: any other ``OSError``.
    """
    try:
        yield
    except OSError as fault:
        raise _in_words(fault, target, folder, needed_bytes, reassurance) from fault


def _in_words(
    fault: OSError, target: Path, folder: Path, needed_bytes: int, reassurance: str
) -> DeltamoeError:
    if fault.errno not in _DISK_FULL:
        return CheckpointError(f"{target}: cannot be written ({fault.strerror}). {reassurance}")
    needed = f"about {needed_bytes:,} bytes needed" if needed_bytes else "more is needed"
    try:
        free = f"{shutil.disk_usage(folder).free:,} bytes free"
    except OSError:
        free = "free space unknown"
    limit = "; a file-size limit (ulimit -f) applies" if fault.errno == errno.EFBIG else ""
    return DoesNotFitError(
        f"{target}: does not fit on the disk ({fault.strerror}): {needed}, {free}{limit}. "
        f"{reassurance} Free some space or write elsewhere."
    )
