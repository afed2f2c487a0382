import base64
import json
import socket

import numpy as np
import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltamoe.errors import BadFileError, ConfigError, DataError
from deltamoe.tokenizer import StreamDecoder, TiktokenTokenizer, Tokenizer, load_tokenizer
from deltamoe.tokenizer import tiktoken as ours
from tests.kimi_vocabulary import NAMES, TEXT, kimi_tokenizer, tokens

KIMI = kimi_tokenizer()
FIRST = len(tokens())

texts = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(["<|im_end|>", "[BOS]", "The ", "\n\n", "  ", "123", "'s", "中文", "混A"]),
    )
).map("".join)


def write_folder(folder, lines=None, config=None):
    lines = (
        [f"{base64.b64encode(t).decode()} {i}" for i, t in enumerate(tokens())]
        if lines is None
        else lines
    )
    content = lines if isinstance(lines, bytes) else ("\n".join(lines) + "\n").encode()
    (folder / "tiktoken.model").write_bytes(content)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def named(**ids):
    return {"added_tokens_decoder": {str(i): {"content": name} for name, i in ids.items()}}


@given(text=texts)
def test_every_text_comes_back_and_none_gives_a_special_token(text):
    ids = KIMI.encode(text)
    assert KIMI.decode(ids) == text
    assert KIMI.decode_bytes(np.array(ids, dtype=np.int64)) == text.encode()
    assert KIMI.encode_batch([text, text]) == [ids, ids]
    assert KIMI.encode_array(text).tolist() == ids
    assert max(ids, default=0) < FIRST


@given(text=texts)
def test_streamed_pieces_join(text):
    decoder = StreamDecoder(KIMI)
    assert "".join(map(decoder.push, KIMI.encode(text))) + decoder.finish() == text


def test_it_is_a_tokenizer_with_the_published_names():
    assert isinstance(KIMI, Tokenizer)
    assert KIMI.vocab_size == FIRST + 31
    assert KIMI.end_id == FIRST
    assert KIMI.stop_ids == {FIRST, FIRST + 1, FIRST + 2}
    assert KIMI.decode([KIMI.end_id, *KIMI.encode("x")]) == "x"
    assert KIMI.decode([FIRST + 3]) == "<|im_user|>"
    assert KIMI.decode([FIRST + 5]) == f"<|reserved_token_{FIRST + 5}|>"
    assert KIMI.name == f"tiktoken:{FIRST + 31}"
    for outside in (-1, FIRST + 31):
        with pytest.raises(DataError, match=str(outside)):
            KIMI.decode([outside])


def words(text):
    """The words a text is split into, made visible: each is a token, nothing else is."""
    found = {bytes([i]) for i in range(256)} | {
        text[i:j].encode() for i in range(len(text)) for j in range(i + 1, len(text) + 1)
    }
    tokenizer = TiktokenTokenizer(sorted(found, key=lambda t: (len(t), t)), {"[BOS]": len(found)})
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("中文English混合", ["中文", "English", "混合"]),
        ("北京市 Pascal", ["北京市", " Pascal"]),
        ("HTTPServer iPhone's", ["HTTPServer", " i", "Phone's"]),
        ("camelCaseABC", ["camel", "Case", "ABC"]),
        ("DON'T we'll", ["DON'T", " we'll"]),
        ("1234567", ["123", "456", "7"]),
        ("x != y;\n\nz", ["x", " !=", " y", ";\n\n", "z"]),
        ("a  \n  b   ", ["a", "  \n", " ", " b", "   "]),
        ("狐は速い。", ["狐", "は", "速", "い", "。"]),
    ],
)
def test_the_published_split(text, split):
    assert words(text) == split


def test_long_texts_are_cut_where_the_published_tokenizer_cuts_them():
    assert ours._cut("a" * 25_000) == ["a" * 25_000]
    assert [len(p) for p in ours._cut("a" * 60_000)] == [25_000, 25_000, 10_000]
    assert [len(p) for p in ours._cut("ab " + " " * 30_000 + "c")] == [25_002, 5_002]
    spaced = "abc " * 110_000
    assert [len(p) for p in ours._cut(spaced)] == [400_000, 40_000]
    for text in ("a" * 60_001, "'" * 30_000, "中" * 60_000, spaced):
        assert KIMI.decode(KIMI.encode(text)) == text


def test_it_agrees_with_the_package_that_defines_the_format():
    engine = tiktoken.Encoding(
        "x",
        pat_str=ours.SPLIT,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens())},
        special_tokens={name: FIRST + place for name, place in NAMES.items()},
    )
    text = TEXT + "<|im_end|>" + TEXT.upper()
    assert KIMI.encode(text) == engine.encode(text, disallowed_special=())
    assert engine.encode("<|im_end|>", allowed_special="all") == [FIRST + 2]
    assert len(KIMI.encode("<|im_end|>")) > 1


