"""Write a model as a GGUF file, one piece of one tensor at a time.

The header comes first and needs no tensor, only their shapes; then each tensor is mapped, laid
out, converted in pieces of at most 64 MiB and written. So the cost in memory is a few pieces and
one tensor of the source (of a stack, one expert), whatever the model's size.

Knows the order of work; names.py, keys.py, layout.py and vocabulary.py know what is written.
"""

import shutil
from collections.abc import Iterator
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltamoe.checkpoint.durable import replace_file
from deltamoe.checkpoint.folder import require_new
from deltamoe.config import to_json
from deltamoe.conversion.gguf.keys import ARCHITECTURE, CONFIG_KEY, RATES_KEY, geometry
from deltamoe.conversion.gguf.layout import check_source, entry_dtype, num_bytes, type_of
from deltamoe.conversion.gguf.names import Entry, entries, to_entry
from deltamoe.conversion.gguf.package import gguf
from deltamoe.conversion.source import Source
from deltamoe.conversion.stream import Progress
from deltamoe.errors import CheckpointError, DoesNotFitError
from deltamoe.plan import Weight, weights

__all__ = ["write_gguf"]

_MAX_LENGTH = 1_048_576  # the released model's; the architecture itself sets no limit
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # the format's numbers
_QUANTIZATION_VERSION = 2
_LARGEST = {
    "f32": torch.finfo(torch.float32).max,
    "f16": torch.finfo(torch.float16).max,
    "bf16": torch.finfo(torch.bfloat16).max,
    "q8_0": 127 * torch.finfo(torch.float16).max,  # 127 steps of an fp16 scale
}
_PIECE_ELEMENTS = 16 << 20


def write_gguf(
    source: Source, out: Path | str, *, dtype: str = "f16", progress: Progress | None = None
) -> None:
    """Write a model and its tokenizer as one GGUF file of architecture "kimi-linear".

    Args:
        source: what ``open_source`` returned.
        out: a new file; one that exists is never overwritten.
        dtype: of the matrices: "f32", "f16", "bf16" or "q8_0".
        progress: is told how far the work is.

    Raises:
        ConfigError: an unknown dtype, a model or tokenizer that the format cannot express (the
            message names the keys), or a package that is not installed.
        CheckpointError: ``out`` exists or cannot be written, a tensor holds NaN or infinity, or a
            number that is too large for ``dtype``.
        DoesNotFitError: the disk is too small.
        In all cases nothing is left at ``out``.
    """
    out = Path(out)
    require_new(out)
    fields = _fields(source, dtype)
    todo = list(entries(source.config))
    needed = sum(num_bytes(entry, dtype) for entry in todo)
    if needed > (free := shutil.disk_usage(out.absolute().parent).free):
        raise DoesNotFitError(f"{out}: about {needed:,} bytes needed, {free:,} are free")

    def write(path: Path) -> None:
        writer = gguf().GGUFWriter(path, ARCHITECTURE)
        try:
            for key, value in fields.items():
                _add(writer, key, value)
            for entry in todo:
                kind, size = type_of(entry_dtype(entry, dtype)), num_bytes(entry, dtype)
                writer.add_tensor_info(
                    entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=kind
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            _write_data(writer, source, todo, dtype, needed, progress)
        finally:
            writer.close()

    replace_file(out, write)


def _write_data(
    writer: Any,
    source: Source,
    todo: list[Entry],
    dtype: str,
    total: int,
    progress: Progress | None,
) -> None:
    (file,) = writer.fout
    by_name = {weight.name: weight for weight in weights(source.config)}
    done = 0
    for entry in todo:
        writer.write_padding(file, file.tell())
        for piece in _pieces(source, entry, by_name[entry.ours], entry_dtype(entry, dtype)):
            piece.tofile(file)
            done += piece.nbytes
            if progress is not None:
                progress("weights", done, total)
    writer.write_padding(file, file.tell())


def _fields(source: Source, dtype: str) -> dict[str, Any]:
    words = check_source(source, dtype)
    if source.turns is not None:
        words["tokenizer.chat_template"] = source.turns.jinja()
    config = source.config
    length = source.run.data.context if source.kind == "checkpoint" else _MAX_LENGTH
    keys = {"context_length": length, **geometry(config)}
    logs = [weight for weight in weights(config) if weight.name.endswith(".A_log")]
    return {
        "general.name": f"deltamoe {config.schedule}",
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": _QUANTIZATION_VERSION,
        **{f"{ARCHITECTURE}.{key}": value for key, value in keys.items()},
        **words,
        CONFIG_KEY: to_json(config),
        RATES_KEY: [
            number
            for piece in chain.from_iterable(map(source.pieces, logs))
            for number in piece.float().tolist()
        ],
    }


def _add(writer: Any, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _pieces(source: Source, entry: Entry, weight: Weight, dtype: str) -> Iterator[NDArray[Any]]:
    """A tensor's data, in order."""
    for part in source.pieces(weight):
        laid = to_entry(entry, part, source.config.mla)
        step = max(1, _PIECE_ELEMENTS // prod(laid.shape[1:]))
        for piece in laid.split(step):
            _require_range(entry, piece, dtype)
            yield _encoded(piece, dtype)


def _encoded(piece: Tensor, dtype: str) -> NDArray[Any]:
    """The numbers of a piece as they stand in the file."""
    if dtype == "f16":
        return piece.half().contiguous().numpy()
    if dtype == "bf16":
        return piece.bfloat16().contiguous().view(torch.int16).numpy()
    wide = piece.float().contiguous().numpy()
    encoded: NDArray[Any] = wide if dtype == "f32" else gguf().quants.quantize(wide, type_of(dtype))
    return encoded


def _require_range(entry: Entry, piece: Tensor, dtype: str) -> None:
    largest = max(abs(float(bound)) for bound in piece.aminmax())
    if not largest <= _LARGEST[dtype]:
        raise CheckpointError(
            f"tensor {entry.ours!r} holds {largest:g}, too large for {dtype}; bf16 or f32 will do"
        )
