"""What every tokenizer promises, and a decoder that streams.

The promise: ``decode(encode(text)) == text`` for every text, whatever is in it, and ``end_id``
comes from no text. Knows nothing of files, documents or models.
"""

import codecs
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from deltamoe.errors import ConfigError, DataError

__all__ = ["StreamDecoder", "Tokenizer", "check_fit", "joined_bytes", "unknown_id", "utf8"]


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
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: ``end_id``, and where there are turns the end of one."""

    @property
    def special_ids(self) -> Mapping[str, int]:
        """The tokens no text encodes to, by their spelling: borders and the marks of turns."""

    @property
    def unused_ids(self) -> Sequence[int]:
        """Ids in ``[0, vocab_size)`` that stand for nothing; a model must not choose them."""

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


def check_fit(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer with ids that a model has no row for; fewer ids than rows are fine.

    Raises:
        ConfigError: it has more ids than ``vocab_size``.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model's "
            f"vocabulary {vocab_size}: they do not belong together"
        )


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


def joined_bytes(table: Sequence[bytes | None], ids: Sequence[int] | NDArray[np.integer]) -> bytes:
    """The bytes of some ids, one after the other; ``table[id]`` is None where nothing stands.

    Raises:
        DataError: an id outside the table, or one that stands for nothing.
    """
    pieces = []
    for token_id in ids.tolist() if isinstance(ids, np.ndarray) else ids:
        piece = table[token_id] if 0 <= token_id < len(table) else None
        if piece is None:
            raise unknown_id(token_id, len(table))
        pieces.append(piece)
    return b"".join(pieces)


def unknown_id(token_id: int, vocab_size: int) -> DataError:
    """The error for an id that no text has."""
    return DataError(
        f"token id {token_id} is not in this vocabulary: expected 0 to {vocab_size - 1}; "
        "the ids were made by another tokenizer"
    )