def test_a_folder_is_read_without_network(tmp_path, monkeypatch):
    def no_network(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", no_network)
    (tmp_path / "tokenization_kimi.py").write_text("raise SystemExit('was run')")
    config = named(**{name: FIRST + place for name, place in NAMES.items()})
    config["auto_map"] = {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}
    write_folder(tmp_path, config=config)
    for path in (tmp_path, tmp_path / "tiktoken.model"):
        assert load_tokenizer(path).fingerprint == KIMI.fingerprint


def test_without_a_config_the_names_are_the_published_ones(tmp_path):
    tokenizer = load_tokenizer(write_folder(tmp_path))
    assert tokenizer.vocab_size == FIRST + 256
    for name, place in NAMES.items():
        if name != "[PAD]":
            assert tokenizer.special_ids[name] == FIRST + place
    assert tokenizer.special_ids["[PAD]"] == FIRST + 255


def test_the_two_ids_beyond_the_embedding_are_left_out(tmp_path):
    ids = {"[BOS]": FIRST, "[PAD]": FIRST + 255, "beyond": FIRST + 256, "too": FIRST + 257}
    tokenizer = load_tokenizer(write_folder(tmp_path, config=named(**ids)))
    assert tokenizer.vocab_size == FIRST + 256
    assert "beyond" not in tokenizer.special_ids


def test_it_is_kept_in_one_file_of_our_own(tmp_path):
    KIMI.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, TiktokenTokenizer)
    assert again.fingerprint == KIMI.fingerprint
    assert again.encode(TEXT) == KIMI.encode(TEXT)


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    with pytest.raises(ConfigError, match=r"deltamoe\[published\]"):
        kimi_tokenizer()


GOOD = [f"{base64.b64encode(t).decode()} {i}" for i, t in enumerate(tokens())]
HOSTILE_RANKS = {
    "empty": b"",
    "not base64": [*GOOD[:-1], f"a?b= {FIRST - 1}"],
    "torn base64": [*GOOD[:-1], f"QUJDR {FIRST - 1}"],
    "no rank": [*GOOD[:-1], "QUJDRA=="],
    "a word for a rank": [*GOOD[:-1], "QUJDRA== one"],
    "a negative rank": [*GOOD[:-1], "QUJDRA== -1"],
    "a huge rank": [*GOOD[:-1], "QUJDRA== " + "9" * 5000],
    "a rank twice": [*GOOD, f"QUJDRA== {FIRST - 1}"],
    "a gap": [*GOOD, f"QUJDRA== {FIRST + 1}"],
    "a token twice": [*GOOD, f"QQ== {FIRST}"],
    "a missing byte": GOOD[:65] + GOOD[66:],
    "no bytes at all": [f"QUJDRA== {0}"],
    "a huge line": [*GOOD, "Q" * (1 << 20) + f" {FIRST}"],
    "a long token": [*GOOD, base64.b64encode(b"a" * 1025).decode() + f" {FIRST}"],
    "not UTF-8": b"\xff\xfe\x00",
    "a blank line": [*GOOD[:100], "", *GOOD[100:]],
    "a pickle": b"\x80\x04\x95",
}


@pytest.mark.parametrize("lines", HOSTILE_RANKS.values(), ids=HOSTILE_RANKS.keys())
def test_ranks_that_cannot_be_trusted_are_refused(tmp_path, lines):
    with pytest.raises(BadFileError) as caught:
        load_tokenizer(write_folder(tmp_path, lines))
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 600


HOSTILE_CONFIGS = {
    "before the ranks end": named(**{"[BOS]": FIRST - 1}),
    "far behind": named(**{"[BOS]": FIRST, "x": FIRST + 258}),
    "absurd": named(**{"[BOS]": FIRST, "x": 9_999_999}),
    "one name twice": {
        "added_tokens_decoder": {str(FIRST): {"content": "[BOS]"}, str(FIRST + 1): "[BOS]"}
    },
    "one id twice": {"added_tokens_decoder": {str(FIRST): {"content": "[BOS]"}, f"0{FIRST}": "x"}},
    "a name that is none": {"added_tokens_decoder": {str(FIRST): {"content": 7}}},
    "an id that is none": {"added_tokens_decoder": {"first": {"content": "[BOS]"}}},
    "an empty name": named(**{"[BOS]": FIRST, "": FIRST + 1}),
    "a long name": named(**{"[BOS]": FIRST, "x" * 1025: FIRST + 1}),
    "no border": named(**{"x": FIRST}),
    "no names": {"added_tokens_decoder": {}},
    "a list": {"added_tokens_decoder": []},
    "a reserved name elsewhere": named(
        **{"[BOS]": FIRST, f"<|reserved_token_{FIRST + 1}|>": FIRST + 2}
    ),
}


@pytest.mark.parametrize("config", HOSTILE_CONFIGS.values(), ids=HOSTILE_CONFIGS.keys())
def test_special_tokens_that_cannot_be_trusted_are_refused(tmp_path, config):
    with pytest.raises(BadFileError) as caught:
        load_tokenizer(write_folder(tmp_path, config=config))
    assert str(tmp_path) in str(caught.value)


def test_a_link_out_of_the_folder_and_a_huge_file_are_refused(tmp_path, monkeypatch):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    write_folder(outside)
    (inside / "tiktoken.model").symlink_to(outside / "tiktoken.model")
    with pytest.raises(BadFileError, match="leaves its folder"):
        load_tokenizer(inside)
    monkeypatch.setattr(ours, "_MAX_FILE_BYTES", 100)
    with pytest.raises(BadFileError, match="longer than 100"):
        load_tokenizer(outside)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_file_is_read_or_refused_and_never_worse(tmp_path, data):
    content = bytearray(("\n".join(GOOD) + "\n").encode())
    start = data.draw(st.integers(0, len(content)))
    content[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    write_folder(tmp_path, bytes(content))
    try:
        tokenizer = load_tokenizer(tmp_path)
    except BadFileError:
        return
    assert tokenizer.decode(tokenizer.encode("the 12 dogs [BOS]")) == "the 12 dogs [BOS]"
