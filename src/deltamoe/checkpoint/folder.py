"""One checkpoint is one folder, ``RUN/checkpoints/step-N``; it is either whole or not there.

The order of writing is the promise. Whenever the power goes, the checkpoints finished before are
intact and the one being written is either complete or invisible:

    1. a hidden folder ``.step-N.writing`` beside the final place
    2. each file written into it and synced
    3. manifest.json last (sizes and SHA-256 of the others), synced; the hidden folder synced
    4. the hidden folder renamed to ``step-N``; the parent synced

What the files hold is the caller's; tokenizer, config and optimizer are names in a mapping here.
No torch.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deltamoe.checkpoint.durable import FileWriter, storage_faults, sync_file, sync_folder
from deltamoe.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    read_manifest,
    record_file,
    write_manifest,
)
from deltamoe.errors import CheckpointError

__all__ = [
    "CONFIG",
    "OPTIMIZER",
    "TOKENIZER",
    "TRAIN_STATE",
    "WEIGHTS",
    "Checkpoint",
    "checkpoint_entries",
    "open_checkpoint",
    "require_new",
    "step_folder",
    "step_folders",
    "step_of",
    "write_checkpoint",
    "write_new_folder",
]

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
TRAIN_STATE = "train_state.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"

_STEP_NAME = re.compile(r"step-(0|[1-9][0-9]{0,17})")
_LOG = logging.getLogger("deltamoe")
_UNTOUCHED = "Earlier checkpoints are untouched and nothing half-written was left behind."


@dataclass(frozen=True)
class Checkpoint:
    """A step folder whose manifest and files were found to agree."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was written."""
        return self.manifest.step

    @property
    def weights_sha256(self) -> str:
        """Identity of the weights; a saved state belongs to it."""
        return self.manifest.files[WEIGHTS].sha256 if WEIGHTS in self.manifest.files else ""

    def file(self, name: str) -> Path:
        """The path of one of its files.

        Raises:
            CheckpointError: the manifest lists no such file.
        """
        if name not in self.manifest.files:
            held = ", ".join(self.manifest.files)
            raise CheckpointError(f"{self.path}: holds no {name}; it holds {held}")
        return self.path / name


def step_folder(run: Path | str, step: int) -> Path:
    """Where the checkpoint of a step stands: ``RUN/checkpoints/step-N``."""
    return Path(run) / "checkpoints" / f"step-{step}"


def step_of(folder: Path) -> int | None:
    """The step in a folder's name, or None if the name is of another kind."""
    match = _STEP_NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def step_folders(run: Path | str) -> list[Path]:
    """The step folders of a run, oldest first, good or not; empty if there are none."""
    found = {
        step: folder for folder in checkpoint_entries(run) if (step := step_of(folder)) is not None
    }
    return [found[step] for step in sorted(found)]


def checkpoint_entries(run: Path | str) -> list[Path]:
    """Whatever lies in ``RUN/checkpoints``, in no order."""
    try:
        return list(step_folder(run, 0).parent.iterdir())
    except FileNotFoundError:
        return []
    except OSError as fault:
        raise CheckpointError(f"{run}: checkpoints cannot be listed ({fault.strerror})") from fault


def write_checkpoint(
    run: Path | str, step: int, files: Mapping[str, FileWriter], *, expected_bytes: int
) -> Checkpoint:
    """Write one checkpoint, whole or not at all; the module's docstring has the order.

    The caller holds the run's lock. An older checkpoint of the same step is replaced, and stays
    until the new one has its name. Checkpoints of later steps belong to a future that is being
    written anew (they were bad, or a person went back): they are set aside as
    ``abandoned-step-N``, which nothing reads or deletes, so that what was written last is always
    the newest.

    Args:
        run: the run folder; it exists.
        step: optimizer steps taken so far, >= 0.
        files: what to write, by plain file name, in this order.
        expected_bytes: what all files together will take; asked of the disk before anything is
            written, and said when it runs out later.

    Raises:
        DoesNotFitError: the disk, a quota or a file-size limit is full.
        CheckpointError: the disk refused otherwise (read-only, no permission, gone).
        In both cases, and after any other exception, earlier checkpoints are untouched and the
        hidden folder is gone.
    """
    final = step_folder(run, step)
    writing = final.with_name(f".{final.name}.writing")
    old = final.with_name(f".{final.name}.old")
    with storage_faults(final, Path(run), needed_bytes=expected_bytes, reassurance=_UNTOUCHED):
        if expected_bytes > shutil.disk_usage(run).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            if not final.parent.is_dir():
                final.parent.mkdir()
                sync_folder(final.parent.parent)
            if writing.exists():
                shutil.rmtree(writing)
            writing.mkdir()
            manifest = Manifest(step, {name: _write(writing, name, files[name]) for name in files})
            write_manifest(writing / MANIFEST, manifest)
            sync_file(writing / MANIFEST)
            sync_folder(writing)
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.rename(final, old)
            os.rename(writing, final)
            sync_folder(final.parent)
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            if old.exists() and not final.exists():
                with contextlib.suppress(OSError):
                    os.rename(old, final)
            raise
        shutil.rmtree(old, ignore_errors=True)
        _set_aside_newer(run, step)
    return Checkpoint(final, manifest)


