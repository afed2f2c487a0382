"""Tensors to and from one safetensors file.

Reading: the header is checked first (header.py), then the library maps the file into memory, so
that a tensor's bytes are read when they are used. Writing is ours: the library's own writer makes
a private file (mode 0600) of unordered metadata and turns a full disk into prose without a number.

Knows nothing of models; names and shapes are what the caller expects.
"""

import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from deltamoe.checkpoint.header import (
    Header,
    TensorSpec,
    check_shapes,
    encode_header,
    read_header,
)
from deltamoe.config.strict_json import open_regular
from deltamoe.errors import CheckpointError

__all__ = [
    "DTYPES",
    "DTYPE_CODES",
    "map_tensor",
    "read_tensors",
    "require_finite",
    "stored_dtype",
    "write_pieces",
    "write_tensors",
]

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

DTYPE_CODES: Mapping[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}


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
        allowed = DTYPES if expected is None else (DTYPE_CODES[expected[name].dtype],)
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


def stored_dtype(header: Header) -> torch.dtype:
    """What a model's weights but the wide and the quantised ones are stored in: the embedding's.

    Raises:
        CheckpointError: it is no float.
    """
    code = header.tensors["embedding.weight"].dtype
    if code not in DTYPES or not DTYPES[code].is_floating_point:
        raise CheckpointError(
            f"{header.path}: tensor 'embedding.weight' is {code}; expected F32, BF16, F16 or F64"
        )
    return DTYPES[code]


def map_tensor(header: Header, name: str, *, index: int | None = None) -> Tensor:
    """One tensor of a file, or one slice of it, as a private view of its mapped bytes.

    Only these bytes are mapped, and only as long as the tensor lives: reading a file tensor by
    tensor holds one of them in memory.

    Args:
        header: of the file, which has not changed since.
        name: one of ``header.tensors``, of a dtype in ``DTYPES``.
        index: along the first axis; None is the whole tensor.

    Raises:
        CheckpointError: the file is gone or shorter than its header said.
    """
    info = header.tensors[name]
    shape, begin, num_bytes = info.shape, header.data_begin + info.begin, info.num_bytes
    if index is not None:
        num_bytes //= shape[0]
        begin, shape = begin + index * num_bytes, shape[1:]
    if num_bytes == 0:
        return torch.empty(shape, dtype=DTYPES[info.dtype])
    skipped = begin % mmap.ALLOCATIONGRANULARITY
    with open_regular(header.path, error=CheckpointError) as file:
        try:
            mapped = mmap.mmap(
                file.fileno(), skipped + num_bytes, access=mmap.ACCESS_COPY, offset=begin - skipped
            )
        except (OSError, ValueError) as fault:
            raise CheckpointError(f"{header.path}: cannot be read ({fault})") from None
    data = torch.frombuffer(mapped, dtype=torch.uint8, offset=skipped)
    return data.view(DTYPES[info.dtype]).reshape(shape)


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
    specs = []
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_CODES:
            raise ValueError(f"tensor {name!r} of {tensor.dtype} cannot be written to {path}")
        specs.append(TensorSpec(name, DTYPE_CODES[tensor.dtype], tuple(tensor.shape)))
    write_pieces(path, specs, lambda spec: (tensors[spec.name],), metadata)


def write_pieces(
    path: Path | str,
    specs: Sequence[TensorSpec],
    pieces: Callable[[TensorSpec], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a new safetensors file whose tensors come piece by piece, in the order of ``specs``.

    Args:
        path: a new file, as in ``write_tensors``.
        specs: what the file will hold.
        pieces: gives a tensor's consecutive pieces along its first axis, each of the tensor's
            dtype; one piece is held in memory at a time.
        metadata: text to keep in the header.

    Raises:
        OSError, ValueError: as ``write_tensors``; ValueError also if the pieces of a tensor are
            not what its spec says.
    """
    header = encode_header(specs, metadata)
    with open(path, "xb") as file:
        file.write(header)
        for spec in specs:
            num_bytes = 0
            for piece in pieces(spec):
                if piece.dtype != DTYPES[spec.dtype]:
                    raise ValueError(f"{spec}: a piece is of {piece.dtype}")
                num_bytes += file.write(_bytes_of(piece))
            if num_bytes != spec.num_bytes:
                raise ValueError(f"{spec}: its pieces are {num_bytes:,} bytes")


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
