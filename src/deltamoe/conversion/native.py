"""A published folder to a checkpoint of ours: a step folder that stands alone.

It holds what a run's step folder holds, but no optimizer and no state of training: ``load``,
``generate`` and ``eval`` take it, ``train --resume`` does not.

torch is imported when tensors move.
"""

from collections.abc import Iterator
from pathlib import Path

from deltamoe.checkpoint import Checkpoint
from deltamoe.checkpoint.folder import CONFIG, WEIGHTS, require_new, write_new_folder
from deltamoe.checkpoint.header import TensorSpec, encode_header
from deltamoe.config import to_json
from deltamoe.conversion.plan import ConversionPlan, PlannedFile
from deltamoe.conversion.source import Source
from deltamoe.conversion.stream import OTHER_BYTES, Progress, Stream, stored_dtype
from deltamoe.plan import weights
from deltamoe.tokenizer.chat_template import CHAT_TEMPLATE

__all__ = ["plan_native", "write_native"]


def plan_native(source: Source, out: Path | str, *, dtype: str | None = None) -> ConversionPlan:
    """What ``write_native`` would write; it refuses what that would refuse before writing."""
    require_new(Path(out))
    stored = stored_dtype(dtype, source.dtype)
    specs = list(_specs(source, stored))
    tokenizer = source.tokenizer
    notes = []
    if stored != source.dtype:
        notes.append(f"The weights go from {source.dtype} to {stored}.")
    if tokenizer is None:
        notes.append("There is no tokenizer beside the weights, so none is written.")
    return ConversionPlan(
        source=str(source.path),
        out=str(out),
        kind=source.kind,
        to="deltamoe",
        dtype=stored,
        num_parameters=sum(weight.size for weight in weights(source.config)),
        files=(PlannedFile(WEIGHTS, _num_bytes(specs), len(specs)),),
        tokenizer=tokenizer.name if tokenizer else None,
        notes=tuple(notes),
    )


def write_native(
    source: Source,
    out: Path | str,
    *,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Write a step folder, one piece of a tensor at a time.

    Args:
        source: what ``open_source`` returned.
        out: a new folder; nothing is overwritten.
        dtype: "fp32", "bf16" or "fp16"; None keeps the source's.
        progress: is told how far the work is.

    Raises:
        ConfigError: the dtype is none of these.
        CheckpointError: ``out`` exists, a tensor holds NaN or infinity, or a number that is too
            large for a narrower dtype.
        DoesNotFitError: the disk is too small.
        In all cases nothing is left at ``out``.
    """
    specs = list(_specs(source, stored_dtype(dtype, source.dtype)))
    tokenizer = source.tokenizer
    by_name = {weight.name: weight for weight in weights(source.config)}
    stream = Stream(str(source.path), _num_bytes(specs), progress)

    def fill(folder: Path) -> None:
        (folder / CONFIG).write_text(to_json(source.run), encoding="utf-8")
        stream.write(folder / WEIGHTS, specs, lambda spec: source.pieces(by_name[spec.name]))
        if tokenizer is not None:
            tokenizer.save(folder)
        if source.turns is not None:
            (folder / CHAT_TEMPLATE).write_text(source.turns.jinja(), encoding="utf-8")

    expected = _num_bytes(specs) + OTHER_BYTES
    return write_new_folder(out, fill, step=source.step, expected_bytes=expected)


def _specs(source: Source, dtype: str) -> Iterator[TensorSpec]:
    """The widest first, so that every tensor's data are aligned."""
    for weight in sorted(weights(source.config), key=lambda weight: not weight.is_fp32):
        yield TensorSpec(weight.name, "F32" if weight.is_fp32 else dtype, weight.shape)


def _num_bytes(specs: list[TensorSpec]) -> int:
    return len(encode_header(specs)) + sum(spec.num_bytes for spec in specs)