def write_new_folder(
    folder: Path | str, fill: Callable[[Path], None], *, step: int = 0, expected_bytes: int
) -> Checkpoint:
    """Write a folder that stands outside of any run, whole or not at all, and seal it.

    The order is that of ``write_checkpoint``: a hidden folder beside the final place, every file
    synced, the manifest, the new name.

    Args:
        folder: its parent exists, it does not: nothing is ever overwritten.
        fill: writes files with plain names into the folder it is given.
        step: for the manifest.
        expected_bytes: what all files together will take; asked of the disk before anything is
            written.

    Raises:
        CheckpointError: the folder exists, its parent does not, or the disk refused.
        DoesNotFitError: the disk, a quota or a file-size limit is full.
        After these and after any other exception nothing is left behind.
    """
    folder = Path(folder)
    require_new(folder)
    writing = folder.with_name(f".{folder.name}.{os.getpid()}.writing")
    nothing = "Nothing was left behind."
    with storage_faults(folder, folder.parent, needed_bytes=expected_bytes, reassurance=nothing):
        if expected_bytes > shutil.disk_usage(folder.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        writing.mkdir()
        try:
            fill(writing)
            files = sorted(writing.iterdir())
            for file in files:
                sync_file(file)
            manifest = Manifest(step, {file.name: record_file(file) for file in files})
            write_manifest(writing / MANIFEST, manifest)
            sync_file(writing / MANIFEST)
            sync_folder(writing)
            require_new(folder)
            os.rename(writing, folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise
    return Checkpoint(folder, manifest)


def require_new(path: Path) -> None:
    """Refuse a path at which something stands already, or whose parent is no folder.

    Raises:
        CheckpointError: naming the path.
    """
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path}: exists already; nothing is overwritten, give another name")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: cannot be written: there is no folder {path.parent}")


def open_checkpoint(folder: Path | str, *, check_hashes: bool = True) -> Checkpoint:
    """Open a step folder and verify it against its manifest.

    Args:
        folder: a step folder; it may have been copied out of its run and renamed.
        check_hashes: read every byte and compare SHA-256. Without it only presence and sizes
            are compared: fast, and blind to a flipped bit.

    Raises:
        CheckpointError: no manifest, a bad or newer manifest, or a file that is missing, of
            another size, or of other content; the message names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a checkpoint, step-N")
    if not (folder / MANIFEST).exists():
        raise CheckpointError(
            f"{folder}: {MANIFEST} is missing: the checkpoint was never finished, "
            "or the file was lost; use another checkpoint"
        )
    manifest = read_manifest(folder / MANIFEST)
    named = step_of(folder)
    if named is not None and named != manifest.step:
        raise CheckpointError(
            f"{folder}: its manifest says step {manifest.step}; was the folder renamed or swapped?"
        )
    for name, expected in manifest.files.items():
        _verify(folder / name, expected, check_hashes)
    return Checkpoint(folder, manifest)


def _set_aside_newer(run: Path | str, step: int) -> None:
    for folder in step_folders(run):
        if (step_of(folder) or 0) > step:
            aside = folder.with_name(f"abandoned-{folder.name}")
            if aside.exists():
                aside = aside.with_name(f"{aside.name}-{time.time_ns()}")
            os.rename(folder, aside)
            _LOG.warning("step %d was written: the later %s is now %s", step, folder, aside.name)


def _write(folder: Path, name: str, write: FileWriter) -> FileRecord:
    path = folder / name
    write(path)
    sync_file(path)
    return record_file(path)


def _verify(path: Path, expected: FileRecord, check_hashes: bool) -> None:
    found = record_file(path, hashed=False)
    if found.num_bytes != expected.num_bytes:
        raise CheckpointError(
            f"{path}: {found.num_bytes:,} bytes, its manifest says {expected.num_bytes:,}: "
            "truncated, or swapped with another checkpoint's"
        )
    if check_hashes and record_file(path).sha256 != expected.sha256:
        raise CheckpointError(
            f"{path}: its SHA-256 differs from the manifest's: the content was damaged "
            "or swapped with another checkpoint's"
        )
