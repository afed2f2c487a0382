"""manifest.json: what a prepared folder holds and what it was made of.

It is written after every other file, so a folder without one was never finished. Knows nothing of
token ids.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deltamoe.config import check_format, read_json
from deltamoe.errors import DataError

__all__ = [
    "MANIFEST",
    "FileRecord",
    "Manifest",
    "Split",
    "SplitRecord",
    "read_manifest",
    "write_manifest",
]

MANIFEST = "manifest.json"
FORMAT = 1

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class FileRecord:
    """One file of a prepared folder as it was when it was written."""

    file: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitRecord:
    """What one split holds.

    Attributes:
        num_documents: documents.
        num_tokens: tokens, one border for each document included.
        num_bytes: UTF-8 bytes of the text.
        shards: the files of token ids, in order.
        document_starts: the file of starts.
    """

    num_documents: int
    num_tokens: int
    num_bytes: int
    shards: tuple[FileRecord, ...]
    document_starts: FileRecord


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds and what it was made of.

    Attributes:
        source: the name it was asked for by.
        description: one line on the source.
        source_sha256: hash of all its texts.
        num_skipped: texts left out: empty, not UTF-8, unreadable.
        skipped: the first of them, with the reason.
        validation_fraction: the share that was asked to be held out.
        tokenizer: its name.
        tokenizer_fingerprint: its hash.
        vocab_size, end_id: its ids and its document border.
        dtype: "uint16" or "uint32".
        train, validation: the two splits.
    """

    source: str
    description: str
    source_sha256: str
    num_skipped: int
    skipped: tuple[str, ...]
    validation_fraction: float
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    end_id: int
    dtype: str
    train: SplitRecord
    validation: SplitRecord

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in manifest.json."""
        return {"format": FORMAT, **asdict(self)}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``; syncing it is the caller's part."""
    text = json.dumps(manifest.to_dict(), indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json`` strictly.

    Raises:
        DataError: missing, damaged, or written by a newer deltamoe.
    """
    path = folder / MANIFEST
    data = read_json(path, max_bytes=16 << 20, error=DataError)
    check_format(data, source=str(path), known=FORMAT, error=DataError)
    try:
        manifest = _manifest(data)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: damaged or edited ({type(error).__name__}: {error}); prepare the data again"
        ) from None
    return manifest


def _manifest(data: dict[str, Any]) -> Manifest:
    fields = {key: value for key, value in data.items() if key != "format"}
    fields["skipped"] = tuple(_as(str, item) for item in _as(list, data["skipped"]))
    dtype = _one_of(("uint16", "uint32"), data["dtype"])
    for split in ("train", "validation"):
        fields[split] = _split_record(split, _as(dict, data[split]), np.dtype(dtype).itemsize)
    for key in ("source", "description", "source_sha256", "tokenizer", "tokenizer_fingerprint"):
        _as(str, data[key])
    for key in ("num_skipped", "vocab_size", "end_id"):
        _count(data[key])
    _as(float, data["validation_fraction"])
    if not 0 <= data["end_id"] < data["vocab_size"] <= 1 << 32:
        raise ValueError(f"end_id {data['end_id']} in a vocabulary of {data['vocab_size']}")
    return Manifest(**fields)


def _split_record(split: str, data: dict[str, Any], token_bytes: int) -> SplitRecord:
    shards = [
        _file_record(f"{split}-{number:05d}.bin", shard)
        for number, shard in enumerate(_as(list, data["shards"]))
    ]
    record = SplitRecord(
        num_documents=_count(data["num_documents"]),
        num_tokens=_count(data["num_tokens"]),
        num_bytes=_count(data["num_bytes"]),
        shards=tuple(shards),
        document_starts=_file_record(f"{split}.documents.npy", data["document_starts"]),
    )
    if any(shard.num_bytes == 0 for shard in shards):
        raise ValueError(f"a {split} shard of 0 bytes")
    if sum(shard.num_bytes for shard in shards) != record.num_tokens * token_bytes:
        raise ValueError(f"the sizes of the {split} shards do not add up to {split}.num_tokens")
    if not 0 < record.num_documents <= record.num_tokens:
        raise ValueError(f"{record.num_documents} documents in {record.num_tokens} tokens")
    return record


def _file_record(name: str, data: dict[str, Any]) -> FileRecord:
    return FileRecord(
        _one_of((name,), data["file"]), _count(data["num_bytes"]), _as(str, data["sha256"])
    )


def _as(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r:.60} is no {kind.__name__}")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.60} is no whole number >= 0")
    return value


def _one_of(expected: Sequence[str], value: Any) -> str:
    if value not in expected:
        raise ValueError(f"{value!r:.60}: expected {' or '.join(expected)}")
    return str(value)
