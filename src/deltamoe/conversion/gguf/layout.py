"""What a GGUF file would hold, in bytes: the type and size of each tensor, and the plan of a file.

Knows no tensor's values. No torch.
"""

from math import prod
from pathlib import Path
from typing import Any

from deltamoe.checkpoint.folder import require_new
from deltamoe.conversion.gguf.keys import check_expressible
from deltamoe.conversion.gguf.names import Entry, entries
from deltamoe.conversion.gguf.package import gguf
from deltamoe.conversion.gguf.vocabulary import vocabulary
from deltamoe.conversion.plan import ConversionPlan, PlannedFile
from deltamoe.conversion.source import Source
from deltamoe.errors import ConfigError

__all__ = ["DTYPES", "check_source", "entry_dtype", "num_bytes", "plan_gguf", "type_of"]

DTYPES = ("f32", "f16", "bf16", "q8_0")
"""What the matrices may be written in; what is small or wants it is fp32 in all of them."""


def entry_dtype(entry: Entry, dtype: str) -> str:
    """What one tensor is written in, in a file of ``dtype``; rows of q8_0 go by 32."""
    if entry.is_fp32:
        return "f32"
    return "f16" if dtype == "q8_0" and entry.shape[-1] % 32 else dtype


def num_bytes(entry: Entry, dtype: str) -> int:
    """Bytes of one tensor's data, in a file of ``dtype``."""
    block, block_bytes = gguf().GGML_QUANT_SIZES[type_of(entry_dtype(entry, dtype))]
    return prod(entry.shape) // int(block) * int(block_bytes)


def type_of(dtype: str) -> Any:
    """The package's name for a type."""
    return gguf().GGMLQuantizationType[dtype.upper()]


def check_source(source: Source, dtype: str) -> dict[str, Any]:
    """The vocabulary's keys, if the source can be written in ``dtype`` at all.

    Raises:
        ConfigError: an unknown dtype; a model or tokenizer that the format cannot express (the
            message names the keys); no tokenizer; the package gguf is not installed.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}: a GGUF file is written in {', '.join(DTYPES)}")
    check_expressible(source.config)
    if source.tokenizer is None:
        raise ConfigError(
            f"{source.path}: no tokenizer beside the weights; a GGUF file must hold its vocabulary"
        )
    gguf()
    return vocabulary(source.tokenizer, source.config.vocab_size)


def plan_gguf(source: Source, out: Path | str, *, dtype: str = "f16") -> ConversionPlan:
    """What ``write_gguf`` would write; it refuses what that would refuse before writing."""
    out = Path(out)
    require_new(out)
    check_source(source, dtype)
    config, tokenizer = source.config, source.tokenizer
    todo = list(entries(config))
    notes = ["Norms, biases, decays, routers and convolution taps are fp32 in any dtype."]
    uneven = sum(entry_dtype(entry, dtype) == "f16" for entry in todo) if dtype == "q8_0" else 0
    if uneven:
        notes.append(f"{uneven} matrices stay f16: their rows are no multiple of 32.")
    if config.tie_embeddings:
        notes.append("The head is written as a copy of the embedding: llama.cpp asks for one.")
    return ConversionPlan(
        source=str(source.path),
        out=str(out),
        kind=source.kind,
        to="gguf",
        dtype=dtype,
        num_parameters=sum(prod(entry.shape) for entry in todo),
        files=(PlannedFile(out.name, sum(num_bytes(e, dtype) for e in todo), len(todo)),),
        tokenizer=tokenizer.name if tokenizer else None,
        notes=tuple(notes),
    )
