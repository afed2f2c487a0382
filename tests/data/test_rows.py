import gzip
import json

import pytest

from deltamoe.data import rows
from deltamoe.data.rows import json_lines
from deltamoe.errors import DataError


def write(path, texts):
    content = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(source, fraction=0.2):
    return [("".join(d.pieces), d.is_validation) for d in source.documents(fraction)]


TEXTS = [f"text {number}" for number in range(10)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_each_row_is_a_document(tmp_path, name):
    source = json_lines(write(tmp_path / name, TEXTS), "text")
    documents = read(source)
    assert [text for text, _ in documents] == TEXTS
    assert sum(side for _, side in documents) == 2
    assert read(source) == documents
    assert source.num_bytes == sum(map(len, TEXTS))


def test_another_field_may_hold_the_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "é"}\n\n{"body": "\\u00e8"}')
    assert [text for text, _ in read(json_lines(path, "body"))] == ["é", "è"]


def test_empty_texts_are_skipped_and_listed(tmp_path):
    source = json_lines(write(tmp_path / "a.jsonl", ["a", "", "b"]), "text")
    assert [text for text, _ in read(source)] == ["a", "b"]
    read(source)
    assert [reason for _, reason in source.skipped] == ["is empty"]


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "byte 28 is not JSON"),
        (b"[" * 100_000, "byte 28 is not JSON"),
        (b'{"text": "\xff"}', "byte 38 is not UTF-8"),
        (b"[]", "byte 28 has no object"),
        (b'{"body": "a"}', r"byte 28 has fields \['body'\].*'text'"),
        (b'{"text": 7}', "byte 28 has fields"),
        (b'{"text": "\\ud800"}', "byte 28: its text holds half of a surrogate pair"),
        (b'{"text": "' + b"a" * 2000 + b'"}', "byte 28 is longer than"),
    ],
)
def test_a_broken_row_is_named_by_file_and_offset(tmp_path, monkeypatch, line, message):
    if line.startswith(b'{"text": "aa'):
        monkeypatch.setattr(rows, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 2 + line + b"\n" + GOOD)
    with pytest.raises(DataError, match=message) as caught:
        read(json_lines(path, "text"))
    assert str(path) in str(caught.value)


def test_a_torn_gzip_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", TEXTS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be unpacked"):
        read(json_lines(path, "text"))
    path.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match="after byte 0"):
        read(json_lines(path, "text"))


@pytest.mark.parametrize("texts", [[], ["one"], ["", ""]])
def test_fewer_than_two_texts_are_an_error(tmp_path, texts):
    with pytest.raises(DataError, match="at least two"):
        read(json_lines(write(tmp_path / "a.jsonl", texts), "text"))
