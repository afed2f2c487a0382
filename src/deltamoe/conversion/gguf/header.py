"""The header of a GGUF file, read without trust: metadata and where each tensor lies.

A file is: magic and version; two counts; the metadata (key, type, value); the tensors (name,
sizes, type, place); after padding, the data. Everything is little-endian. The reader believes
nothing: each count and length is bounded, and compared with the bytes that are left, before
anything is read or allocated on its word; the places must tile the data.

Knows nothing of models and reads no tensor. No torch.
Source: the format's description in the ggml repository (docs/gguf.md).
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from deltamoe.config import open_regular
from deltamoe.conversion.gguf.package import gguf
from deltamoe.errors import CheckpointError

__all__ = ["GgufHeader", "GgufTensor", "read_gguf_header"]

MAX_TENSORS = 65_536
MAX_KEYS = 4_096
MAX_ARRAY = 2 << 20  # a vocabulary has at most a million tokens, and some more merges
MAX_ELEMENTS = 4 << 20  # of all arrays: tokens, their kinds and scores, merges
MAX_NAME_BYTES = 64  # of a tensor; what llama.cpp takes
MAX_KEY_BYTES = 1_024
MAX_TEXT_BYTES = 64 << 20  # a tokenizer of ours, whole
_MAX_METADATA_BYTES = 128 << 20
_MAX_RANK = 4
_VERSIONS = (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
# the format's numbers for types, in the codes of struct and NumPy
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIifBQqd", strict=True))


class GgufTensor(NamedTuple):
    """One tensor as the header describes it.

    Attributes:
        shape: slowest axis first, as NumPy has it; the file says it the other way round.
        dtype: the format's name of its type, such as "F32", "BF16" or "Q8_0".
        begin, end: its place in the file, in bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    begin: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """The metadata of a file and its tensors, in the order of their data."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    file_bytes: int


def read_gguf_header(path: Path | str) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        CheckpointError: no regular file; no GGUF file, a big-endian one or one of another
            version; a count, length, type or place that cannot be; a name that stands twice;
            data that are cut short or go on after the last tensor. The message names the file
            and the first thing wrong.
        ConfigError: the package gguf is not installed.

    Cost: the metadata's length, at most 128 MiB; independent of the size of the data.
    """
    path = Path(path)
    with open_regular(path, error=CheckpointError) as file:
        cursor = _Cursor(path, file)
        magic, version = cursor.raw(4, "the magic"), cursor.number("I", "the version")
        if magic != b"GGUF":
            raise cursor.fault(f"begins with {magic!a}; expected b'GGUF'. Is this a GGUF file?")
        if version not in _VERSIONS:
            raise cursor.fault(f"version {version:#x}; expected 2 or 3, little-endian")
        num_tensors = cursor.count("tensors", MAX_TENSORS, least_bytes=24)
        num_keys = cursor.count("keys", MAX_KEYS, least_bytes=13)
        fields = _fields(cursor, num_keys)
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment % 8:
            raise cursor.fault(f"general.alignment is {alignment!a:.40}; expected 8, 16, 32, …")
        places = _places(cursor, num_tensors)
        tensors = _tiled(cursor, places, alignment)
        return GgufHeader(path, fields, tensors, cursor.file_bytes)


