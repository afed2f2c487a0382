"""A tokenizer as the vocabulary of a GGUF file, and back.

llama.cpp calls byte-level BPE "gpt2": tokens spelled in the byte alphabet, merges in order, and
the *name* of a rule that splits text into words. The rules are compiled into llama.cpp, so a
tokenizer can be written only if its own rule has a name there (``_RULES``). Tokens and merges are
those of the published ``tokenizer.json``, where bytes and Kimi's ranks are a BPE too.

The file also carries our own definition, for the way back; llama.cpp does not look at it.

Knows nothing of tensors. No torch.
Source: llama.cpp's src/llama-vocab.cpp, what it reads and what it knows.
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deltamoe.errors import BadFileError, CheckpointError, ConfigError
from deltamoe.tokenizer import Tokenizer, load_tokenizer, published_definition, published_ids
from deltamoe.tokenizer.bpe import WORDS
from deltamoe.tokenizer.tiktoken import SPLIT

__all__ = ["TOKENIZER_KEY", "tokenizer_of", "vocabulary"]

TOKENIZER_KEY = "deltamoe.tokenizer"

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT_2 = "the rule built into ByteLevel"
_NO_MERGES = "kimi-k2"  # the only name under which llama.cpp accepts a file without merges
# WORDS differs from its namesake in one thing: to us a combining mark is part of its word.
_RULES = {WORDS: "llama-bpe", _LLAMA_3: "llama-bpe", SPLIT: "kimi-k2", _GPT_2: "gpt-2"}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def vocabulary(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The keys that describe a tokenizer.

    llama.cpp is told to put the document border before a text, as everything here does, unless
    the model was trained on turns: there the marks of the turns are the prompt's beginning.

    Args:
        tokenizer: any of ours.
        vocab_size: rows of the model's embedding. Those beyond the tokenizer's ids are declared
            unused.

    Raises:
        ConfigError: more ids than rows, or a split rule that llama.cpp has no name for.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, model.vocab_size is {vocab_size:,}; "
            "is it the model's?"
        )
    definition = published_definition(tokenizer)
    model = definition["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [_UNUSED] * vocab_size
    for token, token_id in model["vocab"].items():
        tokens[token_id], kinds[token_id] = token, _NORMAL
    for entry in definition["added_tokens"]:
        tokens[entry["id"]] = entry["content"]
        kinds[entry["id"]] = _CONTROL if entry.get("special") else _USER_DEFINED
    ids = published_ids(tokenizer)
    keys: dict[str, Any] = {
        "model": "gpt2",
        "pre": _rule_name(definition["pre_tokenizer"]) if merges else _NO_MERGES,
        "tokens": tokens,
        "token_type": kinds,
        **({"merges": merges} if merges else {}),
        "bos_token_id": ids["bos_token_id"],
        "eos_token_id": ids["eos_token_id"],
        "add_bos_token": ids["bos_token_id"] == ids["eos_token_id"],
        "add_eos_token": False,
    }
    fields = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return fields | {TOKENIZER_KEY: _saved(tokenizer)}


def tokenizer_of(fields: Mapping[str, Any], *, source: str) -> Tokenizer | None:
    """The tokenizer of a file of ours; None if another program wrote the file.

    Raises:
        CheckpointError: the definition is damaged, or cannot be trusted.
    """
    definition = fields.get(TOKENIZER_KEY)
    if definition is None:
        return None
    if not isinstance(definition, str):
        raise CheckpointError(f"{source}: {TOKENIZER_KEY}: expected text")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(definition, encoding="utf-8")
        try:
            return load_tokenizer(path)
        except BadFileError as fault:
            reason = str(fault).removeprefix(f"{path}: ")
            raise CheckpointError(f"{source}: {TOKENIZER_KEY}: {reason}") from None


def _saved(tokenizer: Tokenizer) -> str:
    with TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        return (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")


def _rule_name(pre_tokenizer: Mapping[str, Any]) -> str:
    """What llama.cpp calls the rule that splits text into words."""
    *splits, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    rules = [
        step["pattern"].get("Regex") if _is_plain_split(step) else step["type"] for step in splits
    ]
    if last["type"] != "ByteLevel" or last.get("use_regex", True):
        rules.append(_GPT_2 if last["type"] == "ByteLevel" else last["type"])
    if len(rules) != 1 or rules[0] not in _RULES:
        raise ConfigError(
            "the tokenizer's rule that splits text into words has no name in llama.cpp, so that "
            f"its ids would differ there: {rules!r:.200}"
        )
    return _RULES[rules[0]]


def _is_plain_split(step: Mapping[str, Any]) -> bool:
    return step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert")
