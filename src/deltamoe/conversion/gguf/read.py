"""Read a GGUF file of architecture "kimi-linear" into a model, whoever wrote it.

The header was checked by header.py and its keys by keys.py; here names, shapes and types of all
tensors are compared with what the configuration prescribes, before any is read. Then tensor after
tensor is mapped, decoded, laid out as ours and kept: the cost is the model and one tensor.

Knows the order of work; names.py, keys.py and vocabulary.py know what is read.
"""

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltamoe.checkpoint.tensors import require_finite
from deltamoe.config import ModelConfig, open_regular
from deltamoe.conversion.gguf.header import GgufHeader, GgufTensor, read_gguf_header
from deltamoe.conversion.gguf.keys import RATES_KEY, config_of
from deltamoe.conversion.gguf.names import Entry, entries, from_entry, join_latent_up
from deltamoe.conversion.gguf.package import gguf
from deltamoe.conversion.gguf.vocabulary import tokenizer_of
from deltamoe.errors import CheckpointError, DoesNotFitError
from deltamoe.model import HybridLM
from deltamoe.plan import Weight, machine_memory, weights
from deltamoe.tokenizer import Tokenizer

__all__ = ["Gguf", "read_gguf"]

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Gguf(NamedTuple):
    """What a file holds.

    Attributes:
        model: in evaluation mode; ``model.config`` is its configuration.
        tokenizer: None if another program wrote the file.
    """

    model: HybridLM
    tokenizer: Tokenizer | None


def read_gguf(path: Path | str, *, dtype: torch.dtype | None = None) -> Gguf:
    """Read a model and its tokenizer.

    Args:
        path: a file of ours, or of any other writer of this architecture.
        dtype: of the weights; None keeps that of the embedding, and is fp32 if it is quantised.
            ``A_log``, ``dt_bias`` and the balance bias are never narrower than fp32.

    Raises:
        CheckpointError: a hostile or damaged file (header.py); keys that disagree; a tensor that
            is missing, unknown, misshapen, of a type that cannot be decoded, or not finite.
        DoesNotFitError: the model is larger than this machine's memory.
        ConfigError: a package that is not installed.
    """
    header = read_gguf_header(path)
    source = str(header.path)
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(f"{source}: tensor 'token_embd.weight' is missing")
    embedding = header.tensors["token_embd.weight"]
    config = config_of(header.fields, vocab_size=embedding.shape[0], source=source)
    _check_tensors(header, config)
    narrow = _PLAIN.get(embedding.dtype, torch.float32) if dtype is None else dtype
    _require_room(header, config, narrow)
    tokenizer = tokenizer_of(header.fields, source=source)
    model = _model(header, config, narrow)
    return Gguf(model, tokenizer)


def _check_tensors(header: GgufHeader, config: ModelConfig) -> None:
    known = set()
    for entry in entries(config):
        place = header.tensors.get(entry.name)
        if place is None:
            raise CheckpointError(f"{header.path}: tensor {entry.name!r} is missing")
        if _without_ones(place.shape) != _without_ones(entry.shape):
            raise CheckpointError(
                f"{header.path}: tensor {entry.name!r} has shape {list(place.shape)}; "
                f"expected {list(entry.shape)}"
            )
        known.add(entry.name)
    if unknown := [name for name in header.tensors if name not in known]:
        raise CheckpointError(
            f"{header.path}: {len(unknown):,} tensors too many, the first is {unknown[0]!a}"
        )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """What a shape says; other writers leave out sizes of 1."""
    return tuple(size for size in shape if size != 1)


def _require_room(header: GgufHeader, config: ModelConfig, dtype: torch.dtype) -> None:
    needed = sum(weight.size for weight in weights(config)) * dtype.itemsize
    if needed > machine_memory():
        raise DoesNotFitError(
            f"{header.path}: the model takes {needed:,} bytes, this machine has "
            f"{machine_memory():,} of memory; a narrower dtype may do"
        )