class _Cursor:
    """Reads numbers and texts in order, never beyond the end of the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self.file_bytes = file.seek(0, 2)
        self.position = file.seek(0)
        self._num_elements = 0

    def fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {what}")

    def raw(self, num_bytes: int, what: str) -> bytes:
        if self.position + num_bytes > _MAX_METADATA_BYTES:
            raise self.fault(f"{what}: more than {_MAX_METADATA_BYTES:,} bytes of header")
        data = self._file.read(num_bytes) if self._has(num_bytes) else b""
        if len(data) < num_bytes:
            raise self.fault(f"truncated: {what} ends beyond the file's {self.file_bytes:,} bytes")
        self.position += num_bytes
        return data

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.raw(struct.calcsize(code), what))[0]

    def count(self, what: str, most: int, *, least_bytes: int) -> int:
        """A number of things that take at least ``least_bytes`` each."""
        count: int = self.number("Q", f"the number of {what}")
        if count > most or not self._has(count * least_bytes):
            raise self.fault(f"claims {count:,} {what}; expected at most {most:,} and room")
        return count

    def length(self, what: str, *, least_bytes: int) -> int:
        """A number of elements of one array; all arrays together are bounded as well."""
        length = self.count(what, MAX_ARRAY, least_bytes=least_bytes)
        self._num_elements += length
        if self._num_elements > MAX_ELEMENTS:
            raise self.fault(f"its arrays have more than {MAX_ELEMENTS:,} elements")
        return length

    def text(self, most: int, what: str) -> str:
        length = self.number("Q", what)
        if length > most:
            raise self.fault(f"{what}: a text of {length:,} bytes; expected at most {most:,}")
        try:
            return self.raw(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fault(f"{what}: not UTF-8 text") from None

    def texts(self, length: int, what: str) -> list[str]:
        """Many texts, for there may be a million."""
        read, end = self._file.read, min(self.file_bytes, _MAX_METADATA_BYTES)
        position, found = self.position, []
        try:
            for _ in range(length):
                num_bytes = int.from_bytes(read(8), "little")
                position += 8 + num_bytes
                if position > end:
                    raise self.fault(f"truncated: {what} holds texts that end beyond the header")
                found.append(read(num_bytes).decode("utf-8"))
        except UnicodeDecodeError:
            raise self.fault(f"{what}: not UTF-8 text") from None
        self.position = position
        return found

    def _has(self, num_bytes: int) -> bool:
        return num_bytes <= self.file_bytes - self.position


def _fields(cursor: _Cursor, num_keys: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.text(MAX_KEY_BYTES, "a key")
        if key in fields:
            raise cursor.fault(f"key {key!a:.80} stands twice")
        fields[key] = _value(cursor, cursor.number("I", f"key {key!a:.80}"), key)
    return fields


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    where = f"key {key!a:.80}"
    if kind == _STRING:
        return cursor.text(MAX_TEXT_BYTES, where)
    if kind in _SCALARS:
        number = cursor.number(_SCALARS[kind], where)
        if kind == _BOOL and number > 1:
            raise cursor.fault(f"{where}: {number} is no boolean")
        return bool(number) if kind == _BOOL else number
    if kind != _ARRAY:
        raise cursor.fault(f"{where}: type {kind} is unknown")
    element = cursor.number("I", where)
    if element == _STRING:
        return cursor.texts(cursor.length(f"texts under {where}", least_bytes=8), where)
    if element not in _SCALARS:
        raise cursor.fault(f"{where}: an array of type {element}; expected texts or numbers")
    dtype = np.dtype(f"<{_SCALARS[element]}")
    length = cursor.length(f"numbers under {where}", least_bytes=dtype.itemsize)
    numbers = np.frombuffer(cursor.raw(length * dtype.itemsize, where), dtype)
    if element != _BOOL:
        return numbers.tolist()
    if numbers.max(initial=0) > 1:
        raise cursor.fault(f"{where}: {numbers.max()} is no boolean")
    return (numbers == 1).tolist()


def _places(cursor: _Cursor, num_tensors: int) -> dict[str, GgufTensor]:
    """The tensors, their places counted from the beginning of the data."""
    places: dict[str, GgufTensor] = {}
    for _ in range(num_tensors):
        name = cursor.text(MAX_NAME_BYTES, "a tensor's name")
        where = f"tensor {name!a}"
        if name in places:
            raise cursor.fault(f"{where} stands twice")
        rank = cursor.number("I", where)
        if not 1 <= rank <= _MAX_RANK:
            raise cursor.fault(f"{where} has {rank:,} dimensions; expected 1 to {_MAX_RANK}")
        sizes = [cursor.number("Q", where) for _ in range(rank)]
        kind, offset = cursor.number("I", where), cursor.number("Q", where)
        num_bytes, dtype = _extent(cursor, sizes, kind, where)
        places[name] = GgufTensor(tuple(reversed(sizes)), dtype, offset, offset + num_bytes)
    return places


def _extent(cursor: _Cursor, sizes: list[int], kind: int, where: str) -> tuple[int, str]:
    """Bytes of a tensor and the name of its type."""
    try:
        dtype = gguf().GGMLQuantizationType(kind)
    except ValueError:
        raise cursor.fault(f"{where}: type {kind} is unknown") from None
    block, block_bytes = gguf().GGML_QUANT_SIZES[dtype]
    if min(sizes) < 1 or sizes[0] % block:
        raise cursor.fault(
            f"{where}: sizes {sizes} with {dtype.name}; expected sizes >= 1, "
            f"the first a multiple of {block}"
        )
    return prod(sizes) // block * block_bytes, dtype.name


def _tiled(
    cursor: _Cursor, places: Mapping[str, GgufTensor], alignment: int
) -> dict[str, GgufTensor]:
    """The tensors with their places in the file, which must follow one another without a gap."""
    base = _padded(cursor.position, alignment)
    tensors, end = {}, 0
    for name, place in sorted(places.items(), key=lambda item: item[1].begin):
        if place.begin != _padded(end, alignment):
            fault = "overlaps the tensor before it" if place.begin < end else "leaves a hole"
            raise cursor.fault(f"tensor {name!a} {fault}: it begins at byte {place.begin:,}")
        end = place.end
        if base + end > cursor.file_bytes:
            raise cursor.fault(
                f"truncated at tensor {name!a}: it ends at byte {base + end:,}, "
                f"the file has {cursor.file_bytes:,}"
            )
        tensors[name] = place._replace(begin=base + place.begin, end=base + end)
    if cursor.file_bytes > base + _padded(end, alignment):
        raise cursor.fault("bytes follow the last tensor; the file was added to")
    return tensors


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
