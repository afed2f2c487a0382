"""Dispatch, grouped products and combine, against one token at a time."""

import pytest
import torch
import torch.nn.functional as F

from deltamoe.ops.backend import BACKENDS, select
from deltamoe.ops.experts import choose_experts, combine, dispatch, run_experts

N, D, E, A, HIDDEN = 13, 8, 5, 2, 12


def inputs(is_swiglu: bool = True) -> dict[str, torch.Tensor | None]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    return {
        "x": normal(N, D),
        "w_gate": normal(E, HIDDEN, D) if is_swiglu else None,
        "w_up": normal(E, HIDDEN, D),
        "w_down": normal(E, D, HIDDEN),
        "weights": torch.rand(N, A, dtype=torch.float64, requires_grad=True),
    }


def choices() -> torch.Tensor:
    ids = torch.stack([torch.randperm(E - 1)[:A] for _ in range(N)])  # the last expert sleeps
    return ids


def one_token_at_a_time(x, w_gate, w_up, w_down, weights, ids) -> torch.Tensor:
    rows = []
    for n in range(len(x)):
        row = torch.zeros_like(x[n])
        for a in range(ids.shape[1]):
            e = ids[n, a]
            up = w_up[e] @ x[n]
            hidden = F.gelu(up) if w_gate is None else F.silu(w_gate[e] @ x[n]) * up
            row = row + weights[n, a] * (w_down[e] @ hidden)
        rows.append(row)
    return torch.stack(rows)


def sorted_by_expert(x, w_gate, w_up, w_down, weights, ids, backend) -> torch.Tensor:
    routed = dispatch(x, ids, E)
    module = select("experts", backend, "cpu", x.dtype) if backend != "grouped" else None
    if module is None:  # the grouped product also runs on the CPU, it is only not chosen there
        from deltamoe.ops.experts import grouped as module
    answers = module.run_experts(routed.tokens, routed.counts, w_gate, w_up, w_down)
    return combine(answers, routed, weights)


@pytest.mark.parametrize("backend", [b.name for b in BACKENDS["experts"]])
@pytest.mark.parametrize("is_swiglu", [True, False])
def test_backends_are_the_loop(backend: str, is_swiglu: bool) -> None:
    tensors, ids = inputs(is_swiglu), choices()
    tolerance = 1e-12
    if backend in ("grouped", "native"):  # fp32, and for the first multiples of 16 bytes, only
        tensors = {
            n: None if x is None else x.detach().float().requires_grad_()
            for n, x in tensors.items()
        }
        tolerance = 1e-4  # fp32 sums of a dozen products of unit numbers, and their gradients
    leaves = [x for x in tensors.values() if x is not None]
    expected = one_token_at_a_time(*tensors.values(), ids)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    got = sorted_by_expert(*tensors.values(), ids, backend)
    gradients = torch.autograd.grad(got.square().sum(), leaves)
    scale = max(x.abs().max().item() for x in wanted)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("backend", ["segments", "reference"])
def test_no_token_at_all(backend: str) -> None:
    tensors = inputs()
    out = run_experts(
        tensors["x"][:0],
        torch.zeros(E, dtype=torch.int64),
        tensors["w_gate"],
        tensors["w_up"],
        tensors["w_down"],
        backend=backend,
    )
    assert out.shape == (0, D)


def test_dispatch_sorts_and_keeps_everyone() -> None:
    x, ids = torch.randn(N, D), choices()
    routed = dispatch(x, ids, E)
    assert routed.counts.tolist() == torch.bincount(ids.flatten(), minlength=E).tolist()
    borders = routed.counts.cumsum(0)
    for n in range(N):
        for a in range(A):
            row = routed.rows[n, a]
            assert torch.equal(routed.tokens[row], x[n])
            assert torch.searchsorted(borders, row, right=True) == ids[n, a]


def test_large_capacity_is_dropless() -> None:
    x, ids = torch.randn(N, D), choices()
    free, bounded = dispatch(x, ids, E), dispatch(x, ids, E, capacity=N)
    assert all(torch.equal(a, b) for a, b in zip(free, bounded, strict=True))


def test_a_full_expert_drops_second_choices_first() -> None:
    x = torch.randn(4, D, dtype=torch.float64)
    ids = torch.tensor([[1, 0], [0, 1], [0, 1], [2, 0]])  # expert 0: first of 1, 2; second of 0, 3
    routed = dispatch(x, ids, 3, capacity=3)
    assert routed.counts.tolist() == [3, 3, 1]
    dropped = len(routed.tokens)
    assert routed.rows[3, 1] == dropped  # the last second choice of expert 0
    assert (routed.rows == dropped).sum() == 1
    weights = torch.ones(4, 2, dtype=torch.float64)
    y = combine(routed.tokens, routed, weights)  # experts that answer with the token itself
    torch.testing.assert_close(y[:3], 2 * x[:3])
    torch.testing.assert_close(y[3], x[3])  # a dropped assignment adds nothing


@pytest.mark.parametrize("backend", ["native", "segments"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (50, 8, 3), (400, 96, 8), (5, 4, 4), (0, 6, 2)])
def test_the_best_experts_in_order_and_ties_by_index(backend: str, shape: tuple) -> None:
    tokens, experts, choices = shape
    scores = torch.randint(5, (tokens, experts)).float()  # many ties
    scores[1::7, experts // 2] = float("nan")
    scores[2::7] = -torch.inf
    ids = choose_experts(scores, choices, backend=backend)
    for row, got in zip(scores.tolist(), ids.tolist(), strict=True):
        key = [torch.inf if s != s else s for s in row]
        assert got == sorted(range(experts), key=lambda e, key=key: (-key[e], e))[:choices]
