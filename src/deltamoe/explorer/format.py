"""The trace file: one run of a model, recorded number by number.

A trace is one safetensors file. Its tensors are the arrays of quantities.py; its metadata hold
``kind`` ("deltamoe.trace") and ``summary``, a JSON text with everything that is no array: the
model, the tokens, what was measured and what was left out. docs/explorer.md describes both.

What is kept are causes, not consequences: the keys, values, decay and beta of every token rather
than a memory for every token, queries and keys rather than attention maps. So a file grows with the
text and not with its square, and ``derive.py`` works out the rest, the same for a live model and
for a file.

The reader trusts nothing: every name, shape and dtype must be what the model's own geometry makes
it. No torch.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from deltamoe.checkpoint.durable import replace_file
from deltamoe.checkpoint.header import Header, TensorSpec, encode_header, read_header
from deltamoe.config.model import ModelConfig
from deltamoe.config.parse import from_dict
from deltamoe.config.strict_json import check_format, open_regular, parse_json
from deltamoe.errors import ConfigError, DataError
from deltamoe.explorer.quantities import MOST_TOKENS, QUANTITIES, layers_of, sizes

__all__ = [
    "FORMAT",
    "KIND",
    "MOST_BYTES",
    "Array",
    "Trace",
    "describe",
    "read_trace",
    "to_bytes",
]

KIND = "deltamoe.trace"
FORMAT = 1
MOST_BYTES = 256 << 20
_MOST_SUMMARY_BYTES = 8 << 20

Array = NDArray[Any]
_DTYPES: Mapping[str, tuple[str, str]] = {  # ours -> safetensors', NumPy's
    "f32": ("F32", "<f4"),
    "i32": ("I32", "<i4"),
    "u16": ("U16", "<u2"),
}


@dataclass(frozen=True)
class Trace:
    """One recorded run: its arrays, and in ``summary`` all else, ready for JSON.

    Attributes:
        summary: see docs/explorer.md; ``summary["arrays"]`` describes the arrays.
        arrays: by name; the first axis of most counts the layers in ``layers(name)``.
    """

    summary: dict[str, Any]
    arrays: Mapping[str, Array]

    @cached_property
    def config(self) -> ModelConfig:
        """The model's geometry."""
        return from_dict(self.summary["model"]["config"], ModelConfig)

    @property
    def num_tokens(self) -> int:
        """Tokens that were read, the document border included."""
        return int(self.summary["num_tokens"])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def layers(self, name: str) -> tuple[int, ...] | None:
        """The layers an array's first axis counts; None for one without a layer axis."""
        entry = next(entry for entry in self.summary["arrays"] if entry["name"] == name)
        return None if entry["layers"] is None else tuple(entry["layers"])

    def array(self, name: str, layer: int | None = None) -> Array:
        """An array, or one layer of it.

        Raises:
            DataError: it was not recorded, or not for this layer; the message says what was.
        """
        if name not in self.arrays:
            raise DataError(_absent(self.summary, name))
        array, layers = self.arrays[name], self.layers(name)
        if layer is None:
            return array
        if layers is None:
            raise DataError(f"{name} has no layers: ask for it without one")
        if layer not in layers:
            recorded = ", ".join(map(str, layers)) or "none"
            raise DataError(
                f"{name} was not recorded for layer {layer}; it was for {recorded}. "
                + _reason(self.summary, name)
            )
        part: Array = array[layers.index(layer)]
        return part

    def save(self, path: Path | str) -> None:
        """Write the trace to a file, replacing it in one step.

        Raises:
            DoesNotFitError, CheckpointError: the disk refused.
        """
        replace_file(Path(path), lambda unfinished: _write(unfinished, to_bytes(self)))

    @classmethod
    def load(cls, path: Path | str) -> "Trace":
        """Read a file that ``save`` wrote; errors as for ``read_trace``."""
        return read_trace(path)


