"""Multi-head latent attention: two equal forms, and the rotation for the variant with positions.

A token leaves behind a ``latent`` [L] and a small ``rope_key`` [P] shared by all heads. A head's
key is [w_key latent ; rope_key], its value w_value latent. The *expanded* form makes keys and
values and attends as usual: best for many queries. The *absorbed* form moves w_key to the query
and w_value behind the sum, and attends over the latents themselves: best for few queries and a
long past. They are equal up to rounding.

Without positions (Kimi Linear's way) the P channels take part unrotated.
Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; Kimi Linear (arXiv 2510.26692), section 4.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from deltamoe.ops.attention import causal_attention

__all__ = ["attend", "attend_absorbed", "attend_expanded", "attend_packed", "rotate"]


def attend(
    q_nope: Float[Tensor, "B T H K"],
    q_rope: Float[Tensor, "B T H P"],
    latent: Float[Tensor, "B S L"],
    rope_key: Float[Tensor, "B S P"],
    w_key: Float[Tensor, "H K L"],
    w_value: Float[Tensor, "H V L"],
    past: Int[Tensor, "B"] | None = None,
) -> Float[Tensor, "B T H V"]:
    """Attend causally in whichever form costs fewer operations.

    Args:
        q_nope, q_rope: the two parts of the queries, unscaled.
        latent, rope_key: what every source position left behind, oldest first; rows of a ragged
            batch are filled up with zeros at the end.
        w_key, w_value: each head's maps from the latent.
        past: source positions before the first query, per row; None means none. Query t sees the
            source positions up to ``past + t``.

    Returns:
        One value a query and head, in the queries' dtype. Scores are scaled by 1/sqrt(K + P).
    """
    _, nope, latent_dim = w_key.shape
    value = w_value.shape[1]
    time, sources, rope = q_nope.shape[1], latent.shape[1], rope_key.shape[2]
    expanded = sources * latent_dim * (nope + value) + time * sources * (nope + rope + value)
    absorbed = time * latent_dim * (nope + value) + time * sources * (2 * latent_dim + rope)
    form = attend_absorbed if absorbed < expanded else attend_expanded
    return form(q_nope, q_rope, latent, rope_key, w_key, w_value, past)


def attend_expanded(
    q_nope: Float[Tensor, "B T H K"],
    q_rope: Float[Tensor, "B T H P"],
    latent: Float[Tensor, "B S L"],
    rope_key: Float[Tensor, "B S P"],
    w_key: Float[Tensor, "H K L"],
    w_value: Float[Tensor, "H V L"],
    past: Int[Tensor, "B"] | None = None,
) -> Float[Tensor, "B T H V"]:
    """Make every source's keys and values, then softmax attention; see ``attend``."""
    k_nope, v = _expand(latent, w_key), _expand(latent, w_value)
    if past is None:
        return causal_attention(q_nope, q_rope, k_nope, rope_key, v)
    heads = w_key.shape[0]
    k_rope = rope_key.unsqueeze(2).expand(-1, -1, heads, -1).to(k_nope.dtype)
    k = torch.cat([k_nope, k_rope], dim=-1).transpose(1, 2)
    q = torch.cat([q_nope, q_rope], dim=-1).transpose(1, 2)
    mask = _visible(past, q.shape[2], k.shape[2])[:, None]
    out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)


def _expand(latent: Tensor, weight: Tensor) -> Tensor:
    """[B, S, L] through [H, channels, L] -> [B, S, H, channels]."""
    heads: Tensor = F.linear(latent, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])
    return heads


def attend_absorbed(
    q_nope: Float[Tensor, "B T H K"],
    q_rope: Float[Tensor, "B T H P"],
    latent: Float[Tensor, "B S L"],
    rope_key: Float[Tensor, "B S P"],
    w_key: Float[Tensor, "H K L"],
    w_value: Float[Tensor, "H V L"],
    past: Int[Tensor, "B"] | None = None,
) -> Float[Tensor, "B T H V"]:
    """Attend over the latents themselves; see ``attend``."""
    scale = (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5
    if past is None:
        past = torch.zeros(latent.shape[0], dtype=torch.int64, device=latent.device)
    q_latent = torch.einsum("bthk,hkl->bhtl", q_nope, w_key)
    scores = torch.einsum("bhtl,bsl->bhts", q_latent, latent)
    scores = scores + torch.einsum("bthp,bsp->bhts", q_rope, rope_key)
    hidden = ~_visible(past, scores.shape[2], scores.shape[3])[:, None]
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = (scores.to(wide) * scale).masked_fill(hidden, -torch.inf).softmax(dim=-1)
    mixed = torch.einsum("bhts,bsl->bhtl", weights.to(latent.dtype), latent)
    return torch.einsum("bhtl,hvl->bthv", mixed, w_value)


def attend_packed(
    q_nope: Float[Tensor, "1 T H K"],
    q_rope: Float[Tensor, "1 T H P"],
    latent: Float[Tensor, "1 T L"],
    rope_key: Float[Tensor, "1 T P"],
    w_key: Float[Tensor, "H K L"],
    w_value: Float[Tensor, "H V L"],
    cu_seqlens: Int[Tensor, "..."],
) -> Float[Tensor, "1 T H V"]:
    """Attend within each of the sequences packed along T, and never across their borders."""
    k_nope, v = _expand(latent, w_key), _expand(latent, w_value)
    return causal_attention(q_nope, q_rope, k_nope, rope_key, v, cu_seqlens=cu_seqlens)


def rotate(
    x: Float[Tensor, "B T *heads P"], positions: Int[Tensor, "B T"], theta: float
) -> Float[Tensor, "B T *heads P"]:
    """Turn the channel pairs (2i, 2i + 1) by ``positions * theta^(-2i / P)`` (RoPE), in fp32.

    Source: RoFormer (arXiv 2104.09864); interleaved pairs as in DeepSeek's checkpoints.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    half = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=wide)
    angles = positions.to(wide)[..., None] * theta ** (-half / x.shape[-1])  # [B, T, P / 2]
    angles = angles.view(*angles.shape[:2], *(1,) * (x.ndim - 3), -1)
    even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def _visible(past: Tensor, time: int, sources: int) -> Tensor:
    """[B, T, S]: may query t see source s? True where s <= past + t."""
    query = past[:, None, None] + torch.arange(time, device=past.device)[:, None]
    return torch.arange(sources, device=past.device) <= query
