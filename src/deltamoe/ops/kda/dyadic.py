"""KDA in plain PyTorch, fast and exact for any decay: survival by halves.

Inside a chunk one needs, for every pair of tokens j <= i, how much of what j wrote is left at i:
the product of the decays of j+1 .. i, per key channel. Factoring it as exp(G_i) exp(-G_j)
overflows under strong decay; holding it for all pairs costs C times the memory of the keys. Here
a chunk is cut in halves, and the halves in halves. For i in a right half and j in the left half
beside it, the product splits at the cut:

    (decay of j+1 .. cut)   (decay of cut+1 .. i)        both factors in [0, 1]
      suffix of the left      prefix of the right

so the block of pairs is one matrix product, nothing can overflow, no reference point lies in a
token's future, and a decay of exactly 0 (log-decay -inf) is an ordinary number. Prefixes and
suffixes double from one level to the next by a multiplication: one exp a token and channel in
all. The triangular system's inverse grows over the same halves.

Only the recursion over chunks is sequential. The backward pass is written by hand: it keeps the
inputs, the memory at each chunk's start and three C-wide matrices, and recomputes the rest.

Boundary: knows chunks laid out as [rows, C, channels]; ``_Layout`` takes tensors there and back.
Letters: R rows = chunks x heads, C chunk, K, V; docs/kda.md derives every line.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltamoe.ops.kda import reference
from deltamoe.ops.kda.shapes import compute_dtype, initial_memory, repeat_heads
from deltamoe.ops.rows import inverse_of, move_rows

__all__ = ["kda_chunk", "kda_recurrent"]

# One token after another leaves nothing to batch: the definition is already the fast form.
kda_recurrent = reference.kda_recurrent


def kda_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    memory: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Run KDA over many tokens at once; see ``deltamoe.ops.kda``.

    The chunk is the largest power of two that neither ``chunk_size`` nor the longest sequence
    makes wasteful.
    """
    memory = initial_memory(q, v, memory, cu_seqlens)
    dtype = compute_dtype(q, v, memory)
    value_heads = v.shape[2]
    layout = _Layout.of(q.shape[0], q.shape[1], cu_seqlens, chunk_size)
    if not layout.active:
        return v, memory
    inputs = [
        layout.to_chunks(x)
        for x in (
            repeat_heads(q.to(dtype), value_heads),
            repeat_heads(k.to(dtype), value_heads),
            v.to(dtype),
            log_decay.to(dtype),
            beta.to(dtype).unsqueeze(-1),
        )
    ]
    out, final = _KdaChunk.apply(  # type: ignore[no-untyped-call]
        *inputs, layout.sort(memory.to(dtype)), layout.active
    )
    return layout.from_chunks(out).to(v.dtype), layout.unsort(final)


