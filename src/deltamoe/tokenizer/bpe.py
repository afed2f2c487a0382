"""Byte-level BPE in the file format of Hugging Face ``tokenizers``, trained here or elsewhere.

A tokenizer is its *definition*: the JSON of tokenizer.json without the parts that could lose text,
add ids or roll dice. Everything else, the fingerprint too, follows from that. Decoding is our own
table of bytes, because text generated so far may end in mid-character.

Knows nothing of where a definition comes from (file.py reads it) and trusts none of it.
Source: byte-level BPE is Radford et al. 2019; the alphabet that spells bytes as printable
characters is theirs, and the split into words follows the GPT-4 manner.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, models, pre_tokenizers, trainers

from deltamoe.errors import BadFileError, ConfigError
from deltamoe.tokenizer.base import joined_bytes, utf8
from deltamoe.tokenizer.special import END, END_NAMES, MAX_TOKEN_BYTES, MAX_VOCAB, border, stops

__all__ = ["BYTE_OF", "BpeTokenizer"]

_ID_RANGE = f"expected a whole number from 0 to {MAX_VOCAB - 1}"

# A word is: a contraction's tail; letters with at most one character before them; one to three
# digits; punctuation with the line ends after it; white space up to a line end; other white space,
# of which the last goes to the word that follows.
WORDS = (
    r"'(?i:[sdmt]|ll|re|ve)"
    r"|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


def _byte_alphabet() -> dict[str, int]:
    """The printable character that spells each byte in a byte-level vocabulary."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


# How byte-level vocabularies spell bytes: printable character -> byte.
BYTE_OF: Mapping[str, int] = _byte_alphabet()


