"""MLA: both forms are the same attention, causal, ragged, packed, with and without rotation."""

import pytest
import torch

from deltamoe.ops.mla import attend, attend_absorbed, attend_expanded, attend_packed, rotate

B, H, NOPE, P, V, L = 3, 2, 5, 4, 7, 6


def inputs(T: int, S: int, rope: int = P) -> list[torch.Tensor]:
    shapes = [(B, T, H, NOPE), (B, T, H, rope), (B, S, L), (B, S, rope), (H, NOPE, L), (H, V, L)]
    return [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]


def by_formula(q_nope, q_rope, latent, rope_key, w_key, w_value, past) -> torch.Tensor:
    out = q_nope.new_zeros(*q_nope.shape[:3], V)
    for b in range(q_nope.shape[0]):
        for t in range(q_nope.shape[1]):
            seen = int(past[b]) + t + 1
            for h in range(H):
                keys = latent[b, :seen] @ w_key[h].T
                scores = keys @ q_nope[b, t, h] + rope_key[b, :seen] @ q_rope[b, t, h]
                weights = (scores / (NOPE + q_rope.shape[-1]) ** 0.5).softmax(0)
                out[b, t, h] = weights @ (latent[b, :seen] @ w_value[h].T)
    return out


@pytest.mark.parametrize("form", [attend, attend_expanded, attend_absorbed])
@pytest.mark.parametrize("rope", [0, P])
@pytest.mark.parametrize("past", [(0, 0, 0), (4, 4, 4), (0, 3, 5)])
def test_forms_are_the_formula(form, rope: int, past: tuple[int, ...]) -> None:
    T = 3
    tensors = inputs(T, max(past) + T, rope)
    seen = torch.tensor(past)
    got = form(*tensors, seen)
    torch.testing.assert_close(got, by_formula(*tensors, seen), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", [attend_expanded, attend_absorbed])
def test_gradients(form) -> None:
    tensors = inputs(4, 4)
    assert torch.autograd.gradcheck(form, tuple(tensors))
    seen = torch.tensor([1, 1, 1])
    assert torch.autograd.gradcheck(lambda *a: form(*a, seen), tuple(inputs(2, 3)))


@pytest.mark.parametrize("lengths", [(9,), (3, 3, 3), (1, 6, 2), (0, 8, 1, 0)])
def test_packed_sequences_do_not_meet(lengths: tuple[int, ...]) -> None:
    q_nope, q_rope, latent, rope_key, w_key, w_value = inputs(9, 9)
    tokens = [x[:1] for x in (q_nope, q_rope, latent, rope_key)]
    borders = torch.tensor([0, *lengths]).cumsum(0)
    got = attend_packed(*tokens, w_key, w_value, borders)
    for start, stop in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        if stop > start:
            alone = attend_expanded(*(x[:, start:stop] for x in tokens), w_key, w_value)
            torch.testing.assert_close(got[:, start:stop], alone, rtol=0, atol=1e-12)


def test_rotation_keeps_lengths_and_sees_only_distances() -> None:
    q, k = torch.randn(1, 9, H, P, dtype=torch.float64), torch.randn(1, 9, P, dtype=torch.float64)
    here = torch.arange(9)[None]
    scores = [
        torch.einsum(
            "bthp,bsp->bhts", rotate(q, here + shift, 10_000.0), rotate(k, here + shift, 10_000.0)
        )
        for shift in (0, 1000)
    ]
    # angles of a thousand positions are exact to about 1e-13 in fp64
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(rotate(q, here, 1e4).norm(dim=-1), q.norm(dim=-1))
    assert not torch.allclose(rotate(q, here, 1e4), q)


def test_rotation_by_formula() -> None:
    x = torch.tensor([[[1.0, 0.0, 0.0, 1.0]]], dtype=torch.float64)
    got = rotate(x, torch.tensor([[2]]), 100.0)[0, 0]
    slow = torch.tensor(2 * 100.0**-0.5, dtype=torch.float64)
    two = torch.tensor(2.0, dtype=torch.float64)
    expected = torch.stack([two.cos(), two.sin(), -slow.sin(), slow.cos()])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
