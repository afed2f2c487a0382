"""From a folder on disk to a model that can be used, with the tokenizer it was trained with."""

import math
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from deltamoe.checkpoint import Checkpoint, find_checkpoint, load, load_run_config
from deltamoe.checkpoint.folder import TOKENIZER, TRAIN_STATE
from deltamoe.config import RunConfig, read_json
from deltamoe.errors import BackendUnavailableError, CheckpointError, ConfigError
from deltamoe.model import HybridLM
from deltamoe.tokenizer import Tokenizer, load_tokenizer

__all__ = ["OpenedModel", "open_model"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class OpenedModel(NamedTuple):
    """A trained model and where it came from.

    Attributes:
        model: in evaluation mode.
        tokenizer: the one it was trained with.
        config: of the run that trained it.
        checkpoint: the step folder it was read from.
    """

    model: HybridLM
    tokenizer: Tokenizer
    config: RunConfig
    checkpoint: Checkpoint

    @property
    def num_parameters(self) -> int:
        """Parameters in all: the experts a token does not visit count, and the balance biases."""
        return sum(tensor.numel() for tensor in self.model.state_dict().values())

    @property
    def validation_bits_per_byte(self) -> float | None:
        """What training measured on held-out text at this step; None if it did not."""
        if TRAIN_STATE not in self.checkpoint.manifest.files:
            return None
        record = read_json(self.checkpoint.file(TRAIN_STATE), error=CheckpointError).get("record")
        value = record.get("validation_bits_per_byte") if isinstance(record, dict) else None
        return value if isinstance(value, float) and math.isfinite(value) else None


def open_model(
    path: Path | str, *, device: str = "auto", dtype: Literal["fp32", "bf16"] | None = None
) -> OpenedModel:
    """Open a run folder (its newest good checkpoint) or a step folder.

    Args:
        path: the folder.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        dtype: of weights and activations; None keeps the file's.

    Raises:
        CheckpointError: no good checkpoint there.
        ConfigError: no such device.
        BackendUnavailableError: CUDA was asked for by name and is not there.
    """
    checkpoint = find_checkpoint(path)
    return OpenedModel(
        model=load(checkpoint, device=_device(device), dtype=_DTYPES[dtype] if dtype else None),
        tokenizer=load_tokenizer(checkpoint.file(TOKENIZER)),
        config=load_run_config(checkpoint.path),
        checkpoint=checkpoint,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device = {name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendUnavailableError(
            f"device = {name!r}, but torch finds {torch.cuda.device_count()} CUDA devices; "
            "use auto or cpu"
        )
    return device
