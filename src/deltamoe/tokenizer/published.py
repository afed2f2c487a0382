"""A tokenizer in the files that other tools read: the folder ``AutoTokenizer`` opens.

``tokenizer.json`` is written in the format of Hugging Face ``tokenizers`` for every kind, so that
no code has to travel with it: bytes are a BPE without merges, ranks become merges. Nothing is put
before a text: a tool that wants the document border writes ``bos_token`` itself. What the format
cannot say is where ranks cut long texts (tiktoken.py: ``_cut``): around a cut the ids may differ.

Knows nothing of models. ``load_tokenizer`` in file.py is the way back.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from deltamoe.errors import BadFileError
from deltamoe.tokenizer.base import Tokenizer
from deltamoe.tokenizer.bpe import BYTE_OF, BpeTokenizer
from deltamoe.tokenizer.byte import ByteTokenizer
from deltamoe.tokenizer.chat_template import CHAT_TEMPLATE, ChatTemplate
from deltamoe.tokenizer.special import END
from deltamoe.tokenizer.tiktoken import SPLIT, TIKTOKEN_FILE, TOKENIZER_CONFIG, TiktokenTokenizer

__all__ = ["is_bytes", "published_definition", "published_ids", "save_published"]

_SPELLED = {byte: character for character, byte in BYTE_OF.items()}
_ENDS = ("<|im_end|>", "[EOS]")
_PADS = ("[PAD]", "<|pad|>", "<pad>")


def save_published(
    tokenizer: Tokenizer, folder: Path, *, chat_template: ChatTemplate | None = None
) -> list[Path]:
    """Write a tokenizer for other tools into an existing folder.

    Args:
        tokenizer: any of this package's.
        folder: gets tokenizer.json and tokenizer_config.json; tiktoken.model for a vocabulary of
            ranks; chat_template.jinja if there are turns.
        chat_template: the form of the turns, if the model knows any.

    Returns:
        the files written.

    Raises:
        BadFileError: its ids cannot be kept in this format.
    """
    definition = published_definition(tokenizer)
    files = {
        "tokenizer.json": _json(definition),
        TOKENIZER_CONFIG: _json(_tokenizer_config(tokenizer)),
    }
    if chat_template is not None:
        files[CHAT_TEMPLATE] = chat_template.jinja()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    if isinstance(tokenizer, TiktokenTokenizer):
        tokenizer.save_ranks(folder / TIKTOKEN_FILE)
        files[TIKTOKEN_FILE] = ""
    return [folder / name for name in files]


def published_definition(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a ``tokenizer.json`` that gives the same ids everywhere.

    Ids that stand for nothing get a name, ``<|reserved_token_N|>``: a reader of the format counts
    the tokens beside the vocabulary instead of reading their ids.

    Raises:
        BadFileError: it would count otherwise.
    """
    match tokenizer:
        case ByteTokenizer():
            definition = _byte_definition()
        case TiktokenTokenizer():
            definition = _ranks_definition(tokenizer)
        case BpeTokenizer():
            definition = {**tokenizer.definition, "added_tokens": _without_holes(tokenizer)}
        case _:
            raise TypeError(f"{tokenizer!r}: none of this package's tokenizers")
    engine = tokenizers.Tokenizer.from_str(json.dumps(definition))
    for token in definition["added_tokens"]:
        name, token_id = token["content"], token["id"]
        if engine.token_to_id(name) != token_id:
            raise BadFileError(
                f"the tokenizer {tokenizer.name} cannot be exported: {name!r} has id {token_id}, "
                f"in tokenizer.json it would become {engine.token_to_id(name)}"
            )
    return definition


def published_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """What a config.json says of special ids: what begins a text, what ends one, what pads."""
    names = _role_names(tokenizer, _ENDS)
    return {f"{role}_token_id": tokenizer.special_ids[name] for role, name in names.items()}


def is_bytes(definition: Mapping[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` is what ``ByteTokenizer`` is published as."""
    return definition == _byte_definition()


def _role_names(tokenizer: Tokenizer, ends: tuple[str, ...]) -> dict[str, str]:
    """The special tokens that begin, end and pad; the border where there is no other."""
    special_ids = tokenizer.special_ids
    border = next(name for name, i in special_ids.items() if i == tokenizer.end_id)
    return {
        "bos": border,
        "eos": next((name for name in ends if name in special_ids), border),
        "pad": next((name for name in _PADS if name in special_ids), border),
    }


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    # The tokenizer's own end is that of a document; config.json names the one a chat stops at.
    names = _role_names(tokenizer, ("[EOS]",))
    return {
        "added_tokens_decoder": {
            str(token_id): _added(name, token_id, with_id=False)
            for name, token_id in tokenizer.special_ids.items()
        },
        **{f"{role}_token": name for role, name in names.items()},
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _byte_definition() -> dict[str, Any]:
    vocab = {_SPELLED[byte]: byte for byte in range(256)}
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return _definition(vocab, [], [_added(END, 256)], {**split, "use_regex": False})


def _ranks_definition(tokenizer: TiktokenTokenizer) -> dict[str, Any]:
    """Ranks as merges: every pair that makes a token, in the order of the token's rank."""
    rank_of = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    merges = []
    for token in tokenizer.tokens:
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in rank_of and pair[1] in rank_of]
        pairs.sort(key=lambda pair: (rank_of[pair[0]], rank_of[pair[1]]))
        merges += [[_spelled(left), _spelled(right)] for left, right in pairs]
    vocab = {_spelled(token): rank for token, rank in rank_of.items()}
    added = [_added(name, token_id) for name, token_id in tokenizer.special_ids.items()]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
            {**byte_level, "use_regex": False},
        ],
    }
    return _definition(vocab, merges, added, split)


def _definition(
    vocab: dict[str, int], merges: list[list[str]], added: list[Any], split: dict[str, Any]
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is a token is that token, whatever its merges
            "vocab": vocab,
            "merges": merges,
        },
    }


def _without_holes(tokenizer: BpeTokenizer) -> list[dict[str, Any]]:
    """The added tokens in the order of their ids, and one for each id that has none."""
    added = list(tokenizer.definition.get("added_tokens", []))
    reserved = [_added(f"<|reserved_token_{i}|>", i) for i in tokenizer.unused_ids]
    return sorted([*added, *reserved], key=lambda token: int(token["id"]))


def _added(name: str, token_id: int, *, with_id: bool = True) -> dict[str, Any]:
    return {
        **({"id": token_id} if with_id else {}),
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _spelled(token: bytes) -> str:
    return "".join(_SPELLED[byte] for byte in token)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"
