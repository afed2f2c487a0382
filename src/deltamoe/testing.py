"""A tiny model for tests and examples, with every dimension a different size."""

from dataclasses import replace
from typing import Any

import torch

from deltamoe.config.model import KdaConfig, MlaConfig, ModelConfig, MoeConfig
from deltamoe.model import HybridLM

__all__ = ["tiny_config", "tiny_model"]


def tiny_config(**changes: Any) -> ModelConfig:
    """Four layers (KDA, KDA, KDA, MLA), one dense and three sparse channels, vocabulary 257."""
    config = ModelConfig(
        vocab_size=257,
        dim=24,
        num_layers=4,
        mlp_dim=40,
        init_std=0.2,  # far from uniform outputs, so that an error anywhere is visible
        kda=KdaConfig(num_heads=2, num_value_heads=4, key_dim=8, value_dim=12, decay_rank=5),
        mla=MlaConfig(num_heads=3, latent_dim=20, nope_dim=10, rope_dim=6, value_dim=14),
        moe=MoeConfig(num_experts=5, experts_per_token=2, expert_dim=16, routed_scale=2.446),
    )
    return replace(config, **changes)


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> HybridLM:
    """A tiny model with random weights, in evaluation mode."""
    model = HybridLM(tiny_config(**changes))
    model.initialize(seed)
    return model.to(dtype).eval()
