"""Kimi's vocabulary: the ``tiktoken.model`` format, with its split into words and special tokens.

The file has a line for each token: its bytes in base64, a blank, its rank, which is also its id and
its turn to be merged. The special tokens stand behind them, at ids that tokenizer_config.json names
and that no text ever encodes to. Encoding is done by the ``tiktoken`` package, which is imported
here alone and never told to fetch anything; decoding is a table of bytes.

Knows nothing of chats and trusts no file. The Python file that published folders carry is not read.
Source: the format is tiktoken's; pattern, names and bounds are those published with
Kimi-Linear-48B-A3B.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamoe.config import open_regular, read_json
from deltamoe.errors import BadFileError, ConfigError
from deltamoe.tokenizer.base import joined_bytes, utf8
from deltamoe.tokenizer.special import END_NAMES, MAX_TOKEN_BYTES, MAX_VOCAB, border, stops

__all__ = ["SPLIT", "TIKTOKEN_FILE", "TOKENIZER_CONFIG", "TiktokenTokenizer", "read_tiktoken"]

TIKTOKEN_FILE = "tiktoken.model"
TOKENIZER_CONFIG = "tokenizer_config.json"

_MAX_FILE_BYTES = 64 << 20
_LINE = re.compile(rb"([A-Za-z0-9+/]{2,1400}={0,2}) ([0-9]{1,7})")

# Han is a script of its own; what is left of the letters is split by case.
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_TAIL = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT = "|".join(
    (
        r"[\p{Han}]+",
        f"{_BEFORE}[{_UPPER}]*[{_LOWER}]+{_TAIL}",
        f"{_BEFORE}[{_UPPER}]+[{_LOWER}]*{_TAIL}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# Where a long text is cut before it is split into words: part of the published definition, for a
# cut inside a word changes its ids.
_CUT_CHARACTERS = 400_000
_CUT_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")

# Ids behind the ranks: 256 have a row in the embedding. The published tokenizer counts two more,
# which have none and are left out here.
_NUM_SPECIAL = 256
_NUM_WITHOUT_ROW = 2
# For a folder without tokenizer_config.json: the published names, counted from the first id
# behind the ranks.
_NAMES = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    254: "[UNK]",
    255: "[PAD]",
}


class TiktokenTokenizer:
    """A vocabulary of ranks with special tokens behind it.

    Ids between two named special tokens are called ``<|reserved_token_N|>``, as published;
    ``vocab_size`` is the largest named id plus one.

    Args:
        tokens: the bytes of each id, in the order of the ranks.
        special_ids: names of ids behind them.

    Raises:
        BadFileError: more than 1 M tokens or one longer than 1 KiB, two that are equal, a byte
            without a token, a special id out of place, no known document border.
        ConfigError: the ``tiktoken`` package is not installed.
    """

    def __init__(self, tokens: Sequence[bytes], special_ids: Mapping[str, int]) -> None:
        _check_tokens(tokens)
        _check_special(special_ids, len(tokens))
        self.vocab_size = 1 + max(special_ids.values())
        self.special_ids: Mapping[str, int] = _with_reserved(special_ids, len(tokens))
        found = border(special_ids)
        if found is None:
            raise _unusable(f"it has no document border: expected one of {END_NAMES}")
        self.end_id = found
        self.stop_ids = stops(special_ids) | {found}
        self.unused_ids: Sequence[int] = ()
        self.name = f"tiktoken:{self.vocab_size}"
        self.tokens = tuple(tokens)
        self._bytes = [*tokens, *map(str.encode, self.special_ids)]
        self._bytes[self.end_id] = b""
        self._engine = _engine({token: rank for rank, token in enumerate(tokens)})

    @classmethod
    def from_definition(cls, definition: Mapping[str, Any]) -> "TiktokenTokenizer":
        """Read what ``save`` wrote.

        Raises:
            BadFileError: it is something else.
        """
        tokens, special_ids = definition.get("tokens"), definition.get("special")
        if not isinstance(tokens, list) or not isinstance(special_ids, dict):
            raise _unusable("expected tokens and special")
        return cls([_decoded(token) for token in tokens], special_ids)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of tokens and special tokens."""
        canonical = json.dumps(self._definition(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text; a text that spells a special token is text."""
        utf8(text)
        return list(chain.from_iterable(map(self._engine.encode_ordinary, _cut(text))))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """``encode`` of each text, on all cores."""
        for text in texts:
            utf8(text)
        pieces = [_cut(text) for text in texts]
        encoded = iter(self._engine.encode_ordinary_batch(list(chain.from_iterable(pieces))))
        return [list(chain.from_iterable(next(encoded) for _ in cut)) for cut in pieces]

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """``encode`` as an array."""
        return np.array(self.encode(text), dtype=np.uint32)

    def decode_bytes(self, ids: Sequence[int] | NDArray[np.integer]) -> bytes:
        """UTF-8 bytes of some ids; a special token but the border gives its name.

        Raises:
            DataError: an id outside ``[0, vocab_size)``.
        """
        return joined_bytes(self._bytes, ids)

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Text of some ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` in a form of our own, which needs no second file."""
        text = json.dumps(self._definition(), indent=0)
        (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")

    def save_ranks(self, path: Path) -> None:
        """Write a ``tiktoken.model``."""
        lines = (f"{_encoded(token)} {rank}\n" for rank, token in enumerate(self.tokens))
        path.write_text("".join(lines), encoding="ascii")

    def _definition(self) -> dict[str, Any]:
        return {
            "format": 1,
            "type": "tiktoken",
            "tokens": [_encoded(token) for token in self.tokens],
            "special": dict(self.special_ids),
        }


def read_tiktoken(folder: Path) -> TiktokenTokenizer:
    """Read ``tiktoken.model``, and the special tokens from tokenizer_config.json if it is there.

    Raises:
        BadFileError: a file is missing, longer than 64 MiB (1 MiB), or not what it should be; the
            message names the file and the line.
    """
    tokens = list(_ranked_tokens(folder / TIKTOKEN_FILE))
    path = folder / TOKENIZER_CONFIG
    config = read_json(path, error=BadFileError) if path.exists() else {}
    try:
        return TiktokenTokenizer(tokens, _special_ids(config, len(tokens)))
    except BadFileError as error:
        raise BadFileError(f"{folder}: {error}") from None


def _ranked_tokens(path: Path) -> Iterator[bytes]:
    with open_regular(path, error=BadFileError) as file:
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise BadFileError(f"{path}: longer than {_MAX_FILE_BYTES:,} bytes, which none needs")
    if content.count(b"\n") > MAX_VOCAB:
        raise BadFileError(f"{path}: more than {MAX_VOCAB:,} lines, one a token")
    for rank, line in enumerate(content.splitlines()):
        match = _LINE.fullmatch(line)
        if match is None or int(match[2]) != rank:
            raise BadFileError(
                f"{path}, line {rank + 1}: expected a token in base64, a blank and the rank "
                f"{rank}, got {line[:60]!r}"
            )
        try:
            yield _decoded(match[1])
        except BadFileError as error:
            raise BadFileError(f"{path}, line {rank + 1}: {error}") from None


def _special_ids(config: Mapping[str, Any], num_tokens: int) -> dict[str, int]:
    """Names of the ids behind the ranks, of those that have a row in the embedding."""
    named = config.get("added_tokens_decoder")
    if named is None:
        return {name: num_tokens + place for place, name in _NAMES.items()}
    if not isinstance(named, dict):
        raise _unusable("expected added_tokens_decoder to be an object")
    special_ids: dict[str, int] = {}
    for key, entry in named.items():
        name = entry.get("content") if isinstance(entry, dict) else entry
        if not isinstance(name, str) or not re.fullmatch("[0-9]{1,7}", key):
            raise _unusable(f"special token {key!r:.40}: expected an id, and a name as its content")
        if special_ids.setdefault(name, int(key)) != int(key):
            raise _unusable(f"two ids are called {name!r:.40}")
    without_row = range(num_tokens + _NUM_SPECIAL, num_tokens + _NUM_SPECIAL + _NUM_WITHOUT_ROW)
    return {name: token_id for name, token_id in special_ids.items() if token_id not in without_row}


def _check_tokens(tokens: Sequence[bytes]) -> None:
    if not len(tokens) <= MAX_VOCAB - _NUM_SPECIAL:
        raise _unusable(f"{len(tokens):,} tokens; expected at most {MAX_VOCAB - _NUM_SPECIAL:,}")
    if not all(0 < len(token) <= MAX_TOKEN_BYTES for token in tokens):
        raise _unusable(f"a token is empty or longer than {MAX_TOKEN_BYTES} bytes")
    different = set(tokens)
    if len(different) < len(tokens):
        raise _unusable(f"{len(tokens) - len(different)} tokens stand twice")
    if missing := sum(bytes([byte]) not in different for byte in range(256)):
        raise _unusable(f"{missing} of the 256 bytes have no token, so some texts have no ids")


def _check_special(special_ids: Mapping[str, Any], first: int) -> None:
    for name, token_id in special_ids.items():
        if not 0 < len(utf8(name)) <= MAX_TOKEN_BYTES:
            raise _unusable(f"special token {name!r:.40}: expected 1 to {MAX_TOKEN_BYTES} bytes")
        if type(token_id) is not int or not first <= token_id < first + _NUM_SPECIAL:
            raise _unusable(
                f"special token {name!r:.40} has id {token_id!r:.40}: expected one behind the "
                f"{first:,} ranks, {first} to {first + _NUM_SPECIAL - 1}"
            )
    if len(set(special_ids.values())) < len(special_ids):
        raise _unusable("two special tokens share one id")
    if not special_ids:
        raise _unusable("it has no special tokens")


def _with_reserved(special_ids: Mapping[str, int], first: int) -> dict[str, int]:
    """The special tokens by id, and names for the ids between them."""
    name_of = {token_id: name for name, token_id in special_ids.items()}
    last = max(name_of)
    named = [name_of.get(i, f"<|reserved_token_{i}|>") for i in range(first, last + 1)]
    if len(set(named)) < len(named):
        raise _unusable("a special token has the name that is reserved for another id")
    return {name: first + place for place, name in enumerate(named)}


def _cut(text: str) -> list[str]:
    """The text in the pieces that are split into words one by one."""
    if len(text) <= _CUT_RUN:
        return [text]
    pieces = []
    for start in range(0, len(text), _CUT_CHARACTERS):
        part = text[start : start + _CUT_CHARACTERS]
        within_runs = (
            range(run.start() + _CUT_RUN, run.end(), _CUT_RUN) for run in _RUN.finditer(part)
        )
        cuts = [0, *chain.from_iterable(within_runs), len(part)]
        pieces += [part[begin:end] for begin, end in pairwise(cuts)]
    return pieces


def _encoded(token: bytes) -> str:
    return base64.b64encode(token).decode("ascii")


def _decoded(token: object) -> bytes:
    try:
        return base64.b64decode(token, validate=True)  # type: ignore[arg-type]
    except (binascii.Error, ValueError, TypeError):
        raise _unusable(f"{token!r:.60} is not base64") from None


def _engine(ranks: Mapping[bytes, int]) -> Any:
    try:
        import tiktoken
    except ImportError:
        raise ConfigError(
            "this vocabulary needs the tiktoken package: pip install 'deltamoe[published]'"
        ) from None
    return tiktoken.Encoding("kimi", pat_str=SPLIT, mergeable_ranks=dict(ranks), special_tokens={})


def _unusable(reason: str) -> BadFileError:
    return BadFileError(f"not a usable tokenizer: {reason}")
