"""Files from outside: only our error, soon, and nothing allocated on their word."""

import os
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conversion.gguf.exported import GEOMETRIES, save, tiny

from deltamoe.conversion import open_source
from deltamoe.conversion.gguf import read_gguf, read_gguf_header, write_gguf
from deltamoe.errors import CheckpointError

START = b"GGUF" + struct.pack("<I", 3)


def text(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def counts(tensors: int, keys: int) -> bytes:
    return START + struct.pack("<QQ", tensors, keys)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: bytes, sizes: list[int], kind: int = 0, offset: int = 0) -> bytes:
    packed = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + packed + struct.pack("<IQ", kind, offset)


def array(kind: int, length: int) -> bytes:
    return struct.pack("<IQ", kind, length)


PAD = bytes(4096)
HOSTILE = {
    "empty": b"",
    "seven bytes": START[:7],
    "another file": b"PK\x03\x04" + PAD,
    "version 1": b"GGUF" + struct.pack("<I", 1) + PAD,
    "big-endian": b"GGUF" + struct.pack(">I", 3) + PAD,
    "2**64 - 1 tensors": counts(2**64 - 1, 0) + PAD,
    "65,537 tensors": counts(65_537, 0) + bytes(4 << 20),
    "2**63 keys": counts(0, 2**63) + PAD,
    "key of 2**64 - 1 bytes": counts(0, 1) + text(b"a", 2**64 - 1) + PAD,
    "key beyond the file": counts(0, 1) + text(b"a", 1000),
    "key that is no UTF-8": counts(0, 1) + key(b"\xff\xfe", 4, bytes(4)) + PAD,
    "key twice": counts(0, 2) + key(b"a", 4, bytes(4)) * 2 + PAD,
    "unknown type of value": counts(0, 1) + key(b"a", 13, bytes(4)) + PAD,
    "no boolean": counts(0, 1) + key(b"a", 7, b"\x02") + PAD,
    "text of 2**63 bytes": counts(0, 1) + key(b"a", 8, text(b"", 2**63)) + PAD,
    "array of 2**62 numbers": counts(0, 1) + key(b"a", 9, array(4, 2**62)) + PAD,
    "array of 2**60 texts": counts(0, 1) + key(b"a", 9, array(8, 2**60)) + PAD,
    "array of arrays": counts(0, 1) + key(b"a", 9, array(9, 1) + array(9, 1)) + PAD,
    "many long arrays": counts(0, 5)
    + b"".join(key(b"%d" % i, 9, array(0, 1 << 20) + bytes(1 << 20)) for i in range(5)),
    "texts beyond the file": counts(0, 1) + key(b"a", 9, array(8, 3) + text(b"x") * 2 + PAD[:8]),
    "texts of 2**64 - 1 bytes": counts(0, 1) + key(b"a", 9, array(8, 3) + b"\xff" * 40) + PAD,
    "a million texts": counts(1, 1)
    + key(b"a", 9, array(8, 1 << 20) + text(b"abc") * (1 << 20))
    + tensor(b"a", [1], kind=77)
    + PAD,
    "alignment 0": counts(0, 1) + key(b"general.alignment", 4, bytes(4)) + PAD,
    "name too long": counts(1, 0) + tensor(b"a" * 65, [1]) + PAD,
    "name twice": counts(2, 0) + tensor(b"a", [8]) * 2 + PAD,
    "five dimensions": counts(1, 0) + tensor(b"a", [1] * 5) + PAD,
    "2**32 - 1 dimensions": counts(1, 0) + text(b"a") + b"\xff" * 4 + PAD,
    "size 0": counts(1, 0) + tensor(b"a", [0, 4]) + PAD,
    "sizes that overflow": counts(1, 0) + tensor(b"a", [2**32, 2**32, 2**32, 2**32]) + PAD,
    "unknown type": counts(1, 0) + tensor(b"a", [32], kind=250) + PAD,
    "half a block": counts(1, 0) + tensor(b"a", [33], kind=8) + PAD,
    "hole": counts(1, 0) + tensor(b"a", [8], offset=32) + PAD,
    "overlap": counts(2, 0) + tensor(b"a", [32]) + tensor(b"b", [32], offset=32) + PAD,
    "beyond the file": counts(1, 0) + tensor(b"a", [1 << 40]) + PAD,
    "tail": counts(1, 0) + tensor(b"a", [8]) + PAD,
    "no model": counts(0, 0),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    file = folder / "m.gguf"
    write_gguf(
        open_source(save(folder / "run", tiny(GEOMETRIES["all dense, tied, three taps"]))),
        file,
        dtype="q8_0",
    )
    return file


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(HOSTILE[name])
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        read_gguf(file)
    assert time.monotonic() - begun < 2


def test_no_pipe_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError):
        read_gguf_header(tmp_path / "m.gguf")


@pytest.mark.parametrize("cut", [33, 5_000, 200_000])
def test_a_truncated_file_is_refused(cut: int, good: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(good.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match="truncated"):
        read_gguf(file)


def test_not_a_number_is_refused(good: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    place, data = read_gguf_header(good).tensors["blk.1.attn_kv_a_norm.weight"], good.read_bytes()
    file.write_bytes(data[: place.begin] + b"\xff" * 4 + data[place.begin + 4 :])
    with pytest.raises(CheckpointError, match=r"latent_norm\.weight.*NaN"):
        read_gguf(file)


def flipped(data: bytes, at: int, byte: int) -> bytes:
    return data[:at] + bytes([byte]) + data[at + 1 :]


def cut(data: bytes, at: int, byte: int) -> bytes:
    return data[:at] + data[at + 1 + byte % 16 :]


def grown(data: bytes, at: int, byte: int) -> bytes:
    return data[:at] + bytes([byte]) * 8 + data[at:]


@settings(max_examples=250, deadline=2_000, suppress_health_check=list(HealthCheck))
@given(
    mutate=st.sampled_from([flipped, flipped, cut, grown]),
    at=st.integers(0, 10_000),
    byte=st.integers(0, 255),
)
def test_mutated_headers(
    mutate: Callable[[bytes, int, int], bytes], at: int, byte: int, good: Path, tmp_path: Path
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(mutate(good.read_bytes(), at, byte))
    with suppress(CheckpointError):
        read_gguf(file)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
