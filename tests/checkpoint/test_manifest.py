"""The manifest: read back as written, and every damage to it noticed."""

import contextlib
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltamoe.checkpoint.manifest import (
    FileRecord,
    Manifest,
    read_manifest,
    record_file,
    write_manifest,
)
from deltamoe.errors import CheckpointError

MANIFEST = Manifest(250, {"a.json": FileRecord(3, "0" * 64), "b.bin": FileRecord(0, "f" * 64)})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_manifest(tmp_path / "manifest.json", MANIFEST)
    return tmp_path / "manifest.json"


def resealed(data: dict) -> str:
    """A manifest edited by someone who knows how its hash is made."""
    body = {key: value for key, value in data.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({**body, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def test_there_and_back(path: Path) -> None:
    assert read_manifest(path) == MANIFEST
    assert MANIFEST.num_bytes == 3
    assert resealed(json.loads(path.read_text()))  # the helper seals as the writer does
    path.write_text(resealed(json.loads(path.read_text())))
    assert read_manifest(path) == MANIFEST


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 251}, "its own hash"),
        ({"files": {"a.json": {"bytes": 3, "sha256": "0" * 64}}}, "its own hash"),
        ({"sha256": "0" * 64}, "its own hash"),
        ({"sha256": 5}, "its own hash"),
        ({"more": 1}, "its keys"),
        ({"step": -1}, '"step"'),
        ({"step": True}, '"step"'),
        ({"step": 1.0}, '"step"'),
        ({"files": {}}, '"files"'),
        ({"files": []}, '"files"'),
        ({"format": 3}, "written by a newer deltamoe: format 3, this program knows 1; upgrade"),
        ({"format": 0}, '"format" is 0'),
        ({"format": "1"}, "\"format\" is '1'"),
    ],
)
def test_an_edited_manifest_is_refused(change: dict, message: str, path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"manifest\.json") as raised:
        read_manifest(path)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "a/b", ".hidden", "", "a b", "x" * 101, "manifest.json", "a\n"]
)
def test_a_resealed_path_is_refused(name: str, path: Path) -> None:
    files = {name: {"bytes": 1, "sha256": "0" * 64}}
    path.write_text(resealed({"format": 1, "step": 1, "files": files}))
    with pytest.raises(CheckpointError, match="the entry"):
        read_manifest(path)


@pytest.mark.parametrize(
    "record",
    [
        {"bytes": -1, "sha256": "0" * 64},
        {"bytes": 1, "sha256": "0" * 63},
        {"bytes": 1, "sha256": "G" * 64},
        {"bytes": 1},
        {"bytes": 1, "sha256": "0" * 64, "mode": 0},
        7,
    ],
)
def test_a_resealed_record_is_refused(record: object, path: Path) -> None:
    path.write_text(resealed({"format": 1, "step": 1, "files": {"a": record}}))
    with pytest.raises(CheckpointError, match="the entry 'a'"):
        read_manifest(path)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    at=st.floats(0, 1, exclude_max=True),
    piece=st.sampled_from([b"", b"0", b'"', b"{", b"[", b",", b"NaN", b"\xff", b"\\ud800", b"\0"]),
    num_removed=st.integers(0, 9),
)
def test_random_damage(at: float, piece: bytes, num_removed: int, path: Path) -> None:
    good = path.read_bytes()
    start = int(at * len(good))
    damaged = path.with_name("damaged.json")
    damaged.write_bytes(good[:start] + piece + good[start + num_removed :])
    with contextlib.suppress(CheckpointError):
        assert read_manifest(damaged) == MANIFEST  # white space was hit


def test_record_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert record_file(tmp_path / "f") == FileRecord(3, hashlib.sha256(b"abc").hexdigest())
    assert record_file(tmp_path / "f", hashed=False) == FileRecord(3, "")
    with pytest.raises(CheckpointError, match="no such file"):
        record_file(tmp_path / "g")
