"""One trainer per run folder.

The lock is the kernel's (``flock`` on ``RUN/run.lock``): it ends with the process that holds it,
however that dies, so a lock can never be stale. The file's content only says who holds it.

Knows nothing of training. No torch.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from deltamoe.checkpoint.durable import storage_faults
from deltamoe.errors import RunInUseError

__all__ = ["LOCK", "lock_run"]

LOCK = "run.lock"
_LOG = logging.getLogger("deltamoe")
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


@contextlib.contextmanager
def lock_run(run: Path | str) -> Iterator[None]:
    """Hold the run folder while the block runs.

    Where the file system has no locks, a warning is logged and the block runs without.

    Raises:
        RunInUseError: another process holds it; the message names its pid and host.
        CheckpointError: the lock file cannot be opened.
    """
    path = Path(run) / LOCK
    with storage_faults(path, Path(run)):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _take(descriptor, path)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": int(time.time())}
        with storage_faults(path, Path(run)):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunInUseError(
            f"{path.parent}: another process trains in this run folder ({_owner(descriptor)}). "
            "Stop it first, or train into another folder."
        ) from None
    except OSError as fault:
        if fault.errno not in _NO_LOCKS_HERE:
            raise
        _LOG.warning(
            "%s: this file system has no locks; a second trainer in the same run folder "
            "would not be noticed",
            path,
        )


def _owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 1000, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
        return f"pid {int(owner['pid'])} on host {str(owner['host'])!r} since {since}"
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return "it left no name"
