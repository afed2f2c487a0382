"""A model and a run to count by hand."""

from deltamoe.config import KdaConfig, MlaConfig, ModelConfig, MoeConfig, RunConfig, TrainConfig
from deltamoe.config.run import DataConfig


def small(**changes):
    """A model whose sizes are all different, so that one cannot stand for another."""
    parts = {
        "kda": KdaConfig(num_heads=2, num_value_heads=4, key_dim=3, value_dim=5, decay_rank=7),
        "mla": MlaConfig(num_heads=3, latent_dim=11, nope_dim=6, rope_dim=2, value_dim=9),
        "moe": MoeConfig(num_experts=8, experts_per_token=2, expert_dim=13),
    }
    base = {"vocab_size": 50, "dim": 17, "num_layers": 4, "mlp_dim": 19, "first_dense_layers": 1}
    return ModelConfig(**(base | parts | changes))


def run_of(model, **train):
    return RunConfig(
        model=model, data=DataConfig(context=16, rows=3), train=TrainConfig(steps=10, **train)
    )
