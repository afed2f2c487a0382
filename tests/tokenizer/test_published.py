"""Held against transformers: what is exported there gives the same ids."""

import json
import random

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from deltamoe.errors import BadFileError
from deltamoe.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    TiktokenTokenizer,
    load_tokenizer,
    published_definition,
    published_ids,
    save_published,
)
from tests.kimi_vocabulary import TEXT, kimi_tokenizer

from .conftest import TEXT as BPE_TEXT

TOKENIZERS = {
    "bytes": ByteTokenizer(),
    "bpe": BpeTokenizer.train([BPE_TEXT] * 3, 320),
    "tiktoken": kimi_tokenizer(),
}
VARIED = [
    "",
    " ",
    TEXT,
    BPE_TEXT,
    "Straße ﬁn Ⅳ ½ ß SS İi ſ K's",
    "e\u0301 é \u0301\u0302 नमस्ते ไทย العربية עברית 한국어",
    "🙂🏳️\u200d🌈👩\u200d👩\u200d👧 \U0001f1e9\U0001f1ea",
    "\x00\x01\x7f\x80\xa0\u2028\u2029\u3000\ufeff\ufffd\U0010ffff",
    "a\r\nb\n\r\n\n  \t\tc   \n",
    "don't DON'T we'LL I'M '' 's",
    "1234567.89e-10 ١٢٣ 一二三 ②",
    "中文English混合 々〆〇 ㍿ 𠮷𠮷a",
    "x" * 300 + " " * 300 + "1" * 100,
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    opened = {}
    for kind, tokenizer in TOKENIZERS.items():
        folder = tmp_path_factory.mktemp(kind)
        save_published(tokenizer, folder)
        opened[kind] = AutoTokenizer.from_pretrained(str(folder)), folder
    return opened


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_are_identical(theirs, kind):
    ours, (tokenizer, _) = TOKENIZERS[kind], theirs[kind]
    for text in VARIED:
        ids = ours.encode(text)
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([ours.end_id, *ids, ours.end_id], skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(max_size=40))
def test_ids_of_any_text_are_identical(theirs, kind, text):
    tokenizer, _ = theirs[kind]
    # split_special_tokens, because a text may spell a special token; see the next test
    ids = tokenizer(text, split_special_tokens=True).input_ids
    assert ids == TOKENIZERS[kind].encode(text)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_text_that_spells_a_special_token_is_theirs_to_keep_apart(theirs, kind):
    ours, (tokenizer, _) = TOKENIZERS[kind], theirs[kind]
    border = next(name for name, i in ours.special_ids.items() if i == ours.end_id)
    text = f"say {border} aloud"
    assert tokenizer(text, split_special_tokens=True).input_ids == ours.encode(text)
    assert ours.end_id in tokenizer(text).input_ids


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_tokens_keep_their_ids_and_roles(theirs, kind):
    ours, (tokenizer, _) = TOKENIZERS[kind], theirs[kind]
    assert len(tokenizer) == ours.vocab_size
    for name, token_id in ours.special_ids.items():
        assert tokenizer.convert_tokens_to_ids(name) == token_id
        assert tokenizer(name).input_ids == [token_id]
        assert token_id in tokenizer.added_tokens_decoder
    assert tokenizer.bos_token_id == ours.end_id
    assert tokenizer.eos_token_id in ours.stop_ids


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_way_back(theirs, kind):
    ours, (_, folder) = TOKENIZERS[kind], theirs[kind]
    again = load_tokenizer(folder)
    assert type(again) is type(ours)
    assert again.fingerprint == ours.fingerprint
    assert (again.end_id, again.stop_ids) == (ours.end_id, ours.stop_ids)


def test_ranks_can_be_read_back_as_merges(theirs):
    ours, (_, folder) = TOKENIZERS["tiktoken"], theirs["tiktoken"]
    merged = load_tokenizer(folder / "tokenizer.json")
    assert isinstance(merged, BpeTokenizer)
    assert (merged.end_id, merged.stop_ids) == (ours.end_id, ours.stop_ids)
    assert merged.special_ids == ours.special_ids
    for text in VARIED:
        assert merged.encode(text) == ours.encode(text)


def test_what_config_json_says_of_ids():
    kimi = TOKENIZERS["tiktoken"]
    names = {"bos": "[BOS]", "eos": "<|im_end|>", "pad": "[PAD]"}
    assert published_ids(kimi) == {f"{k}_token_id": kimi.special_ids[v] for k, v in names.items()}
    assert set(published_ids(ByteTokenizer()).values()) == {256}


def sparse(bpe, border_id):
    data = json.loads(json.dumps(bpe.definition))
    data["added_tokens"][0]["id"] = border_id
    return BpeTokenizer(data)


def test_holes_are_filled_so_that_ids_stay(tmp_path):
    ours = sparse(TOKENIZERS["bpe"], 330)
    assert ours.unused_ids == list(range(319, 330))
    save_published(ours, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    assert tokenizer.bos_token_id == 330
    assert len(tokenizer) == 331


def test_ids_that_would_change_are_refused():
    data = json.loads(json.dumps(TOKENIZERS["bpe"].definition))
    del data["model"]["vocab"]["the"]  # a hole inside the vocabulary moves all that is behind
    data["model"]["merges"] = [m for m in data["model"]["merges"] if "the" not in "".join(m)]
    with pytest.raises(BadFileError, match="cannot be exported"):
        published_definition(BpeTokenizer(data))


def test_beside_a_models_config_it_opens_alike_and_runs_no_code(theirs, tmp_path):
    """AutoTokenizer asks config.json first; what the folder calls itself must not matter."""
    save_published(TOKENIZERS["tiktoken"], tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "kimi_linear"}')
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path), trust_remote_code=False)
    for text in VARIED:
        assert tokenizer(text).input_ids == theirs["tiktoken"][0](text).input_ids


def test_ranks_in_any_order_become_merges_that_give_the_same_ids():
    """Ranks that no training would give: a token may be made in many ways, or in none."""
    chance = random.Random(0)
    for _ in range(60):
        words = {"".join(chance.choices("ab", k=chance.randint(2, 5))).encode() for _ in range(12)}
        ranked = sorted(words, key=lambda _: chance.random())
        ours = TiktokenTokenizer([*(bytes([i]) for i in range(256)), *ranked], {"[BOS]": 300})
        engine = tokenizers.Tokenizer.from_str(json.dumps(published_definition(ours)))
        for _ in range(30):
            text = "".join(chance.choices("ab", k=chance.randint(1, 14)))
            assert engine.encode(text).ids == ours.encode(text)
