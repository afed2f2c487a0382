"""The manifest: what a finished checkpoint holds, and the seal that says it is finished.

    {"format": 1, "step": 250, "files": {"model.safetensors": {"bytes": …, "sha256": …}, …},
     "sha256": "of all the above"}

It is written after every other file, so a folder without one was never finished. Its own hash
catches a flipped bit or an edit; it is no signature, for anyone can compute it.

Knows nothing of what the files mean. No torch.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamoe.config.strict_json import check_format, open_regular, read_json
from deltamoe.errors import CheckpointError

__all__ = [
    "FILE_NAME",
    "MANIFEST",
    "FileRecord",
    "Manifest",
    "read_manifest",
    "record_file",
    "write_manifest",
]

MANIFEST = "manifest.json"
_FORMAT = 1
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")  # never a path, never hidden
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """One file as it was when it was sealed."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The step of a checkpoint and its files, by plain name."""

    step: int
    files: Mapping[str, FileRecord]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together, without the manifest."""
        return sum(record.num_bytes for record in self.files.values())


def record_file(path: Path, *, hashed: bool = True) -> FileRecord:
    """Measure a file; with ``hashed`` false only its size (the hash is then empty).

    Raises:
        CheckpointError: missing, or no regular file.
    """
    with open_regular(path, error=CheckpointError) as file:
        num_bytes = file.seek(0, 2)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest() if hashed else ""
    return FileRecord(num_bytes, sha256)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a new manifest file; syncing it is the caller's part."""
    body = _body(manifest)
    path.write_text(json.dumps({**body, "sha256": _seal(body)}, indent=2) + "\n", encoding="ascii")


def read_manifest(path: Path) -> Manifest:
    """Read a manifest strictly.

    Raises:
        CheckpointError: missing, damaged, edited, or written by a newer deltamoe.
    """
    data = read_json(path, error=CheckpointError)
    check_format(data, source=str(path), known=_FORMAT, error=CheckpointError)
    _require(path, data.keys() == {"format", "step", "files", "sha256"}, "its keys")
    step, files = data["step"], data["files"]
    _require(path, type(step) is int and step >= 0, '"step"')
    _require(path, isinstance(files, dict) and len(files) > 0, '"files"')
    records = {name: _record(path, name, entry) for name, entry in files.items()}
    manifest = Manifest(step, records)
    _require(path, data["sha256"] == _seal(_body(manifest)), "its own hash")
    return manifest


def _record(path: Path, name: str, entry: Any) -> FileRecord:
    fault = f"the entry {name[:100]!a}"
    _require(path, FILE_NAME.fullmatch(name) is not None and name != MANIFEST, fault)
    _require(path, isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"}, fault)
    num_bytes, sha256 = entry["bytes"], entry["sha256"]
    _require(path, type(num_bytes) is int and num_bytes >= 0, fault)
    _require(path, isinstance(sha256, str) and _SHA256.fullmatch(sha256) is not None, fault)
    return FileRecord(num_bytes, sha256)


def _require(path: Path, is_good: bool, what: str) -> None:
    if not is_good:
        raise CheckpointError(
            f"{path}: {what} cannot be right: the manifest was damaged or edited, "
            "so the checkpoint cannot be trusted; use another one"
        )


def _body(manifest: Manifest) -> dict[str, Any]:
    files = {
        name: {"bytes": record.num_bytes, "sha256": record.sha256}
        for name, record in sorted(manifest.files.items())
    }
    return {"format": _FORMAT, "step": manifest.step, "files": files}


def _seal(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
