"""The names by which a vocabulary's border and stops are known, and what a vocabulary may hold.

Knows nothing of how ids are found for a text.
"""

from collections.abc import Mapping

__all__ = ["END", "END_NAMES", "MAX_TOKEN_BYTES", "MAX_VOCAB", "border", "stops"]

END = "<|end|>"
# What other vocabularies call the border; the first one present is taken. Kimi's has a token before
# each document, [BOS], and one behind it: the border stands before.
END_NAMES = (END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[BOS]", "[EOS]")
# What ends an answer beside the border: the end of a document, of a text, of a turn.
_STOP_NAMES = (*END_NAMES, "[EOT]", "<|im_end|>")

MAX_VOCAB = 1_000_000
MAX_TOKEN_BYTES = 1024


def border(special_ids: Mapping[str, int]) -> int | None:
    """The id of the document border, or None if no name is known."""
    return next((special_ids[name] for name in END_NAMES if name in special_ids), None)


def stops(special_ids: Mapping[str, int]) -> frozenset[int]:
    """The ids that end an answer."""
    return frozenset(special_ids[name] for name in _STOP_NAMES if name in special_ids)
