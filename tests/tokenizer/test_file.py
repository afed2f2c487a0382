import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltamoe.errors import BadFileError
from deltamoe.tokenizer import file as tokenizer_file
from deltamoe.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"[]", "expected a JSON object"),
        (b"{}", "expected a model of type BPE"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "nested"),
        (b'{"type": "bytes", "format": 2}', "newer deltamoe: format 2"),
        (b'{"type": "bytes"}', "format"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 1e999}, "merges": []}}', "too large"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(BadFileError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_pipe_are_refused(tmp_path):
    with pytest.raises(BadFileError, match="no such file"):
        load_tokenizer(tmp_path)
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(BadFileError, match="regular file"):
        load_tokenizer(tmp_path)


def test_a_huge_file_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_file, "MAX_FILE_BYTES", 100)
    (tmp_path / "tokenizer.json").write_bytes(b" " * 101)
    with pytest.raises(BadFileError, match="longer than 100"):
        load_tokenizer(tmp_path)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_file_is_read_or_refused_and_never_worse(bpe, tmp_path, data):
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = bytearray(json.dumps(json.loads(path.read_text())).encode())
    start = data.draw(st.integers(0, len(content)))
    length = data.draw(st.integers(0, 20))
    content[start : start + length] = data.draw(st.binary(max_size=20))
    path.write_bytes(content)
    try:
        tokenizer = load_tokenizer(path)
    except BadFileError:
        return
    assert tokenizer.decode(tokenizer.encode("the 12 dogs <|end|>")) == "the 12 dogs <|end|>"
