"""Configurations with names.

``nano`` is set by hand for a laptop; ``mini`` and ``small`` are rungs of one dial (``rung``); the
``scaling-*`` rows are the paper's ladder and ``kimi-linear-48b-a3b`` is its released model. What a
source leaves unsaid and we had to choose stands in the preset's ``assumptions``, so that
``deltamoe plan`` prints it with the numbers that depend on it.

Source: Kimi Linear (arXiv 2510.26692), table 2 and sections 4 and 5, and the published config.json;
Moonlight (arXiv 2502.16982) where the paper says that it follows it.
"""

import difflib
from dataclasses import dataclass, replace
from typing import NamedTuple

from deltamoe.config.model import KdaConfig, MlaConfig, ModelConfig, MoeConfig
from deltamoe.config.run import (
    BalanceConfig,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from deltamoe.errors import ConfigError

__all__ = ["PRESETS", "Preset", "preset", "rung"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A configuration under a name.

    Attributes:
        summary: one line for a list.
        config: the run.
        assumptions: what the source does not say and was chosen here, a sentence each.
        published_active: activated parameters the source reports, without embedding and head;
            None where it reports none.
    """

    summary: str
    config: RunConfig
    assumptions: tuple[str, ...] = ()
    published_active: int | None = None


def preset(name: str) -> RunConfig:
    """The run of one preset.

    Raises:
        ConfigError: there is no preset of this name.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name[:80], PRESETS, n=1) or list(PRESETS)
        raise ConfigError(f"no preset {name[:80]!r}; did you mean {' or '.join(close)}?")
    return PRESETS[name].config


# ── by hand ──────────────────────────────────────────────────────────────────────────────────────

_NANO = RunConfig(
    model=ModelConfig(
        vocab_size=4096,
        dim=256,
        num_layers=4,
        mlp_dim=512,
        kda=KdaConfig(num_heads=4, key_dim=64, value_dim=64),
        mla=MlaConfig(num_heads=4, latent_dim=64, nope_dim=32, rope_dim=16, value_dim=64),
        moe=MoeConfig(num_experts=16, experts_per_token=2, expert_dim=128),
    ),
    data=DataConfig(path="stdlib", tokenizer="bpe:4096", context=512, rows=8),
    # a run this short has few steps to spread the load in: five times the usual rate
    balance=BalanceConfig(bias_rate=5e-3),
    train=TrainConfig(
        steps=600,
        checkpoint_every=100,
        validate_every=100,
        validation_tokens=32_768,
        sample_every=150,
    ),
)

# The layer of the textbooks: top 2 of 4, softmax over the chosen, a loss for balance. Its experts
# are as wide as makes a token's two of them (two matrices each) cost what nano's three cost.
_MOE_2_OF_4 = replace(
    _NANO,
    model=replace(
        _NANO.model,
        moe=MoeConfig(
            num_experts=4,
            experts_per_token=2,
            expert_dim=288,
            num_shared_experts=0,
            expert="ffn",
            scoring="topk_softmax",
            has_balance_bias=False,
        ),
    ),
    balance=BalanceConfig(bias_update="none", load_balance_loss=1e-2),
)


# ── one dial ─────────────────────────────────────────────────────────────────────────────────────


def rung(depth: int) -> RunConfig:
    """A model of ``depth`` layers with everything else derived from that one number.

    The dial follows the paper's ladder (table 2): as many heads as layers, a width proportional
    to them, a learning rate inversely so. Heads have 64 channels and a token visits 4 of 32
    experts, which keeps the lower rungs quick; it reads 20 tokens for each active parameter.

    Args:
        depth: blocks, at least 4.
    """
    if depth < 4:
        raise ConfigError(f"rung({depth}): expected at least 4 layers, one period of 3 KDA + 1 MLA")
    dim = 64 * round(40 * depth / 64)
    expert_dim = dim // 4
    vocab_size = 4096 if depth < 12 else 32_768
    context, rows, accumulate = 1024, 8, max(1, depth**2 // 8)
    active = 9.3 * depth * dim**2  # of a layer's matrices, to a tenth
    return RunConfig(
        model=ModelConfig(
            vocab_size=vocab_size,
            dim=dim,
            num_layers=depth,
            mlp_dim=5 * expert_dim,
            kda=KdaConfig(num_heads=depth, key_dim=64, value_dim=64),
            mla=MlaConfig(
                num_heads=depth, latent_dim=dim // 4, nope_dim=32, rope_dim=32, value_dim=64
            ),
            moe=MoeConfig(num_experts=32, experts_per_token=4, expert_dim=expert_dim),
        ),
        data=DataConfig(
            path="site-packages", tokenizer=f"bpe:{vocab_size}", context=context, rows=rows
        ),
        optimizer=OptimizerConfig(lr=0.032 / depth, muon_lr=0.032 / depth, warmup_steps=100),
        train=TrainConfig(
            steps=100 * round(20 * active / (context * rows * accumulate) / 100),
            accumulate=accumulate,
        ),
    )


def _for_an_hour(config: RunConfig, *, steps: int, accumulate: int) -> RunConfig:
    """A rung cut to what one machine reads in an hour, well below what the rung asks for."""
    return replace(config, train=replace(config.train, steps=steps, accumulate=accumulate))


# ── the paper ────────────────────────────────────────────────────────────────────────────────────

_HEAD_DIM = 128
_PAPER_VOCAB = 163_840
_PAPER_CONTEXT = 4096
_PAPER_ROWS = 8
_PAPER_DATA = DataConfig(tokenizer=f"bpe:{_PAPER_VOCAB}", context=_PAPER_CONTEXT, rows=_PAPER_ROWS)


def _paper_mla(num_heads: int) -> MlaConfig:
    return MlaConfig(
        num_heads=num_heads, latent_dim=512, nope_dim=_HEAD_DIM, rope_dim=64, value_dim=_HEAD_DIM
    )


class _Row(NamedTuple):
    """A row of table 2, and the one number it leaves open that the activated size decides."""

    name: str
    active: int
    heads: int
    layers: int
    dim: int
    tokens: float
    lr: float
    sequences: int
    expert_dim: int


_LADDER = (
    _Row("653m", 653_000_000, 16, 16, 1216, 38.8e9, 2.006e-3, 336, 928),
    _Row("878m", 878_000_000, 18, 18, 1376, 59.8e9, 1.790e-3, 432, 960),
    _Row("1.1b", 1_100_000_000, 20, 20, 1536, 85.2e9, 1.617e-3, 512, 944),
    _Row("1.4b", 1_400_000_000, 22, 22, 1632, 102.5e9, 1.486e-3, 576, 1024),
    _Row("1.7b", 1_700_000_000, 24, 24, 1776, 128.0e9, 1.371e-3, 640, 1024),
)

_LADDER_ASSUMPTIONS = (
    "Activated parameters are counted without the embedding and without the head.",
    "The table's batch has no unit; it is read as sequences of 4,096 tokens.",
    "A token visits 8 routed experts of 64 and one shared expert of the same width, and the chosen "
    "weights are scaled by 2.446: the released model's router.",
    "The width of an expert is not given: it is the multiple of 16 that brings the activated "
    "parameters nearest to the table's.",
    "The first channel is dense and as wide as a token's 9 experts together, as in the released "
    "model.",
    "Heads have 128 channels in KDA and 128 + 64 in MLA, the latent has 512, as in the released "
    "model; every fourth mixer and the last one is MLA.",
    "The vocabulary has 163,840 entries, as in the released model.",
    "One learning rate for Muon and AdamW, warm-up of 500 steps, WSD, weight decay 0.1.",
)


def _ladder_rung(row: _Row) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            vocab_size=_PAPER_VOCAB,
            dim=row.dim,
            num_layers=row.layers,
            mlp_dim=9 * row.expert_dim,
            kda=KdaConfig(num_heads=row.heads, key_dim=_HEAD_DIM, value_dim=_HEAD_DIM),
            mla=_paper_mla(row.heads),
            moe=MoeConfig(
                num_experts=64,
                experts_per_token=8,
                expert_dim=row.expert_dim,
                routed_scale=2.446,
            ),
        ),
        data=_PAPER_DATA,
        optimizer=OptimizerConfig(lr=row.lr, muon_lr=row.lr, warmup_steps=500),
        train=TrainConfig(
            steps=round(row.tokens / (row.sequences * _PAPER_CONTEXT)),
            accumulate=row.sequences // _PAPER_ROWS,
            precision="bf16",
        ),
    )


