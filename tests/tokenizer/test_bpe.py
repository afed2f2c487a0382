import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from deltamoe.errors import BadFileError, ConfigError, DataError
from deltamoe.tokenizer import BpeTokenizer, load_tokenizer

from .conftest import TEXT


def definition(bpe):
    return json.loads(json.dumps(bpe._definition))


# Tokens, digits, white space and the border's own spelling are likelier than in random text.
texts = st.lists(
    st.one_of(
        st.text(max_size=8), st.sampled_from(["<|end|>", "the ", "\n\n", "  ", "12345", "'s"])
    )
).map("".join)


@given(text=texts)
def test_every_text_comes_back(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.decode_bytes(np.array(ids, dtype=np.int64)) == text.encode()
    assert bpe.encode_batch([text]) == [ids]
    assert bpe.encode_array(text).tolist() == ids
    assert bpe.end_id not in ids


def test_it_compresses_what_it_was_trained_on(bpe):
    assert len(bpe.encode(TEXT)) < 0.6 * len(TEXT.encode())
    assert bpe.vocab_size == 320
    assert bpe.end_id == 319
    assert bpe.name == "bpe:320"


def test_digits_stand_in_groups_of_at_most_three():
    bpe = BpeTokenizer.train(["12345 12345 1234567 1234567 "] * 20, 400)
    assert [bpe.decode([token]) for token in bpe.encode("1234567")] == ["123", "456", "7"]


def test_a_small_text_gives_a_smaller_vocabulary():
    bpe = BpeTokenizer.train(["abab"], 4096)
    assert 257 < bpe.vocab_size < 270
    assert bpe.name == f"bpe:{bpe.vocab_size}"


def test_training_twice_gives_the_same_tokenizer(bpe):
    assert BpeTokenizer.train(iter([TEXT] * 3), 320).fingerprint == bpe.fingerprint
    assert BpeTokenizer.train([TEXT] * 3, 319).fingerprint != bpe.fingerprint
    # Another process has another hash seed.
    program = (
        "import sys; from deltamoe.tokenizer import BpeTokenizer;"
        "print(BpeTokenizer.train([sys.stdin.read()] * 3, 320).fingerprint)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], input=TEXT.encode(), capture_output=True, check=True
    )
    assert run.stdout.decode().strip() == bpe.fingerprint


def test_it_is_read_back_and_hugging_face_reads_it_too(bpe, tmp_path):
    bpe.save(tmp_path)
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.fingerprint == bpe.fingerprint
    assert again.encode(TEXT) == bpe.encode(TEXT)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(TEXT).ids == bpe.encode(TEXT)
    assert theirs.decode(bpe.encode(TEXT)) == TEXT


@pytest.mark.parametrize("size", [256, 1_000_001, -1])
def test_an_impossible_vocabulary_is_refused(size):
    with pytest.raises(ConfigError, match=str(size)):
        BpeTokenizer.train(["a"], size)


@pytest.mark.parametrize("token_id", [320, -1, 1 << 40])
def test_an_unknown_id_is_named(bpe, token_id):
    with pytest.raises(DataError, match=str(token_id)):
        bpe.decode_bytes([1, token_id])


def test_a_lone_surrogate_is_no_text(bpe):
    for encode in (bpe.encode, bpe.encode_array, lambda text: bpe.encode_batch([text])):
        with pytest.raises(DataError, match="lone surrogate"):
            encode("ab\ud800")


def test_other_names_for_the_border_are_known(bpe):
    data = definition(bpe)
    data["added_tokens"][0]["content"] = "<|endoftext|>"
    assert BpeTokenizer(data).end_id == bpe.end_id


def test_what_adds_ids_is_left_out(bpe):
    data = definition(bpe)
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|end|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [319], "tokens": ["<|end|>"]}},
    }
    data["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    assert BpeTokenizer(data).encode(TEXT) == bpe.encode(TEXT)


def test_an_id_with_no_token_is_unknown(bpe):
    data = definition(bpe)
    data["added_tokens"][0]["id"] = 400
    sparse = BpeTokenizer(data)
    assert sparse.vocab_size == 401
    with pytest.raises(DataError, match="350"):
        sparse.decode_bytes([350])


def put(*path):
    """A change to a definition: put the last of ``path`` where the others lead."""

    def change(data):
        *parents, key, value = path
        for parent in parents:
            data = data[parent]
        data[key] = value

    return change


HOSTILE = {
    "no model": lambda data: data.pop("model"),
    "another model": put("model", "type", "Unigram"),
    "dice": put("model", "dropout", 0.5),
    "word ends": put("model", "end_of_word_suffix", "</w>"),
    "lossy": put("normalizer", {"type": "Lowercase"}),
    "no vocab": put("model", "vocab", []),
    "no merges": put("model", "merges", None),
    "a negative id": put("model", "vocab", "a", -1),
    "a huge id": put("model", "vocab", "a", 1_000_000),
    "an id that is none": put("model", "vocab", "a", True),
    "a shared id": put("model", "vocab", "the", 5),
    "a missing byte": lambda data: data["model"]["vocab"].pop("a"),
    "a long token": put("model", "vocab", "a" * 1025, 999),
    "a token that is no text": put("model", "vocab", "\ud800", 999),
    "a merge of unknown tokens": lambda data: data["model"]["merges"].append(["a", "xyzzy"]),
    "a merge into nothing": lambda data: data["model"]["merges"].append(["~", "~"]),
    "a merge that is none": lambda data: data["model"]["merges"].append(7),
    "added tokens that are none": put("added_tokens", {}),
    "an added token that is none": lambda data: data["added_tokens"].append(7),
    "an empty added token": put("added_tokens", 0, "content", ""),
    "a long added token": put("added_tokens", 0, "content", "é" * 513),
    "an added token on a taken id": put("added_tokens", 0, "id", 5),
    "no border": put("added_tokens", []),
    "a border that is ordinary": put("added_tokens", 0, "special", False),
    "swallowed space": lambda data: data["added_tokens"].append(
        {**data["added_tokens"][0], "id": 500, "content": "x", "special": False, "lstrip": True}
    ),
    "a prefix space": put("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", True),
    "removed text": put("pre_tokenizer", "pretokenizers", 0, "behavior", "Removed"),
    "lost white space": put("pre_tokenizer", {"type": "Whitespace"}),
    "no pre-tokenizer": put("pre_tokenizer", None),
    "a sequence of nothing": put("pre_tokenizer", "pretokenizers", "ByteLevel"),
    "a broken pattern": put("pre_tokenizer", "pretokenizers", 0, "pattern", {"Regex": "(" * 50}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_definition_that_cannot_be_trusted_is_refused(bpe, change):
    data = definition(bpe)
    change(data)
    with pytest.raises(BadFileError):
        BpeTokenizer(data)


def test_too_many_tokens_are_refused(bpe, monkeypatch):
    monkeypatch.setattr("deltamoe.tokenizer.bpe.MAX_VOCAB", 300)
    with pytest.raises(BadFileError, match="at most 300"):
        BpeTokenizer(definition(bpe))
