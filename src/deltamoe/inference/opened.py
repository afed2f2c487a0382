"""From a folder on disk to a model that can be used, with the tokenizer it was trained with."""

import math
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from deltamoe.checkpoint import Checkpoint, find_checkpoint, load, load_config, load_run_config
from deltamoe.checkpoint.folder import TOKENIZER, TRAIN_STATE
from deltamoe.checkpoint.published import is_published
from deltamoe.config import RunConfig, read_json
from deltamoe.errors import CheckpointError
from deltamoe.layers.expert_cache import CachedExperts, ExpertCache
from deltamoe.model import HybridLM
from deltamoe.model.device import choose_device
from deltamoe.plan import Bits, parameters
from deltamoe.tokenizer import (
    ChatTemplate,
    Tokenizer,
    check_fit,
    load_tokenizer,
    read_chat_template,
)

__all__ = ["OpenedModel", "open_model"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class OpenedModel(NamedTuple):
    """A trained model and where it came from.

    Attributes:
        model: in evaluation mode.
        tokenizer: the one it was trained with.
        config: of the run that trained it; of a published model, all but the geometry is default.
        checkpoint: the step folder it was read from, or the published folder as one.
        tokenizer_path: what the tokenizer was read from.
        chat_template: the form of its turns; None for a base model.
    """

    model: HybridLM
    tokenizer: Tokenizer
    config: RunConfig
    checkpoint: Checkpoint
    tokenizer_path: Path
    chat_template: ChatTemplate | None

    @property
    def label(self) -> str:
        """What a person may call it: the step of a run, or the name of a published folder."""
        if is_published(self.checkpoint.path):
            return self.checkpoint.path.resolve().name
        return f"step {self.checkpoint.step:,}"

    @property
    def num_parameters(self) -> int:
        """Parameters in all: the experts a token does not visit count, and the balance biases."""
        return parameters(self.model.config).total

    @property
    def expert_cache(self) -> ExpertCache | None:
        """The experts in memory, where the others stay on the disk; None if all are there."""
        layers = (m for m in self.model.modules() if isinstance(m, CachedExperts))
        return next((layer.cache for layer in layers), None)

    @property
    def validation_bits_per_byte(self) -> float | None:
        """What training measured on held-out text at this step; None if it did not."""
        if TRAIN_STATE not in self.checkpoint.manifest.files:
            return None
        record = read_json(self.checkpoint.file(TRAIN_STATE), error=CheckpointError).get("record")
        value = record.get("validation_bits_per_byte") if isinstance(record, dict) else None
        return value if isinstance(value, float) and math.isfinite(value) else None


def open_model(
    path: Path | str,
    *,
    device: str = "auto",
    dtype: Literal["fp32", "bf16"] | None = None,
    quantize: Bits | None = None,
    memory: int | None = None,
) -> OpenedModel:
    """Open a run folder (its newest good checkpoint), a step folder or a published folder.

    Args:
        path: the folder.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        dtype: of weights and activations; None keeps the file's.
        quantize, memory: as for ``deltamoe.checkpoint.load``. With ``memory`` the file is not read
            to its end, so its hash is not compared, only its size.

    Raises:
        CheckpointError: no good checkpoint there.
        BadFileError: a tokenizer or a chat template that cannot be trusted.
        ConfigError: no such device, or a tokenizer with more ids than the model.
        BackendUnavailableError: CUDA was asked for by name and is not there.
    """
    checkpoint = find_checkpoint(path, check_hashes=memory is None)
    if is_published(checkpoint.path):
        config = RunConfig(model=load_config(checkpoint.path))
        tokenizer_path = checkpoint.path
    else:
        config = load_run_config(checkpoint.path)
        tokenizer_path = checkpoint.file(TOKENIZER)
    tokenizer = load_tokenizer(tokenizer_path)
    check_fit(tokenizer, config.model.vocab_size)
    return OpenedModel(
        model=load(
            checkpoint,
            device=choose_device("cpu" if memory is not None and device == "auto" else device),
            dtype=_DTYPES[dtype] if dtype else None,
            quantize=quantize,
            memory=memory,
        ),
        tokenizer=tokenizer,
        config=config,
        checkpoint=checkpoint,
        tokenizer_path=tokenizer_path,
        chat_template=read_chat_template(checkpoint.path, tokenizer),
    )