def to_bytes(trace: Trace) -> bytes:
    """The whole file of a trace."""
    specs = [
        TensorSpec(name, _DTYPES[QUANTITIES[name].dtype][0], array.shape)
        for name, array in trace.arrays.items()
    ]
    text = json.dumps(trace.summary, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    header = encode_header(specs, {"kind": KIND, "summary": text})
    contents = (np.ascontiguousarray(array).tobytes() for array in trace.arrays.values())
    return b"".join([header, *contents])


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def describe(name: str, array: Array, layers: tuple[int, ...] | None) -> dict[str, Any]:
    """The entry of one array in ``summary["arrays"]``."""
    quantity = QUANTITIES[name]
    axes = quantity.axes if layers is None else ("layer", *quantity.axes)
    least, greatest = (array.min().item(), array.max().item()) if array.size else (None, None)
    return {
        "name": name,
        "dtype": quantity.dtype,
        "axes": list(axes),
        "shape": list(array.shape),
        "layers": None if layers is None else list(layers),
        "unit": quantity.unit,
        "range": [quantity.least, quantity.most],
        "least": least,
        "greatest": greatest,
        "meaning": quantity.meaning,
    }


def read_trace(path: Path | str) -> Trace:
    """Read a trace file, trusting nothing in it.

    Raises:
        CheckpointError: no safetensors file, or one whose header lies (``read_header``).
        DataError: no trace, a newer one, too large, an array that is missing, misshapen, or that
            holds what it cannot hold; the message names it. An array that format 1 did not have
            when this was written is passed over.
    """
    path = Path(path)
    with open_regular(path, error=DataError) as file:
        header = read_header(path)
        if not _is_still(path, file):  # the header would be one file's and the arrays another's
            raise DataError(f"{path}: another file took its place while it was read: open it again")
        return _read(path, header, file)


def _is_still(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _read(path: Path, header: Header, file: BinaryIO) -> Trace:
    if header.file_bytes > MOST_BYTES:
        raise DataError(f"{path}: {header.file_bytes:,} bytes; a trace has at most {MOST_BYTES:,}")
    summary = _read_summary(path, header)
    try:
        config = from_dict(summary["model"].get("config"), ModelConfig)
    except ConfigError as fault:
        raise DataError(f"{path}: {fault}") from fault
    lengths = sizes(config, summary["num_tokens"])
    entries = summary["arrays"]
    names = [entry["name"] for entry in entries]
    if len(set(names)) < len(names) or set(names) != set(header.tensors):
        odd = sorted(set(names) ^ set(header.tensors))[:1] or ["one that stands twice"]
        raise DataError(
            f"{path}: its tensors are not those its summary lists; the first odd one is {odd[0]!a}"
        )
    if len(summary["layers"]) != config.num_layers:
        raise DataError(
            f"{path}: summary: describes {len(summary['layers']):,} layers; "
            f"the model has {config.num_layers:,}"
        )
    for key in ("weight_bytes", "state_bytes", "cache_bytes_per_token"):
        if type(summary["model"].get(key)) is not int:
            raise DataError(f"{path}: summary: model.{key}: expected a whole number")
    entries = [entry for entry in entries if entry["name"] in QUANTITIES]
    summary["arrays"] = entries  # of the same format, a newer program may have added some
    for entry in entries:
        _check_entry(path, entry, header, config, lengths)
    arrays = _read_arrays(path, header, file, [entry["name"] for entry in entries])
    for name, array in arrays.items():
        _check_values(path, name, array, config)
    required = {name for name, quantity in QUANTITIES.items() if quantity.over is None}
    if missing := sorted(required - set(names)):
        raise DataError(f"{path}: the array {missing[0]} is missing; every trace has it")
    if arrays["tokens.ids"].tolist() != [token["id"] for token in summary["tokens"]]:
        raise DataError(f"{path}: tokens.ids and the summary's tokens disagree")
    return Trace(summary, arrays)


_TEXT, _WHOLE, _MAPPING, _LIST = str, int, dict, list
_SUMMARY: Mapping[str, type] = {
    "program": _TEXT,
    "source": _MAPPING,
    "model": _MAPPING,
    "tokenizer": _MAPPING,
    "prompt": _TEXT,
    "text": _TEXT,
    "num_tokens": _WHOLE,
    "num_prompt_tokens": _WHOLE,
    "finish_reason": _TEXT,
    "sampling": _MAPPING,
    "tokens": _LIST,
    "texts": _MAPPING,
    "layers": _LIST,
    "arrays": _LIST,
    "left_out": _LIST,
    "bytes": _MAPPING,
    "timings": _MAPPING,
    "checks": _LIST,
}
_ENTRY: Mapping[str, type] = {"name": str, "dtype": str, "axes": list, "shape": list, "unit": str}


def _read_summary(path: Path, header: Header) -> dict[str, Any]:
    if header.metadata.get("kind") != KIND:
        raise DataError(
            f"{path}: expected a trace; this safetensors file is none. "
            "`deltamoe trace` records one, `deltamoe inspect` looks into other files"
        )
    summary = parse_json(
        header.metadata.get("summary", ""),
        source=f"{path}: summary",
        error=DataError,
        max_bytes=_MOST_SUMMARY_BYTES,
        max_depth=8,
    )
    if not isinstance(summary, dict):
        raise DataError(f"{path}: summary: expected a JSON object")
    check_format(summary, source=f"{path}: summary", known=FORMAT, error=DataError)
    for key, kind in _SUMMARY.items():
        if type(summary.get(key)) is not kind:
            raise DataError(f"{path}: summary: {key!r} is missing or of the wrong kind")
    num_tokens = summary["num_tokens"]
    if not 1 <= num_tokens <= MOST_TOKENS or not (
        1 <= summary["num_prompt_tokens"] <= num_tokens == len(summary["tokens"])
    ):
        raise DataError(
            f"{path}: summary: {num_tokens:,} tokens, {summary['num_prompt_tokens']:,} of them the "
            f"prompt's, {len(summary['tokens']):,} listed; expected 1 to {MOST_TOKENS:,} and all "
            "of them listed"
        )
    for token in summary["tokens"]:
        if not (
            isinstance(token, dict)
            and type(token.get("id")) is int
            and isinstance(token.get("text"), str)
        ):
            raise DataError(f"{path}: summary: a token without an id and a text")
    texts = [*summary["texts"].values(), *(token["text"] for token in summary["tokens"])]
    if not all(isinstance(text, str) and len(text) <= 1024 for text in texts):
        raise DataError(f"{path}: summary: a token's text is no text of at most 1,024 characters")
    for entry in summary["arrays"]:
        if not isinstance(entry, dict) or any(
            type(entry.get(key)) is not kind for key, kind in _ENTRY.items()
        ):
            raise DataError(f"{path}: summary: an entry of arrays lacks {', '.join(_ENTRY)}")
    return summary


def _check_entry(
    path: Path,
    entry: dict[str, Any],
    header: Header,
    config: ModelConfig,
    lengths: Mapping[str, int],
) -> None:
    """One array's description, its tensor and the model's geometry must agree."""
    name = entry["name"]
    where = f"{path}: array {name[:200]!a}"
    quantity = QUANTITIES[name]
    expected = [lengths.get(axis, 0) for axis in quantity.axes]
    layers: Any = entry.get("layers")
    if quantity.over is not None:
        possible = layers_of(config, quantity.over)
        is_subset = isinstance(layers, list) and all(
            type(layer) is int and layer in possible for layer in layers
        )
        if not is_subset or sorted(set(layers)) != layers:
            raise DataError(f"{where}: layers {ascii(layers)[:80]}; expected some of {possible}")
        expected = [len(layers), *expected]
    elif layers is not None:
        raise DataError(f"{where}: has layers, and no axis for them")
    info = header.tensors[name]
    if list(info.shape) != expected or entry["shape"] != expected:
        raise DataError(
            f"{where}: shape {list(info.shape)}; this model and text make it {expected}"
        )
    if info.dtype != _DTYPES[quantity.dtype][0] or entry["dtype"] != quantity.dtype:
        raise DataError(f"{where}: {info.dtype}; expected {_DTYPES[quantity.dtype][0]}")


def _read_arrays(path: Path, header: Header, file: BinaryIO, names: list[str]) -> dict[str, Array]:
    arrays = {}
    for name in names:
        info = header.tensors[name]
        file.seek(header.data_begin + info.begin)
        content = file.read(info.num_bytes)
        if len(content) < info.num_bytes:
            raise DataError(f"{path}: array {name}: the file was cut while it was read")
        dtype = _DTYPES[QUANTITIES[name].dtype][1]
        arrays[name] = np.frombuffer(content, dtype).reshape(info.shape)
    return arrays


def _check_values(path: Path, name: str, array: Array, config: ModelConfig) -> None:
    quantity = QUANTITIES[name]
    least, most = quantity.least, quantity.most
    if quantity.unit == "token id":
        most = config.vocab_size - 1
    elif quantity.unit == "expert" and config.moe is not None:
        most = config.moe.num_experts - 1
    if not array.size:
        return
    low, high = float(array.min()), float(array.max())
    slack = 1e-3 if quantity.dtype == "f32" else 0.0  # of rounding in the program that wrote it
    if not (
        math.isfinite(low)
        and math.isfinite(high)
        and (least is None or low >= least - slack)
        and (most is None or high <= most + slack)
    ):
        raise DataError(
            f"{path}: array {name}: holds {low:g} to {high:g}; expected finite numbers"
            + ("" if least is None else f" from {least:g}")
            + ("" if most is None else f" to {most:g}")
        )


def _absent(summary: dict[str, Any], name: str) -> str:
    if name not in QUANTITIES:
        return f"no array {name[:80]!r}; the arrays are {', '.join(QUANTITIES)}"
    return f"{name} was not recorded. {_reason(summary, name)}"


def _reason(summary: dict[str, Any], name: str) -> str:
    reasons = [entry["reason"] for entry in summary["left_out"] if name in entry["arrays"]]
    return " ".join(reasons) or "This model has no such layers."
