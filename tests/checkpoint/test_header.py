"""Every bad file of a list, and random damage: refused in words, quickly, by one exception."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltamoe.checkpoint.header import BYTES_PER_ELEMENT, check_shapes, read_header
from deltamoe.errors import CheckpointError

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}
GOOD = {"a": A, "b": B, "__metadata__": {"format": "1"}}

quick = settings(
    max_examples=300,
    deadline=None,  # the machine may be busy; ``accepted`` bounds the time that is ours
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def text_of(name_and_entry: str) -> str:
    return "{" + name_and_entry + "}"


TENSOR = json.dumps(A)
# name: (header, data, a part of the message)
BAD = {
    "json array": ("[1, 2]", b"", "expected a JSON object"),
    "text before the object": (" " + text_of(f'"a":{TENSOR}'), bytes(8), "begin at once"),
    "not utf-8": (b'{"\xff":1}', b"", "not UTF-8"),
    "not json": ('{"a":', b"", "not JSON"),
    "two objects": ("{}{}", b"", "not JSON"),
    "duplicate tensor": (f'{{"a":{TENSOR},"a":{TENSOR}}}', bytes(8), "'a' stands twice"),
    "duplicate key in an entry": (
        '{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
        "'dtype' stands twice",
    ),
    "infinite number": ('{"a":1e999}', b"", "too large"),
    "NaN": ('{"a":NaN}', b"", "not a JSON number"),
    "number of 5,000 digits": ('{"a":' + "9" * 5000 + "}", b"", "5,000 digits"),
    "nested arrays": ("{" + '"a":' + "[" * 100_000, b"", "nested deeper"),
    "nested objects": ('{"__metadata__":' * 100_000, b"", "more '{'"),
    "nested a little": ('{"a":{"shape":[[[]]]}}', b"", "nested deeper"),
    "half a surrogate": ('{"\\ud800":1}', b"", "surrogate"),
    "metadata not an object": ('{"__metadata__":[]}', b"", "__metadata__"),
    "metadata nested": ('{"__metadata__":{"a":{}}}', b"", "__metadata__"),
    "metadata a number": ('{"__metadata__":{"a":1}}', b"", "__metadata__"),
    "entry not an object": ({"a": 1}, b"", "'a'"),
    "entry lacks a key": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "expected exactly"),
    "entry has one more": ({"a": entry(x=1)}, bytes(8), "expected exactly"),
    "name is a path": ({"../../etc/x": A}, bytes(8), "letters, digits"),
    "name is empty": ({"": A}, bytes(8), "letters, digits"),
    "name has an escape": ({"a\x1b[2J": A}, bytes(8), "letters, digits"),
    "name has a newline": ({"a\n": A}, bytes(8), "letters, digits"),
    "name of 201 letters": ({"a" * 201: A}, bytes(8), "letters, digits"),
    "unknown dtype": ({"a": entry(dtype="F31")}, bytes(8), "dtype 'F31' is unknown"),
    "dtype a list": ({"a": entry(dtype=["F32"])}, bytes(8), "is unknown"),
    "shape a number": ({"a": {**A, "shape": 2}}, bytes(8), "no list"),
    "shape negative": ({"a": entry(shape=[-2])}, bytes(8), "no list"),
    "shape a float": ({"a": entry(shape=[2.0])}, bytes(8), "no list"),
    "shape a boolean": ({"a": entry("F32", [True], (0, 4))}, bytes(4), "no list"),
    "shape of rank 9": ({"a": entry("U8", [1] * 9, (0, 1))}, bytes(1), "at most 8"),
    "shape overflows": ({"a": entry(shape=[1 << 62, 1 << 62])}, bytes(8), "takes"),
    "shape overflows to zero bits": ({"a": entry(shape=[1 << 32, 1 << 32])}, bytes(8), "takes"),
    "shape and bytes disagree": ({"a": entry(shape=[3])}, bytes(8), "takes 12 bytes"),
    "dtype and bytes disagree": ({"a": entry(dtype="F64")}, bytes(8), "takes 16 bytes"),
    "offsets of three": ({"a": entry(offsets=[0, 8, 8])}, bytes(8), "no pair"),
    "offset negative": ({"a": entry(offsets=[-8, 0])}, bytes(8), "no pair"),
    "offsets inverted": ({"a": entry(offsets=[8, 0])}, bytes(8), "no pair"),
    "offset a text": ({"a": entry(offsets=["0", "8"])}, bytes(8), "no pair"),
    "offset of 2**64": (
        {"a": entry(offsets=[2**64, 2**64 + 8])},
        bytes(8),
        "leaves a hole",
    ),
    "overlap": ({"a": A, "b": entry("F32", [2], (4, 12))}, bytes(12), "'b' overlaps"),
    "the same place twice": ({"a": A, "b": A}, bytes(8), "overlaps"),
    "hole at the start": ({"b": B}, bytes(12), "leaves a hole"),
    "hole in the middle": ({"a": A, "b": entry("U8", [1], (9, 10))}, bytes(10), "'b' leaves"),
    "data cut short": ({"a": A, "b": B}, bytes(11), "truncated at tensor 'b'"),
    "data missing": ({"a": A, "b": B}, b"", "truncated at tensor 'a'"),
    "tail": (GOOD, bytes(13), "1 bytes follow"),
    "tail without tensors": ({}, bytes(1), "1 bytes follow"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_header_is_refused(case: str, build: Callable[..., bytes], tmp_path: Path) -> None:
    header, data, message = BAD[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(build(header, data))
    started = time.process_time()
    with pytest.raises(CheckpointError) as raised:
        read_header(path)
    assert time.process_time() - started < 2.0
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert str(raised.value).isprintable()


def length_lie(length: int) -> bytes:
    return length.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (bytes(7), "7 bytes"),
        (length_lie(0), "would be 0"),
        (length_lie(1) + b"{", "would be 1"),
        (length_lie(2**64 - 1) + b"{}", "would be 18,446,744,073,709,551,615"),
        (length_lie(100_000_001) + b"{}", "would be 100,000,001"),
        (length_lie(3) + b"{}", "truncated"),
        (length_lie(30_000_000) + b"{}", "truncated"),
        (b"<!DOCTYPE html><html>", "not a safetensors file"),
        (b"\x80\x02}q\x00.pickle of some kind", "not a safetensors file"),
    ],
)
def test_bad_length_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors") as raised:
        read_header(path)
    assert message in str(raised.value)


def many(num_tensors: int) -> dict[str, object]:
    return {f"t.{i}": entry("U8", [0], (0, 0)) for i in range(num_tensors)}


@pytest.mark.parametrize(
    "header",
    [
        many(100_000),
        '{"a":[' + "[]," * 400_000 + "[]]}",
        '{"a":[' + "1," * 2_000_000 + "1]}",
        "{" + ",".join(f'"{i}":""' for i in range(400_000)) + "}",
    ],
    ids=["tensors", "arrays", "numbers", "metadata"],
)
def test_absurd_counts_are_refused_before_they_cost(
    header: object, build: Callable[..., bytes], tmp_path: Path
) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(build(header))
    started = time.process_time()
    with pytest.raises(CheckpointError, match=r"more '.'"):
        read_header(path)
    assert time.process_time() - started < 1.0


def test_the_number_of_tensors_is_bounded(
    build: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltamoe.checkpoint.header.MAX_TENSORS", 100)
    path = tmp_path / "many.safetensors"
    path.write_bytes(build(many(100)))
    assert len(read_header(path).tensors) == 100
    path.write_bytes(build(many(101)))
    with pytest.raises(CheckpointError, match="101 tensors; expected at most 100"):
        read_header(path)


def test_good_header(build: Callable[..., bytes], tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    header = {
        "b": B,
        "empty": entry("F64", [0, 3], (12, 12)),
        "a": A,
        "s": entry("I8", [], (12, 13)),
    }
    path.write_bytes(build(header, bytes(13)))
    read = read_header(path)
    assert list(read.tensors) == ["a", "b", "empty", "s"]
    assert read.tensors["s"].shape == ()
    assert read.tensors["empty"].num_elements == 0
    assert (read.tensors["b"].begin, read.tensors["b"].num_bytes) == (8, 4)
    assert read.num_elements == 4
    assert read.file_bytes == path.stat().st_size


def test_a_file_without_tensors_is_good(build: Callable[..., bytes], tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(build({}))
    assert read_header(path).tensors == {}


def test_odd_files_are_refused(build: Callable[..., bytes], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(build(GOOD, bytes(12)))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "leaves").symlink_to(outside)
    (folder / "dangles").symlink_to("nowhere")
    (folder / "loops").symlink_to("loops")
    for path, message in [
        (tmp_path / "pipe", "a pipe"),
        (Path("/dev/zero"), "a device"),
        (folder, "a folder"),
        (folder / "leaves", "leaves its folder"),
        (folder / "dangles", "no such file"),
        (folder / "loops", "cannot be opened"),
        (folder / "missing", "no such file"),
        (folder / "a\0b", "cannot be opened"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            read_header(path)


def test_a_link_within_its_folder_is_followed(build: Callable[..., bytes], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(build(GOOD, bytes(12)))
    (tmp_path / "link").symlink_to("file")
    assert len(read_header(tmp_path / "link").tensors) == 2


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ([("a", (2,)), ("b", (1,)), ("c", (1,))], "'c' is missing"),
        ([("a", (2,))], "1 tensors too many, the first is 'b'"),
        ([("a", (1, 2)), ("b", (1,))], r"'a' has shape \[2\]; expected \[1, 2\]"),
    ],
)
def test_check_shapes_names_the_tensor(
    expected: list, message: str, build: Callable[..., bytes], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(build(GOOD, bytes(12)))
    check_shapes(read_header(path), [("b", (1,)), ("a", [2])])
    with pytest.raises(CheckpointError, match=message):
        check_shapes(read_header(path), expected)


def accepted(path: Path) -> bool:
    """Read the header; the only refusal allowed is ours, and what we accept the library loads."""
    started = time.process_time()
    try:
        header = read_header(path)
    except CheckpointError:
        return False
    finally:
        assert time.process_time() - started < 2.0
    with safetensors.safe_open(str(path), framework="numpy") as file:
        assert set(file.keys()) == set(header.tensors)
        for name, info in header.tensors.items():
            assert tuple(file.get_slice(name).get_shape()) == info.shape
            assert file.get_slice(name).get_dtype() == info.dtype
    return True


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """A few flips, cuts, insertions and repetitions, most of them in the header."""
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(damaged) - 1, 0)))
        stop = draw(st.integers(at, min(at + 12, len(damaged))))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "truncate"]))
        if kind == "flip" and damaged:
            damaged[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del damaged[at:stop]
        elif kind == "insert":
            damaged[at:at] = draw(
                st.sampled_from([b"0", b'"', b"[", b"}", b",", b"1e999", b"\xff"])
            )
        elif kind == "repeat":
            damaged[at:at] = damaged[at:stop]
        else:
            del damaged[stop:]
    return bytes(damaged)


@quick
@given(data=st.data(), mend_length=st.booleans())
def test_random_damage(
    data: st.DataObject, mend_length: bool, build: Callable[..., bytes], tmp_path: Path
) -> None:
    content = data.draw(damage(build(GOOD, bytes(12))))
    if mend_length and len(content) > 20:  # else most damage would end at the length
        content = (len(content) - 8 - 12).to_bytes(8, "little") + content[8:]
    (tmp_path / "x.safetensors").write_bytes(content)
    accepted(tmp_path / "x.safetensors")


numbers = st.one_of(
    st.integers(0, 4),
    st.integers(-1, 20),
    st.sampled_from([2**31, 2**32, 2**63, 2**64, -1, 0.5, True, None, "1"]),
)
dtypes = st.one_of(
    st.sampled_from(sorted(BYTES_PER_ELEMENT)), st.sampled_from(["F4", "f32", "", "F8_E8M0"])
)


@quick
@given(
    header=st.dictionaries(
        st.text("ab._/é", min_size=1, max_size=3),
        st.fixed_dictionaries(
            {
                "dtype": dtypes,
                "shape": st.lists(numbers, max_size=3),
                "data_offsets": st.lists(numbers, min_size=2, max_size=2),
            }
        ),
        max_size=3,
    ),
    num_bytes=st.integers(0, 20),
)
def test_random_entries(
    header: dict[str, object], num_bytes: int, build: Callable[..., bytes], tmp_path: Path
) -> None:
    (tmp_path / "x.safetensors").write_bytes(build(header, bytes(num_bytes)))
    accepted(tmp_path / "x.safetensors")


@quick
@given(
    sizes=st.lists(
        st.tuples(
            st.sampled_from(sorted(BYTES_PER_ELEMENT)), st.lists(st.integers(0, 3), max_size=3)
        ),
        max_size=4,
    )
)
def test_every_well_formed_file_is_accepted(
    sizes: list[tuple[str, list[int]]], build: Callable[..., bytes], tmp_path: Path
) -> None:
    header, begin = {}, 0
    for i, (dtype, shape) in enumerate(sizes):
        end = begin + BYTES_PER_ELEMENT[dtype]
        for size in shape:
            end = begin + (end - begin) * size
        header[f"t{i}"] = entry(dtype, shape, (begin, end))
        begin = end
    (tmp_path / "x.safetensors").write_bytes(build(header, bytes(begin)))
    assert accepted(tmp_path / "x.safetensors")
