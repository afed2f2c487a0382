"""What every tokenizer promises, and a decoder that streams.

The promise: ``decode(encode(text)) == text`` for every text, whatever is in it, and ``end_id``
comes from no text. Knows nothing of files, documents or models.
"""

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from deltamoe.errors import DataError

__all__ = ["StreamDecoder", "Tokenizer", "unknown_id", "utf8"]


@runtime_checkable
class Tokenizer(Protocol):
    """Turns text into token ids in ``[0, vocab_size)`` and back."""

    @property
    def name(self) -> str:
        """What a configuration calls it: "bytes", "bpe:4096"."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, ``end_id`` included."""

    @property
    def end_id(self) -> int:
        """The document border: it stands before every document and starts every prompt."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that defines it; equal fingerprints encode equally."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never ``end_id``, not even for a text that spells it.

        Raises:
            DataError: the text holds a lone surrogate, which no UTF-8 can carry.
        """

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """``encode`` of each text, on all cores."""

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """``encode`` for large texts: an array; releases the interpreter lock while it works."""

    def decode_bytes(self, ids: Sequence[int] | NDArray[np.integer]) -> bytes:
        """UTF-8 bytes of some ids; ``end_id`` gives none. They may begin or end in mid-character.

        Raises:
            DataError: an id outside ``[0, vocab_size)``, or one that stands for nothing.
        """

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Text of some ids; bytes that are no UTF-8 become U+FFFD."""

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` into an existing folder."""


class StreamDecoder:
    """Turns ids into text one at a time and holds back a character until all its bytes are here.

    The pieces, joined, are ``tokenizer.decode(ids)``.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Text that became certain with this id; often empty."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token_id]))

    def finish(self) -> str:
        """U+FFFD for a character that never became whole; the decoder can then be used again."""
        return self._decoder.decode(b"", final=True)


def utf8(text: str) -> bytes:
    """UTF-8 bytes of a text.

    Raises:
        DataError: the text holds a lone surrogate.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character "
            f"{error.start}: expected text that UTF-8 can carry"
        ) from None


def unknown_id(token_id: int, vocab_size: int) -> DataError:
    """The error for an id that no text has."""
    return DataError(
        f"token id {token_id} is not in this vocabulary: expected 0 to {vocab_size - 1}; "
        "the ids were made by another tokenizer"
    )
