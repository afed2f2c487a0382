"""Token shards: how a split lies on the disk, written once and read as memory maps.

A split is the concatenation of its documents, each stored as ``[end_id, *tokens]``, so every token
of a text is predicted from what stands before it, and the end of a document predicts a border.

    train-00000.bin          token ids, uint16 or uint32, little endian; further shards follow
    train.documents.npy      uint64, where each document starts
    manifest.json            sizes, SHA-256, counts, the source and the tokenizer (manifest.py)
    tokenizer.json

Knows nothing of sources or batches.
"""

import hashlib
from array import array
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamoe.config import open_regular
from deltamoe.data.manifest import FileRecord, Manifest, Split, SplitRecord
from deltamoe.data.stream import Shard, TokenStream
from deltamoe.errors import DataError

__all__ = ["SplitWriter", "open_split"]

SHARD_TOKENS = 1 << 28


class SplitWriter:
    """Writes the shards of one split, document by document; used in a ``with`` block.

    Args:
        folder: an existing folder.
        split: "train" or "validation".
        dtype: of the ids on disk.
        end_id: put before each document.
    """

    def __init__(self, folder: Path, split: Split, dtype: np.dtype[Any], end_id: int) -> None:
        self._folder = folder
        self._split = split
        self._dtype = dtype.newbyteorder("<")
        self._border = np.array([end_id], dtype=self._dtype)
        self._starts = array("Q")
        self._num_tokens = 0
        self._num_bytes = 0
        self._shards: list[FileRecord] = []
        self._file: BufferedWriter | None = None

    def start_document(self) -> None:
        """Write a border; what follows belongs to a new document."""
        self._starts.append(self._num_tokens)
        self.write(self._border, 0)

    def write(self, ids: NDArray[np.integer], num_bytes: int) -> None:
        """Append ids and the number of UTF-8 bytes they stand for."""
        self._num_bytes += num_bytes
        self._num_tokens += len(ids)
        while len(ids):
            self._file = self._file or self._open_shard()
            written, ids = ids[: self._room], ids[self._room :]
            data = written.astype(self._dtype).tobytes()
            self._file.write(data)
            self._hash.update(data)
            self._room -= len(written)
            if self._room == 0:
                self._close_shard()

    def finish(self) -> SplitRecord:
        """Close the files and say what they hold; syncing them is the caller's part."""
        self._close_shard()
        path = self._folder / f"{self._split}.documents.npy"
        np.save(path, np.frombuffer(self._starts, dtype=np.uint64).astype("<u8"))
        starts = path.read_bytes()
        return SplitRecord(
            num_documents=len(self._starts),
            num_tokens=self._num_tokens,
            num_bytes=self._num_bytes,
            shards=tuple(self._shards),
            document_starts=FileRecord(path.name, len(starts), hashlib.sha256(starts).hexdigest()),
        )

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._close_shard()

    def _open_shard(self) -> BufferedWriter:
        path = self._folder / f"{self._split}-{len(self._shards):05d}.bin"
        self._hash = hashlib.sha256()
        self._room = SHARD_TOKENS
        return path.open("wb")

    def _close_shard(self) -> None:
        if self._file is None:
            return
        record = FileRecord(Path(self._file.name).name, self._file.tell(), self._hash.hexdigest())
        self._shards.append(record)
        self._file.close()
        self._file = None


def open_split(folder: Path, manifest: Manifest, split: Split, *, verify: bool) -> TokenStream:
    """Map a split of a prepared folder into memory.

    Sizes and document starts are always checked; with ``verify`` every hash, every id and every
    border too.

    Raises:
        DataError: a file is missing, truncated or altered; the message names it.
    """
    record = manifest.train if split == "train" else manifest.validation
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    shards = []
    for shard in record.shards:
        with _checked(folder, shard, verify) as file:
            name = str(folder / shard.file)
            shards.append(Shard(name, np.memmap(file, dtype=dtype, mode="r")))
    with _checked(folder, record.document_starts, verify) as file:
        starts = _document_starts(file, folder / record.document_starts.file, record)
    hashes = "".join(shard.sha256 for shard in (*record.shards, record.document_starts))
    stream = TokenStream(
        shards,
        starts,
        num_bytes=record.num_bytes,
        vocab_size=manifest.vocab_size,
        fingerprint=hashlib.sha256(hashes.encode()).hexdigest(),
    )
    if verify:
        _check_borders(stream, manifest.end_id, folder / record.document_starts.file)
    return stream


def _checked(folder: Path, record: FileRecord, verify: bool) -> BufferedReader:
    path = folder / record.file
    file = open_regular(path, error=DataError)
    num_bytes = file.seek(0, 2)
    file.seek(0)
    if num_bytes != record.num_bytes:
        file.close()
        raise DataError(
            f"{path}: ends at byte {num_bytes:,}, expected {record.num_bytes:,}: it was truncated "
            f"or replaced; remove {folder} and prepare the data again"
        )
    if verify and hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
        file.close()
        raise DataError(
            f"{path}: its SHA-256 is not that of the manifest: it was altered; "
            f"remove {folder} and prepare the data again"
        )
    file.seek(0)
    return file


def _document_starts(file: BufferedReader, path: Path, record: SplitRecord) -> NDArray[np.uint64]:
    try:
        starts = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, MemoryError, OSError) as error:
        raise DataError(f"{path}: not an array of document starts: {error}") from None
    if not (
        isinstance(starts, np.ndarray)
        and starts.dtype == np.uint64
        and starts.shape == (record.num_documents,)
        and starts[0] == 0
        and bool((starts[1:] > starts[:-1]).all())
        and starts[-1] < record.num_tokens
    ):
        raise DataError(
            f"{path}: expected {record.num_documents} positions ascending from 0, "
            f"below {record.num_tokens}; prepare the data again"
        )
    return starts


def _check_borders(stream: TokenStream, end_id: int, starts_path: Path) -> None:
    num_borders = 0
    for start in range(0, stream.num_tokens, 1 << 22):
        ids = stream.tokens(start, min(start + (1 << 22), stream.num_tokens))
        num_borders += int((ids == end_id).sum())
    at_starts = stream.take(stream.document_starts.astype(np.int64))
    if num_borders != stream.num_documents or not bool((at_starts == end_id).all()):
        raise DataError(
            f"{starts_path}: its {stream.num_documents} starts are not where the {num_borders} "
            f"document borders (id {end_id}) stand; prepare the data again"
        )