def _model(header: GgufHeader, config: ModelConfig, narrow: torch.dtype) -> HybridLM:
    wide = torch.promote_types(narrow, torch.float32)
    rates = _rates(header, config)
    found: dict[str, list[Entry]] = {}
    for entry in entries(config):
        if entry.name != "output.weight" or not config.tie_embeddings:
            found.setdefault(entry.ours, []).append(entry)
    tensors = {}
    for weight in weights(config):
        value = _ours(header, weight, found[weight.name])
        if weight.name in rates:
            value = _checked_rates(header, rates[weight.name], value)
        tensors[weight.name] = value.to(wide if weight.is_fp32 else narrow)
        require_finite({weight.name: tensors[weight.name]}, source=str(header.path))
    with torch.device("meta"):
        model = HybridLM(config)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _ours(header: GgufHeader, weight: Weight, rows: list[Entry]) -> Tensor:
    parts = {
        entry.form: _decoded(header, entry.name, header.tensors[entry.name]).reshape(entry.shape)
        for entry in rows
    }
    if len(rows) > 1:
        return join_latent_up(parts)
    return from_entry(rows[0], parts[rows[0].form], weight)


def _decoded(header: GgufHeader, name: str, place: GgufTensor) -> Tensor:
    """A tensor's numbers, flat: a private copy in its own dtype, or fp32 if it is quantised."""
    data = _mapped(header, place)
    if place.dtype in _PLAIN:
        return torch.from_numpy(data).view(_PLAIN[place.dtype]).clone()
    kind = gguf().GGMLQuantizationType[place.dtype]
    block, block_bytes = gguf().GGML_QUANT_SIZES[kind]
    rows = data.reshape(-1, place.shape[-1] // block * block_bytes)
    try:
        with np.errstate(all="ignore"):  # what is not finite is refused by its tensor's name
            numbers = gguf().quants.dequantize(rows, kind)
    except NotImplementedError:
        raise CheckpointError(
            f"{header.path}: tensor {name!r} is {place.dtype}, which cannot be decoded here"
        ) from None
    return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float32)).flatten()


def _mapped(header: GgufHeader, place: GgufTensor) -> np.ndarray:
    skipped = place.begin % mmap.ALLOCATIONGRANULARITY
    with open_regular(header.path, error=CheckpointError) as file:
        try:
            mapped = mmap.mmap(
                file.fileno(),
                place.end - place.begin + skipped,
                access=mmap.ACCESS_COPY,
                offset=place.begin - skipped,
            )
        except (OSError, ValueError) as fault:
            raise CheckpointError(f"{header.path}: cannot be read ({fault})") from None
    return np.frombuffer(mapped, dtype=np.uint8, offset=skipped)


def _rates(header: GgufHeader, config: ModelConfig) -> Mapping[str, Tensor]:
    """A_log of each KDA layer, which a file of ours carries as it was."""
    stored = header.fields.get(RATES_KEY)
    if stored is None:
        return {}
    logs = [weight for weight in weights(config) if weight.name.endswith(".A_log")]
    is_list = isinstance(stored, list) and all(type(number) is float for number in stored)
    if not is_list or len(stored) != sum(weight.size for weight in logs):
        raise CheckpointError(f"{header.path}: {RATES_KEY}: expected one real number a KDA head")
    parts = torch.tensor(stored).split([weight.size for weight in logs])
    return {weight.name: part.clone() for weight, part in zip(logs, parts, strict=True)}


def _checked_rates(header: GgufHeader, exact: Tensor, worked_out: Tensor) -> Tensor:
    """The exact A_log, if it is what the file's own factor -exp(A_log) says."""
    if not torch.allclose(exact, worked_out.float(), rtol=1e-6, atol=1e-6):
        raise CheckpointError(f"{header.path}: {RATES_KEY} disagrees with the tensors ssm_a")
    return exact
