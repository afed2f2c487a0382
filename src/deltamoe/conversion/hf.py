"""A model to a published folder: what ``transformers``, vLLM, SGLang and others open.

Names, shapes and the fields of config.json are the released model's; the folder holds no code. The
weights are one file, or several of at most 5 GB and an index. A manifest of ours seals it, which
other programs overlook.

Knows the order of work; ``checkpoint.published`` knows the format. torch is imported when tensors
move.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from deltamoe.checkpoint import Checkpoint
from deltamoe.checkpoint.folder import CONFIG, WEIGHTS, require_new, write_new_folder
from deltamoe.checkpoint.header import TensorSpec, encode_header
from deltamoe.checkpoint.published import PublishedTensor, published_config
from deltamoe.checkpoint.published.config import DTYPE_NAMES
from deltamoe.checkpoint.published.folder import INDEX
from deltamoe.conversion.plan import ConversionPlan, PlannedFile
from deltamoe.conversion.source import Source
from deltamoe.conversion.stream import OTHER_BYTES, Progress, Stream, stored_dtype
from deltamoe.tokenizer import published_ids, save_published

__all__ = ["plan_hf", "write_hf"]

_METADATA = {"format": "pt"}  # transformers reads no file without it
_FILE_BYTES = 5_000_000_000


class _File(NamedTuple):
    """A file of weights that is to be written."""

    name: str
    specs: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        return len(encode_header(self.specs, _METADATA)) + sum(s.num_bytes for s in self.specs)


def plan_hf(
    source: Source, out: Path | str, *, dtype: str | None = None, file_bytes: int = _FILE_BYTES
) -> ConversionPlan:
    """What ``write_hf`` would write; it refuses what that would refuse before writing."""
    require_new(Path(out))
    stored = stored_dtype(dtype, source.dtype)
    published_config(source.config, dtype=stored)
    tokenizer = source.tokenizer
    files = _files(source, stored, file_bytes)
    notes = []
    if stored != source.dtype:
        notes.append(f"The weights go from {source.dtype} to {stored}.")
    if source.config.tie_embeddings:
        notes.append(
            "The head is written as a copy of the embedding: readers of this format do not tie."
        )
    if tokenizer is None:
        notes.append("There is no tokenizer beside the weights, so none is written.")
    return ConversionPlan(
        source=str(source.path),
        out=str(out),
        kind=source.kind,
        to="hf",
        dtype=DTYPE_NAMES[stored],
        num_parameters=sum(tensor.size for _, tensor in _tensors(source)),
        files=tuple(PlannedFile(f.name, f.num_bytes, len(f.specs)) for f in files),
        tokenizer=tokenizer.name if tokenizer else None,
        notes=tuple(notes),
    )


def write_hf(
    source: Source,
    out: Path | str,
    *,
    dtype: str | None = None,
    file_bytes: int = _FILE_BYTES,
    progress: Progress | None = None,
) -> Checkpoint:
    """Write a published folder, one tensor at a time.

    Args:
        source: what ``open_source`` returned.
        out: a new folder; nothing is overwritten.
        dtype: "fp32", "bf16" or "fp16"; None keeps the source's. ``A_log``, ``dt_bias`` and the
            router's bias are fp32 in any.
        file_bytes: the most a file of weights may take, unless one tensor alone takes more.
        progress: is told how far the work is.

    Raises:
        ConfigError: the format cannot express the model (naming each key), or the dtype.
        CheckpointError: ``out`` exists, a tensor holds NaN or infinity, or a number that is too
            large for a narrower dtype.
        DoesNotFitError: the disk is too small.
        In all cases nothing is left at ``out``.
    """
    stored = stored_dtype(dtype, source.dtype)
    tokenizer = source.tokenizer
    ids: Mapping[str, int] = source.token_ids
    if not ids and tokenizer is not None:
        ids = published_ids(tokenizer)
    settings = published_config(source.config, dtype=stored, token_ids=ids)
    files = _files(source, stored, file_bytes)
    origins = dict(_tensors(source))
    num_bytes = sum(file.num_bytes for file in files)
    stream = Stream(str(source.path), num_bytes, progress)

    def fill(folder: Path) -> None:
        (folder / CONFIG).write_text(_json(settings), encoding="utf-8")
        for file in files:
            stream.write(
                folder / file.name,
                file.specs,
                lambda spec: (source.read(origins[spec.name]),),
                _METADATA,
            )
        if len(files) > 1:
            (folder / INDEX).write_text(_json(_index(files)), encoding="utf-8")
        if tokenizer is not None:
            save_published(tokenizer, folder, chat_template=source.turns)

    return write_new_folder(out, fill, step=source.step, expected_bytes=num_bytes + OTHER_BYTES)


def _tensors(source: Source) -> Iterator[tuple[str, PublishedTensor]]:
    """The folder's names, each with the tensor that is read for it; there is always a head."""
    for tensor in source.tensors():
        yield tensor.name, tensor
        if source.config.tie_embeddings and tensor.ours == "embedding.weight":
            yield "lm_head.weight", tensor


def _files(source: Source, dtype: str, file_bytes: int) -> list[_File]:
    """The tensors in files, block by block, each file as full as it may be."""
    groups: list[list[TensorSpec]] = [[]]
    room = file_bytes
    for name, tensor in _tensors(source):
        spec = TensorSpec(name, "F32" if tensor.is_fp32 else dtype, tensor.shape)
        if spec.num_bytes > room and groups[-1]:
            groups.append([])
            room = file_bytes
        groups[-1].append(spec)
        room -= spec.num_bytes
    # the wide ones first, so that every tensor's data are aligned
    ordered = [tuple(sorted(group, key=lambda spec: spec.dtype != "F32")) for group in groups]
    if len(ordered) == 1:
        return [_File(WEIGHTS, ordered[0])]
    return [
        _File(f"model-{number:05}-of-{len(ordered):05}.safetensors", specs)
        for number, specs in enumerate(ordered, start=1)
    ]


def _index(files: list[_File]) -> dict[str, object]:
    return {
        "metadata": {"total_size": sum(s.num_bytes for file in files for s in file.specs)},
        "weight_map": {spec.name: file.name for file in files for spec in file.specs},
    }


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"
