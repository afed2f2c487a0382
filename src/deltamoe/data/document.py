"""Documents: what every source of text yields, and which of them are held out.

A source knows its text and its own rule for the split: by the hash of each document, by position
for a single file, by year for dated speeches. Knows nothing of tokens or shards.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from typing import NamedTuple, Protocol, runtime_checkable

from deltamoe.errors import DataError

__all__ = [
    "Document",
    "Skipped",
    "Source",
    "hash_cut",
    "hash_prefix",
    "not_utf8",
    "read_pieces",
    "sha256_of",
    "split_by_position",
]

PIECE_BYTES = 1 << 18


@dataclass(frozen=True)
class Document:
    """One text, in pieces small enough to be tokenised in parallel.

    Attributes:
        name: what messages call it, a path or a row.
        is_validation: it is held out.
        pieces: its text in order, each at most ``PIECE_BYTES`` of UTF-8; read once.
    """

    name: str
    is_validation: bool
    pieces: Iterator[str]


class Skipped(NamedTuple):
    """Something a source left out, and why."""

    name: str
    reason: str


@runtime_checkable
class Source(Protocol):
    """Where documents come from; its texts are the same at every reading."""

    @property
    def name(self) -> str:
        """What a configuration calls it."""

    @property
    def description(self) -> str:
        """One line for the manifest."""

    @property
    def sha256(self) -> str:
        """Hash of all its texts and their names; changes when a text does."""

    @property
    def num_bytes(self) -> int | None:
        """UTF-8 bytes of all texts, or None while only reading them would tell."""

    @property
    def skipped(self) -> Sequence[Skipped]:
        """What was left out; complete once ``documents`` has been read to the end."""

    def documents(self, validation_fraction: float) -> Iterator[Document]:
        """All documents in a fixed order, each to be read before the next is asked for.

        Raises:
            DataError: a text is not UTF-8, a row is broken, or nothing is there.
        """


def hash_cut(digests: Sequence[int], validation_fraction: float) -> int:
    """The largest hash that is held out: that of the last of the smallest ``fraction``.

    A document keeps its side wherever it stands in the corpus, and equal documents share a side.
    At least one hash lies on each side when two differ.
    """
    different = sorted(set(digests))
    wanted = round(validation_fraction * len(different))
    return different[min(max(wanted, 1), max(len(different) - 1, 1)) - 1]


def hash_prefix(digest: bytes) -> int:
    """The first 64 bits of a SHA-256, as the number that ``hash_cut`` compares."""
    return int.from_bytes(digest[:8], "big")


def split_by_position(
    file: BufferedIOBase, num_bytes: int, name: str, validation_fraction: float
) -> Iterator[Document]:
    """One text as two documents: all but the last ``fraction`` of its bytes, and those.

    The cut is at byte ``int(num_bytes * (1 - fraction))``, or before the character it falls into.
    """
    cut = int(num_bytes * (1 - validation_fraction))
    file.seek(cut)
    following = file.read(1)
    while cut > 0 and following and _continues_character(following[0]):
        cut -= 1
        file.seek(cut)
        following = file.read(1)
    if not 0 < cut < num_bytes:
        raise DataError(f"{name}: {num_bytes} bytes are too few to hold some out")
    yield Document(name, False, read_pieces(file, 0, cut, name))
    yield Document(name, True, read_pieces(file, cut, num_bytes, name))


def read_pieces(file: BufferedIOBase, start: int, stop: int, name: str) -> Iterator[str]:
    """The text between two bytes of a file, in pieces that join to exactly that text.

    A piece ends after a line where it can, and never inside a character, so a text with no line end
    at all is read in bounded memory too.

    Raises:
        DataError: bytes that are not UTF-8, named by their offset, or a file that ended early.
    """
    position = start
    while position < stop:
        file.seek(position)
        wanted = min(PIECE_BYTES, stop - position)
        data = file.read(wanted)
        if len(data) < wanted:
            raise DataError(
                f"{name}: ended at byte {position + len(data):,}, expected {stop:,}: it changed "
                "while being read; try again"
            )
        if position + len(data) < stop:
            data = data[: _piece_end(data)]
        try:
            yield data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(name, position + error.start) from None
        position += len(data)


def not_utf8(name: str, offset: int) -> DataError:
    """The error for bytes that are no text."""
    return DataError(
        f"{name}: byte {offset:,} is not UTF-8: expected UTF-8 text; convert it with "
        "`iconv -t utf-8`"
    )


def sha256_of(parts: Iterator[tuple[str, bytes]]) -> str:
    """One hash for named digests in order."""
    whole = hashlib.sha256()
    for name, digest in parts:
        whole.update(name.encode("utf-8", "surrogateescape") + b"\0" + digest)
    return whole.hexdigest()


def _continues_character(byte: int) -> bool:
    return byte & 0xC0 == 0x80


def _piece_end(data: bytes) -> int:
    """Where to cut: after the last line end of the second half, else before the last character.

    The line end must have no white space after it; then no word of a BPE reaches across the cut.
    """
    half = len(data) // 2
    line_end = data.rfind(b"\n", half, len(data) - 1)
    while line_end >= 0 and data[line_end + 1 : line_end + 2].isspace():
        line_end = data.rfind(b"\n", half, line_end)
    if line_end >= 0:
        return line_end + 1
    end = len(data) - 1
    while end > len(data) - 4 and _continues_character(data[end]):
        end -= 1
    return end
