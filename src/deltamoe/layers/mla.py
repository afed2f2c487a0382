"""The MLA mixer: full softmax attention whose cache is one small latent a token.

Without positions by default (Kimi Linear leaves order to KDA); ``has_rope`` rotates the shared
key channels.
Source: Kimi Linear (arXiv 2510.26692), section 4; DeepSeek-V2 (arXiv 2405.04434), section 2.1.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltamoe.config.model import MlaConfig
from deltamoe.layers.norm import RMSNorm
from deltamoe.ops.mla import attend, attend_packed, rotate

__all__ = ["Mla", "MlaInputs", "MlaState"]


class MlaState(NamedTuple):
    """What an MLA layer keeps of every token read so far; it grows with the text.

    Attributes:
        latent: [B, S, L], normalised. S is the longest row's length; shorter rows end in zeros.
        rope_key: [B, S, P], the key channels all heads share (rotated, if the model rotates).
    """

    latent: Tensor
    rope_key: Tensor


class MlaInputs(NamedTuple):
    """What attention is given of each token; the first arguments of ``deltamoe.ops.mla.attend``.

    Attributes:
        q_nope, q_rope: [B, T, H, K] and [B, T, H, P], unscaled; the latter rotated, if the model
            rotates.
        latent: [B, T, L], normalised.
        rope_key: [B, T, P], rotated likewise.
    """

    q_nope: Tensor
    q_rope: Tensor
    latent: Tensor
    rope_key: Tensor


class Mla(nn.Module):
    """Multi-head latent attention, from hidden states to hidden states."""

    def __init__(self, dim: int, config: MlaConfig, norm_eps: float) -> None:
        super().__init__()
        self.config = config
        c = config
        if c.query_rank is None:
            self.q_proj = nn.Linear(dim, c.num_heads * c.query_dim, bias=False)
        else:
            self.q_down = nn.Linear(dim, c.query_rank, bias=False)
            self.q_norm = RMSNorm(c.query_rank, norm_eps)
            self.q_up = nn.Linear(c.query_rank, c.num_heads * c.query_dim, bias=False)
        self.latent_proj = nn.Linear(dim, c.latent_dim + c.rope_dim, bias=False)
        self.latent_norm = RMSNorm(c.latent_dim, c.latent_norm_eps or norm_eps)
        self.latent_up = nn.Linear(
            c.latent_dim, c.num_heads * (c.nope_dim + c.value_dim), bias=False
        )
        self.o_proj = nn.Linear(c.num_heads * c.value_dim, dim, bias=False)

    def initial_state(self, batch_size: int) -> MlaState:
        """Return the state before the first token: an empty cache."""
        weight = self.latent_norm.weight  # a quantised layer has this one too
        return MlaState(
            weight.new_zeros(batch_size, 0, self.config.latent_dim),
            weight.new_zeros(batch_size, 0, self.config.rope_dim),
        )

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: MlaState | None = None,
        *,
        past: Int[Tensor, "B"] | None = None,
        lengths: Int[Tensor, "B"] | None = None,
        cu_seqlens: Int[Tensor, "..."] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], MlaState]:
        """Attend to everything read so far.

        Args:
            x: hidden states.
            state: carried from the previous call; None starts afresh.
            past: tokens read before x, per row; required with ``state``.
            lengths: valid tokens of each row; padding is never attended to by later tokens.
            cu_seqlens: borders of sequences packed along T; attention stays within each.

        Returns:
            Hidden states, and the state with x's latents appended.
        """
        q_nope, q_rope, latent, rope_key = self.inputs(x, past=past, cu_seqlens=cu_seqlens)
        w_key, w_value = self.head_maps()
        if cu_seqlens is not None:
            out = attend_packed(q_nope, q_rope, latent, rope_key, w_key, w_value, cu_seqlens)
            after = MlaState(latent, rope_key)
        else:
            # Without a past a query sees x's own latents, padding included: it comes last.
            after = sources = MlaState(latent, rope_key)
            if state is not None:
                assert past is not None, "a state comes with the number of tokens it has read"
                after = sources = _append(state, after, past, lengths)
            elif lengths is not None:
                after = _append(self.initial_state(len(x)), after, lengths * 0, lengths)
            seen = None if state is None else past
            out = attend(q_nope, q_rope, *sources, w_key, w_value, seen)
        y: Tensor = self.o_proj(out.flatten(-2))
        return y, after

    def inputs(
        self,
        x: Float[Tensor, "B T D"],
        *,
        past: Int[Tensor, "B"] | None = None,
        cu_seqlens: Int[Tensor, "..."] | None = None,
    ) -> MlaInputs:
        """What ``forward`` gives to the attention."""
        c = self.config
        q = self._queries(x).unflatten(-1, (c.num_heads, c.query_dim))
        q_nope, q_rope = q.split([c.nope_dim, c.rope_dim], dim=-1)
        latent, rope_key = self.latent_proj(x).split([c.latent_dim, c.rope_dim], dim=-1)
        latent = self.latent_norm(latent)
        if c.has_rope:
            positions = self._positions(x, past, cu_seqlens)
            q_rope = rotate(q_rope, positions, c.rope_theta)
            rope_key = rotate(rope_key, positions, c.rope_theta)
        return MlaInputs(q_nope, q_rope, latent, rope_key)

    def head_maps(self) -> tuple[Float[Tensor, "H K L"], Float[Tensor, "H V L"]]:
        """Each head's maps from a latent to its key and its value."""
        c = self.config
        heads = self.latent_up.weight.view(c.num_heads, c.nope_dim + c.value_dim, c.latent_dim)
        w_key, w_value = heads.split([c.nope_dim, c.value_dim], dim=1)
        return w_key, w_value

    def _queries(self, x: Tensor) -> Tensor:
        if self.config.query_rank is None:
            q: Tensor = self.q_proj(x)
        else:
            q = self.q_up(self.q_norm(self.q_down(x)))
        return q

    @staticmethod
    def _positions(x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """Each token's place in its own sequence: [B, T]."""
        place = torch.arange(x.shape[1], device=x.device)
        if cu_seqlens is not None:
            starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=len(place))
            return (place - starts)[None]
        if past is None:
            return place.expand(len(x), -1)
        return past[:, None] + place


def _append(state: MlaState, new: MlaState, past: Tensor, lengths: Tensor | None) -> MlaState:
    """Write each row's new latents right behind its old ones; what is left over stays zero."""
    batch, time = new.latent.shape[:2]
    size = state.latent.shape[1]
    if lengths is None and bool((past == size).all()):  # all rows equally long
        latent, rope_key = (
            torch.cat([o.to(n.dtype), n], dim=1) for o, n in zip(state, new, strict=True)
        )
        return MlaState(latent, rope_key)
    valid = torch.full_like(past, time) if lengths is None else lengths
    longest = int((past + valid).max()) if batch else 0
    rows = torch.arange(batch, device=past.device)[:, None].expand(-1, time)
    place = torch.arange(time, device=past.device)
    keep = place < valid[:, None]
    at = (rows[keep], (past[:, None] + place)[keep])

    def grow(old: Tensor, fresh: Tensor) -> Tensor:
        room = fresh.new_zeros(batch, max(longest, size), fresh.shape[2])
        room[:, :size] = old.to(fresh.dtype)
        return room.index_put(at, fresh[keep])

    return MlaState(grow(state.latent, new.latent), grow(state.rope_key, new.rope_key))
