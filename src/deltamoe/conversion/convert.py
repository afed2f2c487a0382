"""One way into every target: plan a conversion, or do it.

Knows which module writes which target. torch is imported when tensors move.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from deltamoe.conversion.gguf import plan_gguf
from deltamoe.conversion.hf import plan_hf, write_hf
from deltamoe.conversion.native import plan_native, write_native
from deltamoe.conversion.plan import ConversionPlan
from deltamoe.conversion.source import open_source
from deltamoe.conversion.stream import Progress

__all__ = ["Target", "convert", "plan_conversion"]

Target = Literal["hf", "gguf", "deltamoe"]

_GGUF_DTYPE = "f16"


def plan_conversion(
    path: Path | str,
    out: Path | str,
    *,
    to: Target,
    dtype: str | None = None,
    overrides: Sequence[str] = (),
) -> ConversionPlan:
    """What ``convert`` would write with the same arguments; it refuses what that would refuse."""
    source = open_source(path, overrides)
    match to:
        case "hf":
            return plan_hf(source, out, dtype=dtype)
        case "deltamoe":
            return plan_native(source, out, dtype=dtype)
        case "gguf":
            return plan_gguf(source, out, dtype=dtype or _GGUF_DTYPE)


def convert(
    path: Path | str,
    out: Path | str,
    *,
    to: Target,
    dtype: str | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> None:
    """Write a model in another form; nothing is overwritten, and nothing half-written stays.

    Args:
        path: a run folder, a step folder, a published folder or a .gguf file.
        out: a new folder, or for "gguf" a new file.
        to: "hf" (a published folder), "gguf" or "deltamoe" (a checkpoint of ours).
        dtype: "fp32", "bf16" or "fp16" (None: the source's); for "gguf" one of "f32", "f16",
            "bf16" and "q8_0" (None: f16).
        overrides: texts such as "model.mla.latent_norm_eps=1e-6".
        progress: is told how far the work is.

    Raises:
        ConfigError: the target cannot express the model (naming each key), or a bad argument.
        BadFileError: the source cannot be trusted, or ``out`` exists.
        DoesNotFitError: the disk is too small.
    """
    source = open_source(path, overrides)
    match to:
        case "hf":
            write_hf(source, out, dtype=dtype, progress=progress)
        case "deltamoe":
            write_native(source, out, dtype=dtype, progress=progress)
        case "gguf":
            from deltamoe.conversion.gguf import write_gguf

            write_gguf(source, out, dtype=dtype or _GGUF_DTYPE, progress=progress)
