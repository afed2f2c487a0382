"""A tokenizer that needs no file: one id per UTF-8 byte, and one for the document border.

Knows nothing of merges.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from deltamoe.tokenizer.base import unknown_id, utf8
from deltamoe.tokenizer.special import END

__all__ = ["ByteTokenizer"]

_DEFINITION = {"format": 1, "type": "bytes"}


class ByteTokenizer:
    """Ids 0 to 255 are the bytes themselves; 256 is the document border."""

    name = "bytes"
    vocab_size = 257
    end_id = 256
    stop_ids = frozenset({end_id})
    special_ids: Mapping[str, int] = MappingProxyType({END: end_id})
    unused_ids: Sequence[int] = ()
    fingerprint = hashlib.sha256(json.dumps(_DEFINITION, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes of a text."""
        return list(utf8(text))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """``encode`` of each text."""
        return [self.encode(text) for text in texts]

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """``encode`` as an array."""
        return np.frombuffer(utf8(text), dtype=np.uint8).astype(np.uint32)

    def decode_bytes(self, ids: Sequence[int] | NDArray[np.integer]) -> bytes:
        """The ids as bytes, borders left out.

        Raises:
            DataError: an id outside [0, 256].
        """
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() <= self.end_id:
            outside = array[(array < 0) | (array > self.end_id)]
            raise unknown_id(int(outside[0]), self.vocab_size)
        return bytes(array[array != self.end_id].astype(np.uint8))

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Text of some ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json``, which says no more than "bytes"."""
        (folder / "tokenizer.json").write_text(json.dumps(_DEFINITION) + "\n", encoding="utf-8")
