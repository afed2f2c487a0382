"""Text files as documents: one large file cut by position, or many files of one document each."""

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from deltamoe.config import open_regular
from deltamoe.data.cache import TAG
from deltamoe.data.document import (
    Document,
    Skipped,
    hash_cut,
    hash_prefix,
    read_pieces,
    sha256_of,
    split_by_position,
)
from deltamoe.errors import DataError

__all__ = ["TextFile", "TextFiles", "folder"]


class TextFile:
    """One file; its end is held out. A file that is not UTF-8 is an error.

    Raises:
        DataError: there is no such file, or it is empty.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.description = f"the text file {path}"
        self.skipped: tuple[Skipped, ...] = ()
        with open_regular(path, error=DataError) as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            self.num_bytes = file.tell()
        if self.num_bytes == 0:
            raise DataError(f"{path}: the file is empty (0 bytes): expected UTF-8 text")
        self._path = path

    def documents(self, validation_fraction: float) -> Iterator[Document]:
        """Two documents, cut by position."""
        with open_regular(self._path, error=DataError) as file:
            yield from split_by_position(file, self.num_bytes, self.name, validation_fraction)


class _Text(NamedTuple):
    name: str
    read: Callable[[], bytes]
    digest: bytes
    num_bytes: int


class TextFiles:
    """Many texts, one document each, held out by the hash of their bytes.

    What is empty, not UTF-8 or cannot be read is skipped and listed. A single text is cut by
    position instead.

    Args:
        name, description: as in ``Source``.
        texts: the name of each text and what reads its bytes, in the order to keep.
        has_duplicates: keep every text; False keeps the first of equal ones.

    Raises:
        DataError: no text is left.
    """

    def __init__(
        self,
        name: str,
        description: str,
        texts: Iterable[tuple[str, Callable[[], bytes]]],
        *,
        has_duplicates: bool = True,
    ) -> None:
        self.name = name
        self.skipped: list[Skipped] = []
        self._texts = list(self._usable(texts, has_duplicates))
        self.num_bytes = sum(text.num_bytes for text in self._texts)
        self.sha256 = sha256_of((text.name, text.digest) for text in self._texts)
        self.description = f"{description}: {len(self._texts):,} documents"
        if not self._texts:
            reasons = "; ".join(f"{file}: {reason}" for file, reason in self.skipped[:3])
            raise DataError(
                f"{name}: no UTF-8 text found ({len(self.skipped)} files skipped) {reasons}"
            )

    def documents(self, validation_fraction: float) -> Iterator[Document]:
        """One document a text; two, cut by position, if there is but one text."""
        if len(self._texts) == 1:
            (text,) = self._texts
            data = io.BytesIO(_read_again(text))
            yield from split_by_position(data, text.num_bytes, text.name, validation_fraction)
            return
        held_out = self.held_out(validation_fraction)
        for number, text in enumerate(self._texts):
            data = io.BytesIO(_read_again(text))
            pieces = read_pieces(data, 0, text.num_bytes, text.name)
            yield Document(text.name, number in held_out, pieces)

    def held_out(self, validation_fraction: float) -> set[int]:
        """Numbers of the texts that are held out."""
        prefixes = [hash_prefix(text.digest) for text in self._texts]
        cut = hash_cut(prefixes, validation_fraction)
        return {number for number, prefix in enumerate(prefixes) if prefix <= cut}

    def sizes(self) -> list[tuple[str, int]]:
        """Name and UTF-8 bytes of each text."""
        return [(text.name, text.num_bytes) for text in self._texts]

    def _usable(
        self, texts: Iterable[tuple[str, Callable[[], bytes]]], has_duplicates: bool
    ) -> Iterator[_Text]:
        seen: set[bytes] = set()
        for name, read in texts:
            try:
                data = read()
                data.decode("utf-8")
            except OSError as error:
                self.skipped.append(Skipped(name, f"cannot be read: {error.strerror}"))
                continue
            except UnicodeDecodeError as error:
                self.skipped.append(Skipped(name, f"byte {error.start:,} is not UTF-8"))
                continue
            if not data:
                self.skipped.append(Skipped(name, "is empty"))
                continue
            digest = hashlib.sha256(data).digest()
            if has_duplicates or digest not in seen:
                seen.add(digest)
                yield _Text(name, read, digest, len(data))


def folder(path: Path) -> TextFiles:
    """Every text file below a folder, in the order of their paths; hidden ones are left out."""
    return TextFiles(
        str(path),
        f"text files below {path}",
        ((str(file.relative_to(path)), file.read_bytes) for file in walk(path)),
    )


def walk(root: Path, *, ending: str = "", without: frozenset[str] = frozenset()) -> list[Path]:
    """Regular files below a folder, sorted by path; links to folders are not followed.

    Args:
        root: the folder.
        ending: how a file's name must end.
        without: names of folders that are not entered; hidden ones, __pycache__ and caches marked
            by CACHEDIR.TAG never are.
    """
    found = []
    for parent, folders, files in os.walk(root):
        if TAG in files:  # a cache, perhaps our own, that happens to lie below the source
            folders.clear()
            continue
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and name != "__pycache__" and name not in without
        ]
        for name in files:
            file = Path(parent, name)
            if not name.startswith(".") and name.endswith(ending) and file.is_file():
                found.append(file)
    return sorted(found, key=lambda file: file.relative_to(root).parts)


def _read_again(text: _Text) -> bytes:
    data = text.read()
    if hashlib.sha256(data).digest() != text.digest:
        raise DataError(f"{text.name}: it changed while being read; try again")
    return data
