"""The KDA mixer: projections and a short convolution around the delta-rule memory.

Parameters are named for what they do; the published names beside them are in docs/checkpoints.md.
``A_log``, ``dt_bias``, the decay, beta and the memory are fp32 whatever the model's dtype.
Source: Kimi Linear (arXiv 2510.26692), section 4 and figure 3; the published modeling code.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltamoe.config.model import KdaConfig
from deltamoe.layers.norm import RMSNorm
from deltamoe.ops.kda import kda_chunk, kda_decay, kda_recurrent
from deltamoe.ops.norm import gated_rms_norm, l2_normalize
from deltamoe.ops.short_conv import normalized_short_conv, short_conv

__all__ = ["Kda", "KdaInputs", "KdaState"]


class KdaState(NamedTuple):
    """What a KDA layer carries from one call to the next; its size never grows.

    Attributes:
        conv: [B, W-1, 2 H K + HV V], the last inputs of the short convolution, oldest first;
            W-1 is 0 without a convolution.
        memory: [B, HV, K, V] fp32 (fp64 in an fp64 model), what the heads remember.
    """

    conv: Tensor
    memory: Tensor


class KdaInputs(NamedTuple):
    """What the memory is given of each token; the arguments of ``deltamoe.ops.kda.kda_chunk``.

    Attributes:
        q, k: [B, T, H, K], l2-normalised; q carries the 1/sqrt(K) scale.
        v: [B, T, HV, V].
        log_decay: [B, T, HV, K] fp32, natural log of what each channel retains, <= 0.
        beta: [B, T, HV] fp32, how strongly each head writes, in (0, max_beta).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor


