"""The header of a safetensors file, read without trust and without torch.

A file is: the header's length (8 bytes, little-endian), the header (JSON: for each tensor its
dtype, shape and place), the tensors' bytes. The reader believes nothing: every number is bounded
before it is used, and the places must tile the data exactly. It looks at the first bytes only,
never at the tensors.

``read_tensors`` in tensors.py reads the data of a file whose header passed here;
``encode_header`` is the way back.
Source: the format's description in the safetensors repository (README, "Format").
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from deltamoe.config.strict_json import open_regular, parse_json
from deltamoe.errors import CheckpointError

__all__ = [
    "BYTES_PER_ELEMENT",
    "MAX_TENSORS",
    "TENSOR_NAME",
    "Header",
    "TensorInfo",
    "TensorSpec",
    "check_shapes",
    "encode_header",
    "read_header",
]

BYTES_PER_ELEMENT: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
TENSOR_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")
MAX_TENSORS = 65_536  # three times the tensors of the published 48B model, whole
_MAX_RANK = 8
# The format allows 100 MB. 65,536 tensors with the longest names need 24 MB, and a parsed header
# takes several times its length in memory.
_MAX_HEADER_BYTES = 32 << 20
# What each JSON mark costs in memory, bounded before the parser allocates: per tensor one object,
# two arrays, four colons, and a comma for each size and each entry. The slack is for metadata.
_MARKS_PER_TENSOR = {b"{": 1, b"[": 2, b":": 4, b",": 4 + _MAX_RANK}
_MARKS_SLACK = 20_000
_ALIGNMENT = 8


class TensorInfo(NamedTuple):
    """One tensor as the header describes it; ``begin`` and ``end`` count bytes of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_elements(self) -> int:
        """Product of the sizes; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Length of the tensor's data."""
        return self.end - self.begin


class TensorSpec(NamedTuple):
    """A tensor that is to be written: its name, safetensors' word for its dtype, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Length of the tensor's data."""
        return math.prod(self.shape) * BYTES_PER_ELEMENT[self.dtype]


@dataclass(frozen=True)
class Header:
    """All tensors of one file in the order of their data, and the file's text metadata."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    file_bytes: int

    @property
    def num_elements(self) -> int:
        """Elements of all tensors together."""
        return sum(info.num_elements for info in self.tensors.values())

    @property
    def data_begin(self) -> int:
        """Where in the file the data begin that ``TensorInfo.begin`` counts from."""
        return self.file_bytes - max((info.end for info in self.tensors.values()), default=0)


def read_header(path: Path | str) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: missing or no regular file; too short; a header length that lies; a
            header that is not strict JSON; too many tensors; a name outside
            ``[A-Za-z0-9_.]{1,200}``; an unknown dtype; a shape that disagrees with its bytes;
            data that overlap, leave a hole, are cut short or go on after the last tensor.
            The message names the file, the tensor and the reason.

    Cost: the header's length, at most 32 MiB; independent of the size of the data.
    """
    path = Path(path)
    with open_regular(path, error=CheckpointError) as file:
        text, file_bytes = _header_text(path, file)
    entries = parse_json(
        text, source=f"{path}: header", error=CheckpointError, max_bytes=len(text), max_depth=3
    )
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: header: expected a JSON object")
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(f"{path}: {len(entries):,} tensors; expected at most {MAX_TENSORS:,}")
    tensors = {name: _tensor(path, name, entry) for name, entry in entries.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_tiling(path, tensors, data_bytes=file_bytes - 8 - len(text))
    return Header(path, tensors, metadata, file_bytes)


def check_shapes(header: Header, expected: Iterable[tuple[str, Sequence[int]]]) -> None:
    """Compare a header with the names and shapes it should hold, no more and no less.

    ``expected`` is read only as far as it agrees, so it may be a generator that a hostile
    configuration would make endless.

    Raises:
        CheckpointError: naming the first tensor that is missing, misshapen or unknown.
    """
    known = set()
    for name, shape in expected:
        if name not in header.tensors:
            raise CheckpointError(
                f"{header.path}: tensor {name!r} is missing; was the file written by this model?"
            )
        found = header.tensors[name].shape
        if found != tuple(shape):
            raise CheckpointError(
                f"{header.path}: tensor {name!r} has shape {list(found)}; expected {list(shape)}"
            )
        known.add(name)
    if unknown := [name for name in header.tensors if name not in known]:
        raise CheckpointError(
            f"{header.path}: {len(unknown):,} tensors too many, the first is {unknown[0]!r}; "
            "was the file written by this model?"
        )


def encode_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> bytes:
    """The first bytes of a file that holds these tensors one after another, in this order.

    Raises:
        ValueError: a name outside ``[A-Za-z0-9_.]{1,200}``.
    """
    entries: dict[str, object] = {}
    if metadata:
        entries["__metadata__"] = dict(sorted(metadata.items()))
    begin = 0
    for spec in specs:
        if not TENSOR_NAME.fullmatch(spec.name):
            raise ValueError(f"tensor {spec.name!r} cannot be written under this name")
        end = begin + spec.num_bytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _header_text(path: Path, file: BinaryIO) -> tuple[bytes, int]:
    """The header's bytes and the length of the whole file."""
    file_bytes = file.seek(0, 2)
    file.seek(0)
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(
            f"{path}: {len(prefix)} bytes; a safetensors file begins with 8 bytes of header length"
        )
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: not a safetensors file: such a file begins with the length of its header, "
            f"2 to {_MAX_HEADER_BYTES:,} bytes; here that would be {length:,}"
        )
    text = file.read(length) if length <= file_bytes - 8 else b""
    if len(text) < length:
        raise CheckpointError(
            f"{path}: truncated: its header claims {length:,} bytes, "
            f"the file has {file_bytes - 8:,} after the length"
        )
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: header: expected a JSON object to begin at once")
    for mark, per_tensor in _MARKS_PER_TENSOR.items():
        if text.count(mark) > MAX_TENSORS * per_tensor + _MARKS_SLACK:
            raise CheckpointError(
                f"{path}: header: more {mark.decode()!r} than {MAX_TENSORS:,} tensors, "
                "the most accepted, could need"
            )
    return text, file_bytes


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise CheckpointError(f"{path}: header: __metadata__ must map texts to texts")
    return value


