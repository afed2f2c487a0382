"""Rows as documents: JSON lines here; parquet.py and hub.py yield the same kind."""

import gzip
import hashlib
import json
import zlib
from array import array
from collections.abc import Callable, Iterator
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any, cast

from deltamoe.config import open_regular
from deltamoe.data.document import (
    Document,
    Skipped,
    hash_cut,
    hash_prefix,
    not_utf8,
    read_pieces,
)
from deltamoe.errors import DataError

__all__ = ["Rows", "json_lines", "sha256_of_file"]

MAX_LINE_BYTES = 64 << 20


class Rows:
    """Many short texts, one document each, held out by the hash of their text.

    They are read as a stream and never held; the first reading only hashes them. Empty texts are
    skipped and listed.

    Args:
        name, description, sha256: as in ``Source``.
        texts: starts a reading: the name and text of each row in a fixed order.
    """

    def __init__(
        self,
        name: str,
        description: str,
        sha256: str,
        texts: Callable[[], Iterator[tuple[str, str]]],
    ) -> None:
        self.name = name
        self.description = description
        self.sha256 = sha256
        self.num_bytes: int | None = None
        self.skipped: list[Skipped] = []
        self._texts = texts
        self._prefixes = array("Q")

    def documents(self, validation_fraction: float) -> Iterator[Document]:
        """One document a row.

        Raises:
            DataError: a row is broken, or fewer than two hold text.
        """
        if not self._prefixes:
            self._hash_all()
        cut = hash_cut(self._prefixes, validation_fraction)
        for (name, data), prefix in zip(self._rows(), self._prefixes, strict=True):
            pieces = read_pieces(BytesIO(data), 0, len(data), name)
            yield Document(name, prefix <= cut, pieces)

    def _hash_all(self) -> None:
        self.num_bytes = 0
        for _, data in self._rows(self.skipped):
            self._prefixes.append(hash_prefix(hashlib.sha256(data).digest()))
            self.num_bytes += len(data)
        if len(self._prefixes) < 2:
            raise DataError(
                f"{self.name}: {len(self._prefixes)} rows hold text: expected at least two, "
                "one to train on and one to hold out"
            )

    def _rows(self, skipped: list[Skipped] | None = None) -> Iterator[tuple[str, bytes]]:
        for name, text in self._texts():
            try:
                data = text.encode("utf-8")
            except UnicodeEncodeError:
                raise DataError(f"{name}: its text holds half of a surrogate pair") from None
            if data:
                yield name, data
            elif skipped is not None:
                skipped.append(Skipped(name, "is empty"))


def json_lines(path: Path, text_field: str) -> Rows:
    """JSON lines, packed with gzip if the name says so: one object a line, its text in one field.

    Raises:
        DataError: there is no such file. While reading, naming file and byte: a line that is no
            UTF-8, no JSON object, without the field, or longer than 64 MiB; a torn gzip.
    """
    return Rows(
        str(path),
        f"the field {text_field!r} of the JSON lines in {path}",
        sha256_of_file(path),
        lambda: _json_texts(path, text_field),
    )


def sha256_of_file(path: Path) -> str:
    """Hash of a file's bytes.

    Raises:
        DataError: there is no such file.
    """
    with open_regular(path, error=DataError) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_texts(path: Path, text_field: str) -> Iterator[tuple[str, str]]:
    with open_regular(path, error=DataError) as file:
        is_packed = path.suffix == ".gz"
        lines = gzip.GzipFile(fileobj=file) if is_packed else file
        offset = 0
        while line := _next_line(lines, path, offset):
            if line.strip():
                yield f"{path} at byte {offset:,}", _text_of(line, path, offset, text_field)
            offset += len(line)


def _next_line(lines: BufferedIOBase, path: Path, offset: int) -> bytes:
    try:
        line = lines.readline(MAX_LINE_BYTES + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked after byte {offset:,}: {error}") from None
    if len(line) > MAX_LINE_BYTES:
        raise DataError(
            f"{path}: the line at byte {offset:,} is longer than {MAX_LINE_BYTES >> 20} MiB: "
            "expected one JSON object a line"
        )
    return line


def _text_of(line: bytes, path: Path, offset: int, text_field: str) -> str:
    try:
        row: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(str(path), offset + error.start) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: the line at byte {offset:,} is not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
        found = f"fields {sorted(row)!r:.100}" if isinstance(row, dict) else "no object"
        raise DataError(
            f"{path}: the line at byte {offset:,} has {found}: expected a text in the field "
            f"{text_field!r}; set data.text_field"
        )
    return cast(str, row[text_field])