class ShortConv(nn.Module):
    """The taps of one convolution; q, k and v have one each."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))


class Kda(nn.Module):
    """Kimi Delta Attention, from hidden states to hidden states."""

    def __init__(self, dim: int, config: KdaConfig, norm_eps: float) -> None:
        super().__init__()
        self.config = config
        self.backend = "auto"
        heads, value_heads = config.num_heads, config.value_heads
        K, V = config.key_dim, config.value_dim
        self.q_proj = nn.Linear(dim, heads * K, bias=False)
        self.k_proj = nn.Linear(dim, heads * K, bias=False)
        self.v_proj = nn.Linear(dim, value_heads * V, bias=False)
        if config.conv_size:
            self.q_conv = ShortConv(heads * K, config.conv_size)
            self.k_conv = ShortConv(heads * K, config.conv_size)
            self.v_conv = ShortConv(value_heads * V, config.conv_size)
        self.A_log = nn.Parameter(torch.empty(value_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(value_heads * K, dtype=torch.float32))
        self.decay_down = nn.Linear(dim, config.decay_bottleneck, bias=False)
        self.decay_up = nn.Linear(config.decay_bottleneck, value_heads * K, bias=False)
        self.beta_proj = nn.Linear(dim, value_heads, bias=False)
        if config.output_gate != "none":
            self.output_gate_down = nn.Linear(dim, config.gate_bottleneck, bias=False)
            self.output_gate_up = nn.Linear(config.gate_bottleneck, value_heads * V, bias=False)
        self.output_norm = RMSNorm(V, norm_eps)
        self.o_proj = nn.Linear(value_heads * V, dim, bias=False)

    def initial_state(self, batch_size: int) -> KdaState:
        """Return the state before the first token: nothing seen, nothing remembered."""
        c, weight = self.config, self.output_norm.weight  # a quantised layer has this one too
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return KdaState(
            weight.new_zeros(batch_size, max(c.conv_size - 1, 0), c.conv_channels),
            weight.new_zeros(batch_size, c.value_heads, c.key_dim, c.value_dim, dtype=wide),
        )

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: KdaState | None = None,
        *,
        lengths: Int[Tensor, "B"] | None = None,
        cu_seqlens: Int[Tensor, "..."] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], KdaState]:
        """Mix tokens through the memory.

        Args:
            x: hidden states.
            state: carried from the previous call; None starts afresh.
            lengths: valid tokens of each row; padding leaves the state alone.
            cu_seqlens: borders of sequences packed along T; each starts afresh.

        Returns:
            Hidden states, and the state after the last valid token of each sequence.
        """
        inputs, conv = self.inputs(x, state, lengths=lengths, cu_seqlens=cu_seqlens)
        memory = None if state is None else state.memory
        # One token without gradients is decoding: nothing to gain from a chunk.
        run = kda_recurrent if x.shape[1] == 1 and not torch.is_grad_enabled() else kda_chunk
        out, memory = run(*inputs, memory, cu_seqlens=cu_seqlens, backend=self.backend)
        out = self._gate_output(out, x)
        y: Tensor = self.o_proj(out.flatten(-2))
        return y, KdaState(conv, memory)

    def inputs(
        self,
        x: Float[Tensor, "B T D"],
        state: KdaState | None = None,
        *,
        lengths: Int[Tensor, "B"] | None = None,
        cu_seqlens: Int[Tensor, "..."] | None = None,
    ) -> tuple[KdaInputs, Float[Tensor, "N taps channels"]]:
        """What ``forward`` gives to the memory, and the convolution's new state."""
        q, k, v, conv = self._project(x, state, lengths, cu_seqlens)
        log_decay = self.log_decay(x)
        beta = self.beta(x)
        if lengths is not None:
            padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
            log_decay = log_decay.masked_fill(padding[..., None, None], 0.0)
            beta = beta.masked_fill(padding[..., None], 0.0)
        return KdaInputs(q, k, v, log_decay, beta), conv

    def log_decay(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T HV K"]:
        """Natural log of what each channel of each head retains at each token."""
        c = self.config
        logits = self.decay_up(self.decay_down(x)).unflatten(-1, (c.value_heads, c.key_dim))
        lower_bound = c.decay_lower_bound if c.decay == "bounded" else None
        return kda_decay(logits, self.A_log, self.dt_bias, lower_bound=lower_bound)

    def beta(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T HV"]:
        """How strongly each head writes each token, in (0, max_beta)."""
        logits: Tensor = self.beta_proj(x)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return logits.to(wide).sigmoid() * self.config.max_beta

    def output_gate_logits(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T HV V"]:
        """What opens (large) or closes each channel of each head's answer, before activation."""
        c = self.config
        flat = self.output_gate_up(self.output_gate_down(x))
        logits: Tensor = flat.unflatten(-1, (c.value_heads, c.value_dim))
        return logits

    def _project(
        self, x: Tensor, state: KdaState | None, lengths: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, T, heads, channels], and the convolution's new state."""
        c = self.config
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        scale = c.key_dim**-0.5
        if not c.conv_size:
            q = l2_normalize(F.silu(q).unflatten(-1, (c.num_heads, c.key_dim))) * scale
            k = l2_normalize(F.silu(k).unflatten(-1, (c.num_heads, c.key_dim)))
            sequences = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
            conv = x.new_zeros(sequences, 0, c.conv_channels)
            return q, k, F.silu(v).unflatten(-1, (c.value_heads, c.value_dim)), conv
        sizes = [q.shape[-1], k.shape[-1], v.shape[-1]]
        past = (None, None, None) if state is None else state.conv.split(sizes, dim=-1)
        rows: dict[str, Tensor | None] = {"lengths": lengths, "cu_seqlens": cu_seqlens}
        taps_q, taps_k, taps_v = self.q_conv.weight, self.k_conv.weight, self.v_conv.weight
        q, last_q = normalized_short_conv(
            q, taps_q, past[0], head_dim=c.key_dim, scale=scale, **rows
        )
        k, last_k = normalized_short_conv(k, taps_k, past[1], head_dim=c.key_dim, scale=1.0, **rows)
        v, last_v = short_conv(v, taps_v, past[2], **rows)
        conv = torch.cat([last_q, last_k, last_v], dim=-1)
        return q, k, v.unflatten(-1, (c.value_heads, c.value_dim)), conv

    def _gate_output(self, out: Tensor, x: Tensor) -> Tensor:
        """Normalise each head's answer, weigh it, then open or close it channel by channel."""
        if self.config.output_gate == "none":
            normed: Tensor = self.output_norm(out)
            return normed.to(x.dtype)
        norm = self.output_norm
        return gated_rms_norm(
            out,
            self.output_gate_logits(x),
            norm.weight,
            norm.eps,
            activation=self.config.output_gate,
            dtype=x.dtype,
        )