# 1.4 T tokens in batches of 8,192 sequences of 4,096 tokens ("32 M tokens").
_KIMI_LINEAR = RunConfig(
    model=ModelConfig(
        vocab_size=_PAPER_VOCAB,
        dim=2304,
        num_layers=27,
        mlp_dim=9216,
        kda=KdaConfig(num_heads=32, key_dim=_HEAD_DIM, value_dim=_HEAD_DIM),
        mla=_paper_mla(32),
        moe=MoeConfig(num_experts=256, experts_per_token=8, expert_dim=1024, routed_scale=2.446),
    ),
    data=_PAPER_DATA,
    optimizer=OptimizerConfig(lr=1.1e-3, muon_lr=1.1e-3, warmup_steps=500),
    train=TrainConfig(
        steps=round(1.4e12 / (8192 * _PAPER_CONTEXT)),
        accumulate=8192 // _PAPER_ROWS,
        precision="bf16",
        checkpoint_activations=True,
    ),
)

_KIMI_LINEAR_ASSUMPTIONS = (
    "The geometry is the published config.json's: 8 routed experts and 1 shared one. The paper's "
    "text counts the shared one among the 8.",
    "1.4 T tokens as in the paper's comparison runs (the released weights saw 5.7 T).",
    "A step is 8,192 sequences of 4,096 tokens, which is the paper's 32 M tokens.",
    "Muon without MuonClip's query-key clipping; warm-up of 500 steps and weight decay 0.1 are "
    "Kimi K2's; the rate of the balance bias is Moonlight's.",
)