def _tensor(path: Path, name: str, entry: Any) -> TensorInfo:
    where = f"{path}: tensor {name[:200]!a}"
    if not TENSOR_NAME.fullmatch(name):
        raise CheckpointError(
            f"{where}: a name is 1 to 200 letters, digits, underscores and dots, nothing else"
        )
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES_PER_ELEMENT:
        raise CheckpointError(
            f"{where}: dtype {ascii(dtype)[:40]} is unknown; known are "
            + ", ".join(BYTES_PER_ELEMENT)
        )
    if not _is_sizes(shape) or len(shape) > _MAX_RANK:
        raise CheckpointError(
            f"{where}: shape {ascii(shape)[:80]} is no list of at most {_MAX_RANK} sizes >= 0"
        )
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where}: data_offsets {ascii(offsets)[:80]} are no pair of places, first <= last"
        )
    info = TensorInfo(dtype, tuple(shape), *offsets)
    expected = info.num_elements * BYTES_PER_ELEMENT[dtype]
    if info.num_bytes != expected:
        raise CheckpointError(
            f"{where}: {dtype} of shape {shape} takes {expected:,} bytes, "
            f"its data_offsets span {info.num_bytes:,}"
        )
    return info


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_tiling(path: Path, tensors: Mapping[str, TensorInfo], data_bytes: int) -> None:
    """The tensors, in the order of their data, must cover it without a gap or an overlap."""
    end = 0
    for name, info in tensors.items():
        if info.begin != end:
            fault = "overlaps the tensor before it" if info.begin < end else "leaves a hole"
            raise CheckpointError(
                f"{path}: tensor {name!r} {fault}: it begins at byte {info.begin:,} of the data, "
                f"expected {end:,}"
            )
        end = info.end
    if end > data_bytes:
        cut = next(name for name, info in tensors.items() if info.end > data_bytes)
        raise CheckpointError(
            f"{path}: truncated at tensor {cut!r}: the tensors need {end:,} bytes, "
            f"{data_bytes:,} are there"
        )
    if end < data_bytes:
        raise CheckpointError(
            f"{path}: {data_bytes - end:,} bytes follow the last tensor; the file was added to"
        )
