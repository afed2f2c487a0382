"""What the standard JSON reader lets through is refused here, by the caller's exception."""

import os
from pathlib import Path

import pytest

from deltamoe.config.strict_json import check_format, parse_json, read_json
from deltamoe.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, -2.5, true, null, "é"]}', {"a": [1, -2.5, True, None, "é"]}),
        ("18446744073709551615", 2**64 - 1),
        ('"\\ud83d\\ude00"', "😀"),
        ("[" * 20 + "]" * 20, None),
        (b'{"\xc3\xa9": 1e308}', {"é": 1e308}),
    ],
)
def test_good_text(text: str | bytes, value: object) -> None:
    parsed = parse_json(text, source="x")
    assert value is None or parsed == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[1,]", "not JSON: .* at line 1, column"),
        ("{} {}", "not JSON"),
        ("\ufeff{}", "not JSON"),
        (b"\xff", "not UTF-8"),
        ('{"a": 1, "b": 2, "a": 1}', "'a' stands twice"),
        ('{"x": {"a": 1, "\\u0061": 1}}', "'a' stands twice"),
        ("[1e999]", "too large"),
        ("[-1e999]", "too large"),
        ("NaN", "not a JSON number"),
        ("-Infinity", "not a JSON number"),
        ("9" * 21, "21 digits"),
        ("9" * 5000, "5,000 digits"),
        ("[" * 21 + "]" * 21, "deeper than 20"),
        ('{"a":' * 21 + "1" + "}" * 21, "deeper than 20"),
        ("[" * 100_000, "deeper than 20"),
        ('"\\ud800"', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
        ('"' + "x" * (1 << 20) + '"', "at most 1,048,576"),
    ],
)
def test_bad_text(text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        parse_json(text, source="the source", error=DataError)
    assert str(raised.value).startswith("the source: ")
    assert str(raised.value).isprintable()


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == read_json(str(path)) == {"a": 1}
    path.write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object, got an array"):
        read_json(path)
    path.write_text("{}" + " " * 99)
    with pytest.raises(ConfigError, match="longer than 100 bytes"):
        read_json(path, max_bytes=100)


def test_odd_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("{}")
    (tmp_path / "folder" / "leaves").symlink_to("../file")
    (tmp_path / "stays").symlink_to("file")
    assert read_json(tmp_path / "stays") == {}
    for name, message in [
        ("pipe", "a pipe"),
        ("folder", "a folder"),
        ("folder/leaves", "leaves its folder"),
        ("missing", "no such file"),
        ("a\0b", "cannot be opened"),
    ]:
        with pytest.raises(ConfigError, match=message):
            read_json(tmp_path / name)
    with pytest.raises(ConfigError, match="a device"):
        read_json("/dev/zero")


@pytest.mark.parametrize("version", [None, 0, -1, True, 1.0, "1", [1]])
def test_a_malformed_format(version: object) -> None:
    with pytest.raises(ConfigError, match='"format" is'):
        check_format({"format": version}, source="x")


def test_a_newer_format_is_refused_in_words() -> None:
    check_format({"format": 1}, source="x")
    check_format({"format": 2}, source="x", known=2)
    with pytest.raises(
        ConfigError, match=r"newer deltamoe: format 3, this program knows 1; upgrade"
    ):
        check_format({"format": 3}, source="x")