PRESETS: dict[str, Preset] = {
    "nano": Preset(summary="the demo: five to ten minutes on two CPU cores", config=_NANO),
    "moe-2-of-4": Preset(
        summary="nano with the textbook's layer: softmax router, top 2 of 4 plain experts",
        config=_MOE_2_OF_4,
    ),
    "mini": Preset(
        summary="8 layers: about an hour on two CPU cores",
        config=_for_an_hour(rung(8), steps=1200, accumulate=1),
        assumptions=(
            "an hour: 9.8 M tokens at 2,200 (fp32) to 5,000 (bf16) a second on two cores, measured "
            "without the optimizer",
        ),
    ),
    "small": Preset(
        summary="16 layers: about an hour on one GPU",
        config=_for_an_hour(rung(16), steps=1500, accumulate=32),
        assumptions=("an hour: 393 M tokens at 70 TFLOP/s, which was not measured",),
    ),
    **{
        f"scaling-{row.name}": Preset(
            summary=f"the paper's ladder: {row.layers} layers, {row.name.upper()} activated",
            config=_ladder_rung(row),
            assumptions=_LADDER_ASSUMPTIONS,
            published_active=row.active,
        )
        for row in _LADDER
    },
    "kimi-linear-48b-a3b": Preset(
        summary="the paper's released model: 27 layers, 8 of 256 experts",
        config=_KIMI_LINEAR,
        assumptions=_KIMI_LINEAR_ASSUMPTIONS,
    ),
}
