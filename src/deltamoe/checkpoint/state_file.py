"""A model's state in one safetensors file: a conversation put aside and taken up again.

A state belongs to one geometry and, if known, to one set of weights: read by any other it would
answer nonsense without failing. So the file carries the model's configuration and the hash of its
weights, and the reader compares both.

Knows nothing of text; which tokens the state has read is for the caller to remember.
"""

from pathlib import Path

import torch
from torch import Tensor

from deltamoe.checkpoint.durable import replace_file
from deltamoe.checkpoint.header import Header, read_header
from deltamoe.checkpoint.tensors import DTYPES, read_tensors, write_tensors
from deltamoe.config.model import ModelConfig
from deltamoe.config.parse import from_json, leaves, to_dict, to_json
from deltamoe.config.strict_json import check_format
from deltamoe.errors import CheckpointError, ConfigError
from deltamoe.model import HybridLM, KdaState, MlaState, ModelState

__all__ = ["load_state", "save_state"]

_KIND = "deltamoe.state"
_FORMAT = 1
_WIDE = ("F32", "F64")  # the memory is never narrower
_FLOATS = ("F16", "BF16", *_WIDE)


def save_state(
    path: Path | str, state: ModelState, *, config: ModelConfig, weights_sha256: str = ""
) -> None:
    """Write a state, replacing the file in one step.

    Args:
        path: where; by custom ends in .safetensors.
        state: any number of rows, as the model returned it.
        config: the model's.
        weights_sha256: ``Checkpoint.weights_sha256`` of the weights; empty if they are not known.

    Raises:
        DoesNotFitError: the disk is full.
        CheckpointError: the disk refused otherwise.
    """
    tensors = {"lengths": state.lengths}
    for i, layer in enumerate(state.layers):
        tensors |= {f"layers.{i}.{name}": value for name, value in layer._asdict().items()}
    metadata = {
        "kind": _KIND,
        "format": str(_FORMAT),
        "config": to_json(config),
        "weights_sha256": weights_sha256,
    }
    replace_file(Path(path), lambda unfinished: write_tensors(unfinished, tensors, metadata))


def load_state(
    path: Path | str,
    *,
    config: ModelConfig,
    weights_sha256: str = "",
    device: torch.device | str = "cpu",
) -> ModelState:
    """Read a state that ``save_state`` wrote.

    Args:
        path: the file.
        config: of the model that will go on from the state; it must be the writer's.
        weights_sha256: of that model's weights. Compared if both sides know theirs.
        device: where the tensors go.

    Raises:
        CheckpointError: no state file, a newer format, another model's, other weights', torn, or
            not finite; the message names the first difference.
    """
    header = read_header(path)
    _check_origin(header, config, weights_sha256)
    tensors = read_tensors(path, expected=_expected(header, config), device=device)
    kinds = [KdaState if config.mixer(i) == "kda" else MlaState for i in range(config.num_layers)]
    layers = [
        kind(*(tensors[f"layers.{i}.{name}"] for name in kind._fields))
        for i, kind in enumerate(kinds)
    ]
    state = ModelState(tuple(layers), tensors["lengths"])
    _check_lengths(state, source=str(path))
    return state


def _check_origin(header: Header, config: ModelConfig, weights_sha256: str) -> None:
    path, metadata = header.path, header.metadata
    if metadata.get("kind") != _KIND:
        raise CheckpointError(f"{path}: expected a state that deltamoe saved; this is none")
    version = metadata.get("format", "")
    check_format(
        {"format": int(version) if version.isdecimal() and len(version) < 10 else version},
        source=str(path),
        known=_FORMAT,
        error=CheckpointError,
    )
    try:
        writer = from_json(metadata.get("config", ""), ModelConfig, source=f"{path}: config")
    except ConfigError as fault:
        raise CheckpointError(str(fault)) from fault
    theirs, ours = (leaves({"model": to_dict(geometry)}) for geometry in (writer, config))
    for key in theirs | ours:
        if theirs.get(key) != ours.get(key):
            raise CheckpointError(
                f"{path}: the state of another model: {key} = {theirs.get(key)} there, "
                f"{ours.get(key)} in this model"
            )
    known = metadata.get("weights_sha256", "")
    if known and weights_sha256 and known != weights_sha256:
        raise CheckpointError(
            f"{path}: the state of other weights (SHA-256 {known[:12]}…, this model's is "
            f"{weights_sha256[:12]}…); load the checkpoint it was saved with"
        )


def _expected(header: Header, config: ModelConfig) -> dict[str, Tensor]:
    """What the geometry prescribes, given the file's rows, past tokens and precision."""
    rows = _size(header, "lengths", 0)
    with torch.device("meta"):
        initial = HybridLM(config).initial_state(rows)
        expected = {"lengths": initial.lengths}
        for i, layer in enumerate(initial.layers):
            for name, value in layer._asdict().items():
                tensor = f"layers.{i}.{name}"
                shape = list(value.shape)
                if isinstance(layer, MlaState):
                    shape[1] = _size(header, f"layers.{i}.latent", 1)
                allowed = _WIDE if name == "memory" else _FLOATS
                stored = header.tensors[tensor].dtype if tensor in header.tensors else "F32"
                dtype = DTYPES[stored if stored in allowed else "F32"]
                expected[tensor] = torch.empty(shape, dtype=dtype)
    return expected


def _check_lengths(state: ModelState, *, source: str) -> None:
    lengths = state.lengths.tolist()
    longest = max(lengths, default=0)
    if min(lengths, default=0) < 0:
        raise CheckpointError(f"{source}: tensor 'lengths': a length is negative")
    for i, layer in enumerate(state.layers):
        if isinstance(layer, MlaState) and layer.latent.shape[1] != longest:
            raise CheckpointError(
                f"{source}: tensor 'layers.{i}.latent' holds {layer.latent.shape[1]} tokens; "
                f"expected {longest}, the longest of 'lengths'"
            )


def _size(header: Header, name: str, dim: int) -> int:
    shape = header.tensors[name].shape if name in header.tensors else ()
    return shape[dim] if dim < len(shape) else 0
