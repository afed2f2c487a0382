"""A checkpoint to a quantised one: a step folder that stands alone, for answering only.

One tensor, of a stack of experts one expert, is in memory at a time. The format is described in
``checkpoint/quantized.py``.

torch is imported when tensors move.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deltamoe.checkpoint import Checkpoint
from deltamoe.checkpoint.folder import CONFIG, WEIGHTS, require_new, write_new_folder
from deltamoe.checkpoint.header import TensorSpec, encode_header
from deltamoe.checkpoint.quantized import parts_of, quantized_metadata, stored_tensors
from deltamoe.config import to_json
from deltamoe.conversion.plan import ConversionPlan, PlannedFile
from deltamoe.conversion.source import Source
from deltamoe.conversion.stream import OTHER_BYTES, Progress, Stream, stored_dtype
from deltamoe.errors import CheckpointError
from deltamoe.plan import Bits, Weight, quantized_bits, weights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["plan_quantized", "write_quantized"]


def plan_quantized(
    source: Source, out: Path | str, *, bits: Bits, dtype: str | None = None
) -> ConversionPlan:
    """What ``write_quantized`` would write; it refuses what that would refuse before writing."""
    require_new(Path(out))
    specs = [spec for _, spec in _stored(source, bits, dtype)]
    rounded = [w for w in weights(source.config) if quantized_bits(w, bits) is not None]
    at_bits = sum(w.size for w in rounded if quantized_bits(w, bits) == bits)
    num_parameters = sum(weight.size for weight in weights(source.config))
    notes = [f"{at_bits / num_parameters:.1%} of the parameters go to {bits} bits."]
    if wider := sum(weight.size for weight in rounded) - at_bits:
        notes.append(f"The head and the decay, {wider / num_parameters:.1%}, go to 8 bits.")
    notes.append(f"All else stays, in {stored_dtype(dtype, source.dtype)} or wider.")
    if source.tokenizer is None:
        notes.append("There is no tokenizer beside the weights, so none is written.")
    num_bytes = _num_bytes(specs, bits)
    return ConversionPlan(
        source=str(source.path),
        out=str(out),
        kind=source.kind,
        to="deltamoe",
        dtype=f"{bits} bits",
        num_parameters=num_parameters,
        files=(PlannedFile(WEIGHTS, num_bytes, len(specs)),),
        tokenizer=source.tokenizer.name if source.tokenizer else None,
        notes=tuple(notes),
    )


def write_quantized(
    source: Source,
    out: Path | str,
    *,
    bits: Bits,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Write a quantised step folder, one tensor or one expert at a time.

    Args:
        source: what ``open_source`` returned.
        out: a new folder; nothing is overwritten.
        bits: of the matrices; ``deltamoe.plan.quantized_bits`` has the exceptions.
        dtype: of the rest, "fp32", "bf16" or "fp16"; None keeps the source's.
        progress: is told how far the work is.

    Raises:
        ConfigError: the dtype is none of these.
        CheckpointError: ``out`` exists, a tensor holds NaN or infinity, or numbers beyond the range
            of an fp16 scale.
        DoesNotFitError: the disk is too small.
        In all cases nothing is left at ``out``.
    """
    stored = _stored(source, bits, dtype)
    specs = [spec for _, spec in stored]
    owners = {spec.name: weight for weight, spec in stored}
    tokenizer = source.tokenizer
    num_bytes = _num_bytes(specs, bits)
    stream = Stream(str(source.path), num_bytes, progress)
    scales: dict[str, list[Tensor]] = {}  # of the tensor whose codes were written last

    def pieces(spec: TensorSpec) -> Iterator["Tensor"]:
        weight = owners[spec.name]
        own = quantized_bits(weight, bits)
        if own is None:
            yield from source.pieces(weight)
        elif spec.name == parts_of(weight.name)[0]:
            kept = scales[parts_of(weight.name)[1]] = []
            for piece in source.pieces(weight):
                codes, of_piece = _rounded(piece, own, weight, source)
                kept.append(of_piece)
                yield codes
        else:
            yield from scales.pop(spec.name)

    def fill(folder: Path) -> None:
        (folder / CONFIG).write_text(to_json(source.run), encoding="utf-8")
        stream.write(folder / WEIGHTS, specs, pieces, quantized_metadata(bits))
        if tokenizer is not None:
            tokenizer.save(folder)

    return write_new_folder(out, fill, step=source.step, expected_bytes=num_bytes + OTHER_BYTES)


def _rounded(
    piece: "Tensor", bits: Bits, weight: Weight, source: Source
) -> tuple["Tensor", "Tensor"]:
    from deltamoe.ops.quantized import quantize

    try:
        found = quantize(piece, bits)
    except ValueError as fault:
        raise CheckpointError(f"{source.path}: tensor {weight.name!r}: {fault}") from fault
    return found.values, found.scales


def _stored(source: Source, bits: Bits, dtype: str | None) -> list[tuple[Weight, TensorSpec]]:
    """What the file will hold, the widest first, so that every tensor's data are aligned."""
    tensors = stored_tensors(source.config, bits, dtype=stored_dtype(dtype, source.dtype))
    return sorted(
        tensors,
        key=lambda entry: (
            not entry[0].is_fp32,
            quantized_bits(entry[0], bits) is not None,
        ),
    )


def _num_bytes(specs: list[TensorSpec], bits: Bits) -> int:
    header = encode_header(specs, quantized_metadata(bits))
    return len(header) + sum(spec.num_bytes for spec in specs)