class BpeTokenizer:
    """A byte-level BPE vocabulary; ``vocab_size`` is the largest id plus one.

    Args:
        definition: the parsed tokenizer.json. The post-processor, truncation and padding are left
            out: they add or drop ids.

    Raises:
        BadFileError: the definition is broken, beyond the bounds (1 M tokens of at most 1 KiB),
            not a byte-level BPE, or one that does not give every text back exactly.
    """

    def __init__(self, definition: Mapping[str, Any]) -> None:
        self._definition = {
            **definition,
            "truncation": None,
            "padding": None,
            "post_processor": None,
        }
        vocab = _checked_vocab(self._definition)
        added = _checked_added_tokens(self._definition, vocab)
        _check_pre_tokenizer(self._definition.get("pre_tokenizer"))
        self.special_ids: Mapping[str, int] = {
            entry["content"]: entry["id"] for entry in added if entry.get("special")
        }
        self.end_id = _border(self.special_ids)
        self.stop_ids = stops(self.special_ids) | {self.end_id}
        self.vocab_size = 1 + max(chain(vocab.values(), (entry["id"] for entry in added)))
        self.name = f"bpe:{self.vocab_size}"
        self._bytes: list[bytes | None] = [None] * self.vocab_size
        for token, token_id in vocab.items():
            self._bytes[token_id] = _spelled_bytes(token)
        for entry in added:
            self._bytes[entry["id"]] = utf8(entry["content"])
        self._bytes[self.end_id] = b""
        self.unused_ids = [i for i, piece in enumerate(self._bytes) if piece is None]
        self._engine = _built(self._definition)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BpeTokenizer":
        """Learn merges from texts; the same texts in the same order give the same tokenizer.

        Args:
            texts: read once, as a stream.
            vocab_size: ids wanted: 256 bytes, the merges and the border. A text too small to
                have that many merges gives fewer.

        Raises:
            ConfigError: ``vocab_size`` is not in [257, 1 M].
        """
        if not 257 <= vocab_size <= MAX_VOCAB:
            raise ConfigError(
                f"a BPE vocabulary of {vocab_size}: expected 257 (256 bytes and the border) "
                f"to {MAX_VOCAB}"
            )
        engine = tokenizers.Tokenizer(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        engine.decoder = tokenizers.decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=sorted(BYTE_OF),
            max_token_length=MAX_TOKEN_BYTES // 2,  # a byte is spelled with one or two
            show_progress=False,
        )
        engine.train_from_iterator(texts, trainer)
        engine.add_special_tokens([AddedToken(END, special=True, normalized=False)])
        return cls(json.loads(engine.to_str()))

    @property
    def definition(self) -> Mapping[str, Any]:
        """The content of ``tokenizer.json``; not to be changed."""
        return self._definition

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the definition in one canonical spelling."""
        canonical = json.dumps(self._definition, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        utf8(text)
        ids: list[int] = self._engine.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """``encode`` of each text, on all cores."""
        for text in texts:
            utf8(text)
        encodings = self._engine.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """``encode`` as an array."""
        # A batch of one, because only the batch call releases the interpreter lock.
        return np.array(self.encode_batch([text])[0], dtype=np.uint32)

    def decode_bytes(self, ids: Sequence[int] | NDArray[np.integer]) -> bytes:
        """UTF-8 bytes of some ids.

        Raises:
            DataError: an id that stands for nothing.
        """
        return joined_bytes(self._bytes, ids)

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Text of some ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json``, which Hugging Face ``tokenizers`` reads too."""
        text = json.dumps(self._definition, ensure_ascii=False, indent=1)
        (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")


def _unusable(reason: str) -> BadFileError:
    return BadFileError(f"not a usable tokenizer: {reason}")


def _is_id(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < MAX_VOCAB


def _checked_vocab(definition: Mapping[str, Any]) -> dict[str, int]:
    """The vocabulary of the model, after everything that could lose text has been refused."""
    if definition.get("normalizer") is not None:
        raise _unusable("its normalizer changes text; remove it from the file to use the rest")
    model = definition.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise _unusable("expected a model of type BPE")
    for key in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _unusable(f"expected no model.{key}, got {model[key]!r:.40}")

    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise _unusable("expected a vocab and a list of merges")
    if max(len(vocab), len(merges)) > MAX_VOCAB:
        raise _unusable(
            f"{len(vocab)} tokens, {len(merges)} merges: expected at most {MAX_VOCAB} of each"
        )
    for token, token_id in vocab.items():
        if not _is_id(token_id):
            raise _unusable(f"token {token!r:.40} has id {token_id!r:.40}: {_ID_RANGE}")
        if len(utf8(token)) > MAX_TOKEN_BYTES:
            raise _unusable(f"token {token!r:.40} is longer than {MAX_TOKEN_BYTES} bytes")
    if len(set(vocab.values())) < len(vocab):
        raise _unusable("two tokens share one id")
    if missing := sum(character not in vocab for character in BYTE_OF):
        raise _unusable(f"{missing} of the 256 bytes have no token, so it is not byte-level")
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not (
            isinstance(parts, list)
            and len(parts) == 2
            and all(isinstance(part, str) and part in vocab for part in parts)
            and "".join(parts) in vocab
        ):
            raise _unusable(f"merge {merge!r:.80} does not join two tokens into a third")
    return vocab


def _checked_added_tokens(
    definition: Mapping[str, Any], vocab: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The tokens that stand beside the BPE vocabulary."""
    added = definition.get("added_tokens", [])
    if not isinstance(added, list) or len(added) > MAX_VOCAB:
        raise _unusable(f"expected added_tokens to be a list of at most {MAX_VOCAB}")
    token_of = {token_id: token for token, token_id in vocab.items()}
    for token in added:
        if not isinstance(token, dict):
            raise _unusable(f"added token {token!r:.40}: expected an object")
        content, token_id = token.get("content"), token.get("id")
        if not isinstance(content, str) or not 0 < len(utf8(content)) <= MAX_TOKEN_BYTES:
            raise _unusable(f"added token {content!r:.40}: expected 1 to {MAX_TOKEN_BYTES} bytes")
        if not _is_id(token_id):
            raise _unusable(f"added token {content!r:.40} has id {token_id!r:.40}: {_ID_RANGE}")
        if token_of.setdefault(token_id, content) != content:
            raise _unusable(f"id {token_id} belongs to two tokens")
        if not token.get("special") and (token.get("lstrip") or token.get("rstrip")):
            raise _unusable(f"added token {content!r:.40} swallows the white space around it")
    return added


def _check_pre_tokenizer(pre_tokenizer: object) -> None:
    """Refuse a split into words that loses or adds text."""
    steps: object = [pre_tokenizer]
    if isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "Sequence":
        steps = pre_tokenizer.get("pretokenizers")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise _unusable("expected a byte-level pre-tokenizer")
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" not in kinds or not all(k in ("ByteLevel", "Split", "Digits") for k in kinds):
        raise _unusable(f"pre-tokenizer {kinds!r:.80}: expected ByteLevel after Split or Digits")
    if any(step.get("add_prefix_space") for step in steps):
        raise _unusable("it puts a space before every text; set add_prefix_space to false")
    if any(step.get("behavior") == "Removed" for step in steps):
        raise _unusable("its pre-tokenizer removes text")


def _border(special_ids: Mapping[str, int]) -> int:
    """The id of the document border."""
    found = border(special_ids)
    if found is None:
        raise _unusable(f"it has no document border: expected one special token of {END_NAMES}")
    return found


def _spelled_bytes(token: str) -> bytes:
    """The bytes a vocabulary entry stands for; one that spells none stands for its own text."""
    try:
        return bytes(BYTE_OF[character] for character in token)
    except KeyError:
        return utf8(token)


def _built(definition: Mapping[str, Any]) -> Any:
    try:
        engine = tokenizers.Tokenizer.from_str(json.dumps(definition))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        raise BadFileError(f"not a usable tokenizer: {error}") from None
    engine.encode_special_tokens = True  # a text that spells "<|end|>" is text, not a border
    return engine
