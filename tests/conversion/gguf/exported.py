"""Tiny models that a GGUF file can express, saved as training would leave them."""

from dataclasses import replace
from pathlib import Path

import torch

from deltamoe.checkpoint import write_checkpoint, write_tensors
from deltamoe.config import (
    DataConfig,
    KdaConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    RunConfig,
    to_json,
)
from deltamoe.model import HybridLM
from deltamoe.tokenizer import ByteTokenizer, Tokenizer

CONTEXT = 48

# every size of the geometry is another number, and a multiple of 32 where q8_0 asks for it
MIXED = ModelConfig(
    vocab_size=259,
    dim=64,
    num_layers=5,
    mlp_dim=128,
    kda=KdaConfig(num_heads=3, key_dim=32, value_dim=32),
    mla=MlaConfig(num_heads=3, latent_dim=96, nope_dim=160, rope_dim=16, value_dim=32),
    moe=MoeConfig(
        num_experts=8, experts_per_token=3, expert_dim=32, num_shared_experts=2, routed_scale=2.446
    ),
)
assert MIXED.kda is not None
assert MIXED.mla is not None
assert MIXED.moe is not None
GEOMETRIES = {
    "mixed": MIXED,
    "groups of experts, latent first": replace(
        MIXED,
        num_layers=3,
        mixers=("mla", "kda", "kda"),
        first_dense_layers=0,
        moe=replace(MIXED.moe, num_groups=4, groups_per_token=2),
    ),
    "all dense, tied, three taps": replace(
        MIXED,
        num_layers=3,
        mixers=("kda", "mla", "kda"),
        first_dense_layers=3,
        tie_embeddings=True,
        moe=None,
        kda=replace(MIXED.kda, conv_size=3),
    ),
    "no even size": ModelConfig(
        vocab_size=271,
        dim=45,
        num_layers=4,
        mlp_dim=37,
        first_dense_layers=2,
        norm_eps=1e-6,
        kda=KdaConfig(num_heads=5, key_dim=12, value_dim=12),
        mla=MlaConfig(num_heads=5, latent_dim=29, nope_dim=11, rope_dim=0, value_dim=7),
        moe=MoeConfig(num_experts=7, experts_per_token=2, expert_dim=19),
    ),
}


def tiny(config: ModelConfig, *, noise: float = 0.1) -> HybridLM:
    """A model none of whose tensors is at its initial, telltale value.

    The convolution's taps are larger than the rest, so that no query or key is close to zero: there
    the epsilon of its normalisation shows, 1e-6 here and the norms' own in llama.cpp.
    """
    model = HybridLM(config)
    model.initialize(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            spread = 4 * noise if "_conv." in name else noise
            tensor.add_(spread * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def save(
    folder: Path,
    model: HybridLM,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a step folder; returns it. What is fp32 by definition stays so."""
    folder.mkdir()
    run = RunConfig(model=model.config, data=DataConfig(path="text.txt", context=CONTEXT))
    wide = ("A_log", "dt_bias", "balance_bias")
    tensors = {
        name: tensor if name.endswith(wide) else tensor.to(dtype)
        for name, tensor in model.state_dict().items()
    }
    checkpoint = write_checkpoint(
        folder,
        7,
        {
            "model.safetensors": lambda path: write_tensors(path, tensors),
            "config.json": lambda path: path.write_text(to_json(run)),
            "tokenizer.json": lambda path: (tokenizer or ByteTokenizer()).save(path.parent),
        },
        expected_bytes=1 << 20,
    )
    return checkpoint.path
