"""What a token and a sequence cost: FLOPs, state, latents, what the backward pass finds stored.

Each function does one piece of arithmetic, with its formula in the docstring. A FLOP is one
addition or one multiplication, so that a multiply-add is two; elementwise work (norms, activations,
the decay) is left out, as usual.

Knows nothing of machines. Letters: docs/notation.md.
Source: Kimi Linear (arXiv 2510.26692), sections 3 to 5, also for the FLOPs of the chunk form.
"""

from typing import Literal

from deltamoe.config import ModelConfig, RunConfig
from deltamoe.plan.inventory import BYTES, Dtype, weights

__all__ = [
    "activation_bytes",
    "cache_bytes_per_token",
    "flops_per_token",
    "state_bytes_per_sequence",
    "widest_precision",
]

_CHUNK = 64  # C, tokens per chunk of the published kernels


def state_bytes_per_sequence(config: ModelConfig, dtype: Dtype = "bf16") -> int:
    """Bytes a sequence needs whatever its length: KDA's memory and its convolution's tail.

    For each KDA layer ``4 Hv K V`` (fp32) and the last ``W - 1`` inputs of the convolution in
    ``dtype``.
    """
    if (kda := config.kda) is None:
        return 0
    memory = 4 * kda.value_heads * kda.key_dim * kda.value_dim
    tail = BYTES[dtype] * max(kda.conv_size - 1, 0) * kda.conv_channels
    return _count(config, "kda") * (memory + tail)


def cache_bytes_per_token(config: ModelConfig, dtype: Dtype = "bf16") -> int:
    """Bytes a sequence grows by with each token: ``L + P`` numbers in each MLA layer."""
    if (mla := config.mla) is None:
        return 0
    return _count(config, "mla") * BYTES[dtype] * (mla.latent_dim + mla.rope_dim)


def flops_per_token(
    config: ModelConfig, *, context: int, form: Literal["chunk", "recurrent"] = "chunk"
) -> int:
    """FLOPs of one token's forward pass; the backward pass costs twice as much again.

    Every matrix costs two FLOPs for each element the token uses, the head included and the
    embedding not (it is looked up). On top of the matrices, in each layer:

    * form "chunk", the mean over a sequence of ``context`` tokens read at once:
      KDA ``6 K V + C (2 K + V) + C^2`` a value head with C = 64 (the paper's 6 d^2 + 3 C d + C^2
      for K = V = d); MLA, expanded, ``2 (nope + P + V)`` a head for each of the
      ``(context + 1) / 2`` positions that a token attends to on average.
    * form "recurrent", the next token after ``context``: KDA ``6 K V`` a value head (recall,
      correct, read); MLA, absorbed, ``2 (2 L + P)`` a head for each of ``context + 1`` positions.

    Args:
        config: the model.
        context: tokens, >= 0.
        form: how the tokens are read.
    """
    matrices = [w for w in weights(config) if len(w.shape) > 1 and w.part != "embedding"]
    flops = 2 * sum(w.active for w in matrices)
    if config.tie_embeddings:
        flops += 2 * config.vocab_size * config.dim
    if (kda := config.kda) is not None:
        K, V = kda.key_dim, kda.value_dim
        within_chunk = _CHUNK * (2 * K + V) + _CHUNK**2 if form == "chunk" else 0
        flops += _count(config, "kda") * kda.value_heads * (6 * K * V + within_chunk)
    if (mla := config.mla) is not None:
        if form == "chunk":
            attention = (context + 1) * (mla.query_dim + mla.value_dim)
        else:
            attention = (context + 1) * 2 * (2 * mla.latent_dim + mla.rope_dim)
        flops += _count(config, "mla") * mla.num_heads * attention
    return flops


def activation_bytes(run: RunConfig) -> int:
    """An estimate of what the backward pass of one micro-batch finds stored.

    Numbers kept for each token, ``e`` bytes each (2 in bf16, else 4) unless said otherwise:

    * a block's two norms and residual sums: ``6 D``;
    * KDA: the convolution's inputs, ``Hv K`` decay logits, both bottlenecks, ``4 Hv V`` of values
      and around the output gate, and in fp32 ``2 H K`` of queries and keys, ``Hv (K + 2)`` of
      decay and beta, ``Hv (2 C + V)`` within the chunks, ``Hv K V / C`` of memory;
    * MLA: ``2 L + P`` of the latent, ``H (2 nope + P + 2 V)`` in and behind the attention;
    * an MLP ``2 F``, an expert ``2 F`` for each token it is sent, a router ``4 E`` in fp32;
    * the head keeps ``D``, the hidden vectors' gradient: logits live for one slice.

    With ``checkpoint_activations`` a block keeps its input (D) and only the costliest block counts
    in full. A test holds it within a quarter of what autograd stores with the CPU's kernels;
    PyTorch's own forms keep up to twice as much, allocators waste some: read it as "about".
    """
    config, tokens = run.model, run.data.rows * run.data.context
    precision = widest_precision(run)
    blocks = [
        _mixer_activation_bytes(config, layer, precision)
        + _channel_activation_bytes(config, layer, precision)
        for layer in range(config.num_layers)
    ]
    if run.train.checkpoint_activations:
        kept = config.num_layers * BYTES[precision] * config.dim + max(blocks)
    else:
        kept = sum(blocks)
    return tokens * (kept + 4 * config.dim)


def widest_precision(run: RunConfig) -> Dtype:
    """What "auto" may turn out to be on a machine that is not known here."""
    return "fp32" if run.train.precision == "auto" else run.train.precision


def _mixer_activation_bytes(config: ModelConfig, layer: int, precision: Dtype) -> int:
    e, dim = BYTES[precision], config.dim
    if config.mixer(layer) == "kda":
        assert config.kda is not None
        kda, heads = config.kda, config.kda.value_heads
        K, V = kda.key_dim, kda.value_dim
        bottlenecks = kda.decay_bottleneck + kda.gate_bottleneck
        in_fp32 = 2 * kda.num_heads * K + heads * (K + 2 + 2 * _CHUNK + V + K * V // _CHUNK)
        kept = 2 * dim + kda.conv_channels + bottlenecks + heads * (K + 4 * V)
        return e * kept + 4 * in_fp32
    assert config.mla is not None
    mla = config.mla
    latent = 2 * mla.latent_dim + mla.rope_dim
    attention = mla.num_heads * (2 * mla.nope_dim + mla.rope_dim + 2 * mla.value_dim)
    return e * (2 * dim + latent + attention)


def _channel_activation_bytes(config: ModelConfig, layer: int, precision: Dtype) -> int:
    e, dim = BYTES[precision], config.dim
    if config.channel(layer) == "mlp":
        return e * (3 * dim + 2 * config.mlp_dim)
    assert config.moe is not None
    moe = config.moe
    hidden = moe.experts_per_token * moe.expert_dim + moe.shared_dim
    return e * (3 * dim + 2 * hidden) + 16 * moe.num_experts


def _count(config: ModelConfig, mixer: Literal["kda", "mla"]) -> int:
    return config.schedule.count(mixer[0])
