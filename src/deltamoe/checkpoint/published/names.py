"""Our tensor names beside the published ones: one table, read both ways.

The published checkpoint keeps each expert's matrices apart, ours are stacked along E; its
convolution taps and ``A_log`` have sizes of 1 that ours leave out. All else is a change of name,
so that a tensor's bytes are the same in both files.

Knows nothing of files and dtypes. No torch.
Source: the released model's index (20,493 names) and its modeling code. The table for people is in
docs/checkpoints.md; a test compares the two.
"""

import re
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from deltamoe.config.model import ModelConfig
from deltamoe.plan import Weight, weights

__all__ = [
    "NAMES",
    "PublishedTensor",
    "official_name",
    "published_places",
    "published_tensors",
]

NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    # behind blocks.N. here and model.layers.N. there
    "mixer_norm.weight": "input_layernorm.weight",
    "channel_norm.weight": "post_attention_layernorm.weight",
    "mixer.q_proj.weight": "self_attn.q_proj.weight",
    "mixer.k_proj.weight": "self_attn.k_proj.weight",
    "mixer.v_proj.weight": "self_attn.v_proj.weight",
    "mixer.o_proj.weight": "self_attn.o_proj.weight",
    "mixer.q_conv.weight": "self_attn.q_conv1d.weight",
    "mixer.k_conv.weight": "self_attn.k_conv1d.weight",
    "mixer.v_conv.weight": "self_attn.v_conv1d.weight",
    "mixer.A_log": "self_attn.A_log",
    "mixer.dt_bias": "self_attn.dt_bias",
    "mixer.decay_down.weight": "self_attn.f_a_proj.weight",
    "mixer.decay_up.weight": "self_attn.f_b_proj.weight",
    "mixer.beta_proj.weight": "self_attn.b_proj.weight",
    "mixer.output_gate_down.weight": "self_attn.g_a_proj.weight",
    "mixer.output_gate_up.weight": "self_attn.g_b_proj.weight",
    "mixer.output_norm.weight": "self_attn.o_norm.weight",
    "mixer.q_down.weight": "self_attn.q_a_proj.weight",
    "mixer.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "mixer.q_up.weight": "self_attn.q_b_proj.weight",
    "mixer.latent_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "mixer.latent_norm.weight": "self_attn.kv_a_layernorm.weight",
    "mixer.latent_up.weight": "self_attn.kv_b_proj.weight",
    "channel.w_gate.weight": "mlp.gate_proj.weight",
    "channel.w_up.weight": "mlp.up_proj.weight",
    "channel.w_down.weight": "mlp.down_proj.weight",
    "channel.router.weight": "block_sparse_moe.gate.weight",
    "channel.router.balance_bias": "block_sparse_moe.gate.e_score_correction_bias",
    "channel.experts.w_gate": "block_sparse_moe.experts.{expert}.w1.weight",
    "channel.experts.w_up": "block_sparse_moe.experts.{expert}.w3.weight",
    "channel.experts.w_down": "block_sparse_moe.experts.{expert}.w2.weight",
    "channel.shared_expert.w_gate.weight": "block_sparse_moe.shared_experts.gate_proj.weight",
    "channel.shared_expert.w_up.weight": "block_sparse_moe.shared_experts.up_proj.weight",
    "channel.shared_expert.w_down.weight": "block_sparse_moe.shared_experts.down_proj.weight",
}
"""Our name -> the published one, both without the block's number."""

_MISNAMED = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.((?:gate|up|down)_proj\.weight)")


class PublishedTensor(NamedTuple):
    """One tensor of a published checkpoint, and where it lies in ours.

    Attributes:
        name, shape: as published.
        ours: our tensor's name in the state_dict.
        expert: which slice of our stack [E, ...] it is; None if it is all of our tensor.
        is_fp32: kept in fp32 whatever the dtype of the rest.
    """

    name: str
    shape: tuple[int, ...]
    ours: str
    expert: int | None = None
    is_fp32: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def published_tensors(config: ModelConfig) -> Iterator[PublishedTensor]:
    """Every tensor of the published checkpoint of a model, lazily, block by block.

    A stack's experts follow one another from 0. With tied embeddings there is no head.

    Args:
        config: one that ``published_config`` accepts.
    """
    for weight in weights(config):
        yield from published_places(weight)


def official_name(stored: str) -> str:
    """The official name of a stored tensor: itself, but for the dense layers of transformers.

    Version 5.23 renames ``mlp`` to ``block_sparse_moe`` on saving also where there are no experts.
    No official tensor is called so; we read that name and never write it.
    """
    return _MISNAMED.sub(r"\1.mlp.\2", stored)


def published_places(weight: Weight) -> Iterator[PublishedTensor]:
    """Where one tensor of ours lies in a published checkpoint: once, or once an expert."""
    prefix, ours = "", weight.name
    if weight.layer is not None:
        prefix = f"model.layers.{weight.layer}."
        ours = ours.removeprefix(f"blocks.{weight.layer}.")
    name = prefix + NAMES[ours]
    if "{expert}" in name:
        for expert in range(weight.shape[0]):
            yield PublishedTensor(
                name.format(expert=expert), weight.shape[1:], weight.name, expert, weight.is_fp32
            )
    else:
        shape = _published_shape(ours, weight.shape)
        yield PublishedTensor(name, shape, weight.name, None, weight.is_fp32)


def _published_shape(ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if ours.endswith("_conv.weight"):
        channels, width = shape
        return (channels, 1, width)
    return (1, 1, *shape, 1) if ours == "mixer.A_log" else shape