@dataclass(frozen=True)
class _Layout:
    """Where each token stands once sequences are cut into chunks.

    Chunks are ordered by their place in the sequence, then by sequence, the longest sequence
    first: the sequences that still have an n-th chunk are then always a leading slice.

    Attributes:
        batch, time: the shape the tokens come from.
        chunk: C, a power of two.
        active: how many sequences have a first, second, ... chunk.
        order: sequences from long to short; None when all are equally long.
        source: [chunks * C] which token stands here, ``batch * time`` for padding; None when
            equally long sequences need only be cut and transposed.
        target: [batch * time] where each token stands.
    """

    batch: int
    time: int
    chunk: int
    active: tuple[int, ...]
    order: Tensor | None = None
    source: Tensor | None = None
    target: Tensor | None = None

    @staticmethod
    def of(batch: int, time: int, cu_seqlens: Tensor | None, chunk_size: int) -> "_Layout":
        if cu_seqlens is None:
            chunk = _power_of_two(chunk_size, time)
            return _Layout(batch, time, chunk, (batch,) * -(-time // chunk))
        starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
        longest = int(lengths.max())
        chunk = _power_of_two(chunk_size, longest)
        if longest == 0:
            return _Layout(batch, time, chunk, ())
        order = torch.argsort(lengths, descending=True, stable=True)
        starts, lengths = starts[order], lengths[order]
        offset = torch.arange(-(-longest // chunk) * chunk, device=cu_seqlens.device)
        inside = offset < lengths[:, None]  # [sequences, offset]
        tokens = torch.where(inside, starts[:, None] + offset, batch * time)
        by_chunk = tokens.view(len(lengths), -1, chunk).transpose(0, 1)  # [ordinal, sequence, C]
        occupied = by_chunk[..., 0] < batch * time
        active = tuple(int(n) for n in occupied.sum(dim=1).tolist())
        source = by_chunk[occupied].flatten()
        return _Layout(batch, time, chunk, active, order, source, inverse_of(source, batch * time))

    def to_chunks(self, x: Tensor) -> Tensor:
        """[B, T, H, channels] -> [chunks, H, C, channels], zeros where no token stands."""
        _, _, heads, channels = x.shape
        if self.source is None or self.target is None:
            pad = -self.time % self.chunk
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pad))
            x = x.view(self.batch, -1, self.chunk, heads, channels)
            return x.permute(1, 0, 3, 2, 4).reshape(-1, heads, self.chunk, channels)
        x = move_rows(x.flatten(0, 1), self.source, self.target)
        return x.view(-1, self.chunk, heads, channels).transpose(1, 2).contiguous()

    def from_chunks(self, x: Tensor) -> Tensor:
        """[chunks, H, C, channels] -> [B, T, H, channels]."""
        _, heads, _, channels = x.shape
        if self.source is None or self.target is None:
            x = x.view(-1, self.batch, heads, self.chunk, channels).permute(1, 0, 3, 2, 4)
            return x.reshape(self.batch, -1, heads, channels)[:, : self.time]
        rows = x.transpose(1, 2).reshape(-1, heads, channels)
        rows = move_rows(rows, self.target, self.source)
        return rows.view(self.batch, self.time, heads, channels)

    def sort(self, memory: Tensor) -> Tensor:
        """Put the memories in the order of the chunks."""
        return memory if self.order is None else memory[self.order]

    def unsort(self, memory: Tensor) -> Tensor:
        """Put the memories back in the caller's order."""
        return memory if self.order is None else memory[torch.argsort(self.order)]


def _power_of_two(chunk_size: int, longest: int) -> int:
    wanted = min(chunk_size, max(longest, 1))
    chunk: int = 1 << (chunk_size.bit_length() - 1)
    while chunk // 2 >= wanted:
        chunk //= 2
    return chunk


class _KdaChunk(torch.autograd.Function):
    """The chunk recursion on [chunks, HV, C, channels] with memories [N, HV, K, V]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        memory: Tensor,
        active: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:
        q_on_k, inverse, prefix, suffix = _within_chunks(q, k, beta, log_decay.exp())
        q_read = q * prefix
        k_read = k * prefix * beta
        k_write = (k * suffix).transpose(-1, -2)
        chunk_decay = prefix[:, :, -1, :, None]  # [chunks, HV, K, 1]
        delta = v * beta
        output = torch.empty_like(v)
        starts = v.new_empty(len(v), *memory.shape[1:])  # the memory at each chunk's start
        memory = memory.clone()
        for now in _spans(active):
            M = memory[: now.stop - now.start]
            starts[now] = M
            delta[now] = inverse[now] @ (delta[now] - k_read[now] @ M)
            output[now] = q_read[now] @ M + q_on_k[now] @ delta[now]
            M.mul_(chunk_decay[now]).add_(k_write[now] @ delta[now])
        ctx.save_for_backward(q, k, v, log_decay, beta, starts, delta, q_on_k, inverse)
        ctx.active = active
        return output, memory

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_memory: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, beta, starts, delta, q_on_k, inverse = ctx.saved_tensors
        decay = log_decay.exp()
        prefix, suffix = _chunk_products(decay)
        k_prefix = k * prefix
        q_read_t = (q * prefix).transpose(-1, -2)
        k_read_t = (k_prefix * beta).transpose(-1, -2)
        k_write = k * suffix
        chunk_decay = prefix[:, :, -1, :, None]

        # Right to left over the chunks: what each memory, each delta and each residual is worth.
        d_residual = torch.empty_like(v)
        d_ends = torch.empty_like(starts)  # gradient of the memory at each chunk's end
        d_delta = q_on_k.transpose(-1, -2) @ d_output
        inverse_t = inverse.transpose(-1, -2)
        d_memory = d_memory.clone()
        for now in reversed(list(_spans(ctx.active))):
            dM = d_memory[: now.stop - now.start]
            d_ends[now] = dM
            d_residual[now] = inverse_t[now] @ (d_delta[now] + k_write[now] @ dM)
            dM.mul_(chunk_decay[now])
            dM.add_(q_read_t[now] @ d_output[now]).sub_(k_read_t[now] @ d_residual[now])

        # Through the memory. The residual is beta v - k_read M, and inverse = (I + L)^-1.
        starts_t = starts.transpose(-1, -2)
        d_q = (d_output @ starts_t).mul_(prefix)
        reads = (d_residual @ starts_t).neg_().mul_(prefix)  # beta times this is k's share
        writes = (delta @ d_ends.transpose(-1, -2)).mul_(suffix)
        d_v = d_residual * beta
        d_beta = (d_residual * v).sum(-1, keepdim=True)
        d_chunk = chunk_decay.squeeze(-1) * (starts * d_ends).sum(-1) + (k * writes).sum(-2)

        # Through the pairs of a chunk: a row receives (i), a column gives (j).
        d_q_on_k = (d_output @ delta.transpose(-1, -2)).tril_()
        d_L = (d_residual @ delta.transpose(-1, -2)).tril_(-1).neg_()
        row_q, row_k, column_k = _pairs_backward(q, k, beta, decay, d_q_on_k, d_L)
        d_q += row_q
        reads += row_k
        writes += column_k
        d_beta += (k * reads).sum(-1, keepdim=True)
        reads *= beta

        # Every factor is exp(G_i - G_j): G gains where its row reads and loses where it writes.
        d_G = q * d_q + k * (reads - writes)
        d_G[:, :, -1] += d_chunk
        d_log_decay = d_G.flip(2).cumsum(2).flip(2)
        d_log_decay.masked_fill_(decay == 0, 0.0)  # exp(-inf) has slope 0; do not leave rounding
        return d_q, reads + writes, d_v, d_log_decay, d_beta, d_memory, None


def _spans(active: tuple[int, ...]) -> Iterator[slice]:
    """The chunks that advance together: all sequences' first ones, all second ones, ..."""
    start = 0
    for count in active:
        yield slice(start, start + count)
        start += count


def _levels(decay: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (half, prefix, suffix) for blocks of half = 1, 2, 4, ... C tokens.

    ``prefix[i]`` is the product of decays from the start of i's block through i; ``suffix[j]``
    from behind j through the end of j's block. Both [..., C, K], both overwritten by the next
    level; the last pair, with half = C, spans the whole chunk.
    """
    prefix, suffix = decay.clone(), torch.ones_like(decay)
    C = decay.shape[-2]
    half = 1
    while half < C:
        yield half, prefix, suffix
        prefix_left, prefix_right = _halves(prefix, half)
        suffix_left, _ = _halves(suffix, half)
        suffix_left.mul_(prefix_right[..., -1:, :])
        prefix_right.mul_(prefix_left[..., -1:, :])
        half *= 2
    yield half, prefix, suffix


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """View [..., C, K] as its left and its right halves, each [..., C / 2 half, half, K]."""
    pairs = x.unflatten(-2, (-1, 2, half))
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


def _within_chunks(
    q: Tensor, k: Tensor, beta: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two C x C matrices of each chunk, and the decay from its start and to its end.

    Returns:
        q_on_k [..., C, C]: what row i reads of column j, for j <= i, else 0.
        inverse [..., C, C]: (I + L)^-1, L what row i recalls of column j < i, times beta_i.
        prefix, suffix [..., C, K]: decay from the chunk's start through i, and from behind j to
            the chunk's end.
    """
    k_beta = k * beta
    q_on_k = (q * k).sum(-1)[..., None, None]  # blocks of one token: [..., C, 1, 1]
    inverse = torch.ones_like(q_on_k)
    for half, prefix, suffix in _levels(decay):
        if half == decay.shape[-2]:
            break
        right, left = _scaled_halves(q, k_beta, k, prefix, suffix, half)
        reads, recalls = (right @ left.transpose(-1, -2)).split(half, dim=-2)
        first, second = inverse.unflatten(-3, (-1, 2)).unbind(-3)
        inverse = _merge(first, second, -(second @ (recalls @ first)))
        upper, lower = q_on_k.unflatten(-3, (-1, 2)).unbind(-3)
        q_on_k = _merge(upper, lower, reads)
    return q_on_k.squeeze(-3), inverse.squeeze(-3), prefix, suffix


def _scaled_halves(
    q: Tensor, k_beta: Tensor, k: Tensor, prefix: Tensor, suffix: Tensor, half: int
) -> tuple[Tensor, Tensor]:
    """Right halves of q and beta k times the prefix, one below the other; left of k, the suffix.

    Returns:
        [..., C / 2 half, 2 half, K] and [..., C / 2 half, half, K]; a row of the first times a
        row of the second is what the one reads of what the other wrote.
    """
    scale = _halves(prefix, half)[1]
    right = scale.new_empty(*scale.shape[:-2], 2 * half, scale.shape[-1])
    torch.mul(_halves(q, half)[1], scale, out=right[..., :half, :])
    torch.mul(_halves(k_beta, half)[1], scale, out=right[..., half:, :])
    return right, _halves(k, half)[0] * _halves(suffix, half)[0]


def _merge(first: Tensor, second: Tensor, below: Tensor) -> Tensor:
    """[[first, 0], [below, second]]: two neighbouring blocks and what joins them."""
    half = first.shape[-1]
    block = first.new_zeros(*first.shape[:-2], 2 * half, 2 * half)
    block[..., :half, :half] = first
    block[..., half:, half:] = second
    block[..., half:, :half] = below
    return block


def _pairs_backward(
    q: Tensor, k: Tensor, beta: Tensor, decay: Tensor, d_q_on_k: Tensor, d_L: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through the pairs: to q and k as rows, and to k as columns.

    The second is wrt ``beta k`` (the caller multiplies by beta).
    """
    diagonal = d_q_on_k.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    row_q, row_k, column_k = diagonal * k, torch.zeros_like(k), diagonal * q
    k_beta = k * beta
    for half, prefix, suffix in _levels(decay):
        if half == decay.shape[-2]:
            break
        prefix_right, suffix_left = _halves(prefix, half)[1], _halves(suffix, half)[0]
        right, left = _scaled_halves(q, k_beta, k, prefix, suffix, half)
        d_pairs = torch.cat([_below(d_q_on_k, half), _below(d_L, half)], dim=-2)
        d_rows_q, d_rows_k = (d_pairs @ left).split(half, dim=-2)
        _halves(row_q, half)[1].addcmul_(d_rows_q, prefix_right)
        _halves(row_k, half)[1].addcmul_(d_rows_k, prefix_right)
        _halves(column_k, half)[0].addcmul_(d_pairs.transpose(-1, -2) @ right, suffix_left)
    return row_q, row_k, column_k


def _below(matrix: Tensor, half: int) -> Tensor:
    """The blocks of a [..., C, C] matrix that join two halves: [..., C / 2 half, half, half]."""
    blocks = matrix.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))
    # [..., row block, row half, row, column block, column half, column]
    joined = blocks.diagonal(dim1=-6, dim2=-3)[..., 1, :, 0, :, :]  # [..., half, half, blocks]
    result: Tensor = joined.movedim(-1, -3)
    return result


def _chunk_products(decay: Tensor) -> tuple[Tensor, Tensor]:
    """Prefix and suffix products over whole chunks."""
    *_, (_, prefix, suffix) = _levels(decay)
    return prefix, suffix
