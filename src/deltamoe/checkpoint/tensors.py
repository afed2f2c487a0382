"""Tensors to and from one safetensors file.

Reading: the header is checked first (header.py), then the library maps the file into memory, so
that a tensor's bytes are read when they are used. Writing is ours: the library's own writer makes
a private file (mode 0600) of unordered metadata and turns a full disk into prose without a number.

Knows nothing of models; names and shapes are what the caller expects.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from deltamoe.checkpoint.header import TENSOR_NAME, check_shapes, read_header
from deltamoe.errors import CheckpointError

__all__ = ["DTYPES", "read_tensors", "require_finite", "write_tensors"]

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""What a file of ours may hold; a foreign header may name more (header.py)."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ALIGNMENT = 8


def read_tensors(
    path: Path | str,
    *,
    expected: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    check_finite: bool = True,
) -> dict[str, Tensor]:
    """Read every tensor of a file.

    On the CPU the tensors are private views of the mapped file: writing to one changes memory and
    never the file, and they outlive the file's removal or replacement. They do not outlive a
    program that overwrites it in place, which nothing here does.

    Args:
        path: a safetensors file.
        expected: tensors whose names, shapes and dtypes the file must have, no more and no less;
            tensors on the meta device serve. None takes what is there.
        device: where the tensors go.
        check_finite: refuse NaN and infinity; reads all the data once.

    Raises:
        CheckpointError: a bad header, a tensor that is missing, unknown, misshapen, of another
            dtype or not finite; the message names it.
    """
    header = read_header(path)
    if expected is not None:
        check_shapes(header, ((name, tensor.shape) for name, tensor in expected.items()))
    for name, info in header.tensors.items():
        allowed = DTYPES if expected is None else (_CODES[expected[name].dtype],)
        if info.dtype not in allowed:
            raise CheckpointError(
                f"{path}: tensor {name!r} is {info.dtype}; expected {' or '.join(allowed)}"
            )
    try:
        with safetensors.safe_open(str(path), framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in header.tensors}
    except (safetensors.SafetensorError, OSError) as fault:
        raise CheckpointError(f"{path}: cannot be read ({fault})") from fault
    if check_finite:
        require_finite(tensors, source=str(path))
    return tensors


def require_finite(tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        CheckpointError: naming the first tensor and how many of its elements are not finite.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        if not all(bound.isfinite() for bound in tensor.aminmax()):  # NaN reaches both bounds
            num_bad = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"{source}: tensor {name!r}: {num_bad:,} of {tensor.numel():,} elements are "
                "NaN or infinite; use an earlier checkpoint"
            )


def write_tensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a new safetensors file; the same tensors give the same bytes.

    One tensor at a time is copied to the CPU, so that the cost in memory is the largest tensor's.

    Args:
        path: a new file. One that exists is never overwritten, for a reader may have mapped it;
            ``write_checkpoint`` and ``replace_file`` put a new file in its place.
        tensors: by name; any device, any strides. Tensors that share memory are written twice.
        metadata: text to keep in the header.

    Raises:
        OSError: the disk refused, or the file exists; callers put it in words (durable.py).
        ValueError: a name outside ``[A-Za-z0-9_.]{1,200}`` or a dtype the format lacks.
    """
    entries: dict[str, object] = {}
    if metadata:
        entries["__metadata__"] = dict(sorted(metadata.items()))
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    begin = 0
    for name in order:
        tensor = tensors[name]
        if not TENSOR_NAME.fullmatch(name) or tensor.dtype not in _CODES:
            raise ValueError(f"tensor {name!r} of {tensor.dtype} cannot be written to {path}")
        end = begin + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    with open(path, "xb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in order:
            file.write(_bytes_of(tensors[name]))


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
