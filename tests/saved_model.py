"""Models that the published format can express, with every weight drawn, and their checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltamoe.checkpoint import write_checkpoint, write_tensors
from deltamoe.config import KdaConfig, ModelConfig, RunConfig, to_json
from deltamoe.model import HybridLM
from deltamoe.testing import tiny_config
from deltamoe.tokenizer import ByteTokenizer


def publishable_config(**changes: Any) -> ModelConfig:
    """``tiny_config`` with values as wide as keys, and all else the format asks for."""
    kda = KdaConfig(num_heads=2, key_dim=8, value_dim=8)
    return replace(tiny_config(), **{"kda": kda, **changes})


def drawn_model(config: ModelConfig, seed: int = 0) -> HybridLM:
    """A model in which no weight is what it would be by default, norms and biases included."""
    model = HybridLM(config)
    model.initialize(seed)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("norm.weight"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("balance_bias"):
            tensor.normal_(0.0, 0.3, generator=generator)
    return model.eval()


def save_model(
    folder: Path, model: HybridLM, *, tensors: dict[str, Tensor] | None = None, step: int = 7
) -> Path:
    """A step folder of ``model`` (or of other ``tensors``); with a tokenizer if bytes fit."""
    run = folder / "run"
    run.mkdir(exist_ok=True)
    files = {
        "model.safetensors": lambda path: write_tensors(path, tensors or model.state_dict()),
        "config.json": lambda path: path.write_text(to_json(RunConfig(model=model.config))),
    }
    if model.config.vocab_size >= ByteTokenizer.vocab_size:
        files["tokenizer.json"] = lambda path: ByteTokenizer().save(path.parent)
    return write_checkpoint(run, step, files, expected_bytes=1 << 20).path
