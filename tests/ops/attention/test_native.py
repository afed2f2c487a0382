"""The C++ attention is the definition's, forward and backward, on any mix of lengths."""

import pytest
import torch

from deltamoe.ops import native as libraries
from deltamoe.ops.attention import native, reference

_reason = libraries.why_not("attention")
pytestmark = pytest.mark.skipif(_reason is not None, reason=f"native: {_reason}")

# heads, key channels of a head, shared key channels, value channels
SIZES = [
    (3, 5, 4, 7),
    (1, 16, 0, 16),
    (2, 33, 16, 20),
    (2, 1, 3, 65),
    (2, 24, 16, 8),
    (1, 48, 32, 9),
]


def inputs(batch: int, time: int, sizes, dtype=torch.float32) -> list[torch.Tensor]:
    """Queries with both parts side by side, keys beside values, shared keys: as MLA has them."""
    H, K, P, V = sizes
    shapes = [(batch, time, H, K + P), (batch, time, H, K + V), (batch, time, P)]
    return [torch.randn(*shape).to(dtype) for shape in shapes]


def run(module, queries, keys_values, k_shared, K: int, **options):
    q, q_shared = queries.split([K, queries.shape[-1] - K], dim=-1)
    k, v = keys_values.split([K, keys_values.shape[-1] - K], dim=-1)
    return module.causal_attention(q, q_shared, k, k_shared, v, **options)


def check(tensors, K: int, **options) -> list[torch.Tensor]:
    """Compare with the definition in fp64; return what the C++ made."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    y = run(native, *tensors, K, **options)
    expected = run(reference, *exact, K, **options)
    # fp32: sums of some hundred products. bf16: AMX rounds weights, and in the backward pass also
    # their gradients and those of the scores, to 2^-9 of each; results are of the order of 1.
    is_bf16 = y.dtype == torch.bfloat16
    bound = {"rtol": 2**-7, "atol": 2**-8} if is_bf16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y.double(), expected, **bound)
    d_y = torch.randn_like(y)
    got = torch.autograd.grad(y, tensors, d_y)
    wanted = torch.autograd.grad(expected, exact, d_y.double())
    # A score's gradient needs its query's outputs times their gradients, and outputs are kept in
    # bf16: the error of that sum grows like the root of their number.
    by_outputs = {"rtol": 2**-6, "atol": 2e-2 * (y.shape[-1] / 7) ** 0.5}
    bound = by_outputs if is_bf16 else {"rtol": 1e-4, "atol": 2e-5}
    for g, w in zip(got, wanted, strict=True):
        assert g.dtype == y.dtype
        torch.testing.assert_close(g.double(), w, **bound)
    return [y, *got]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("time", [1, 17, 97, 550, 1060])  # the last: of more than one task a head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(sizes, time: int, dtype: torch.dtype) -> None:
    check(inputs(2, time, sizes, dtype), sizes[1])


@pytest.mark.parametrize("lengths", [(9,), (0, 8, 1, 0), (300, 1, 48, 49, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    borders = torch.tensor([0, *lengths]).cumsum(0)
    check(inputs(1, sum(lengths), SIZES[0], dtype), SIZES[0][1], cu_seqlens=borders)


def test_no_tokens() -> None:
    tensors = [t.requires_grad_() for t in inputs(2, 0, SIZES[0])]
    run(native, *tensors, SIZES[0][1]).sum().backward()
    assert all(t.grad is not None for t in tensors)


def test_channels_that_do_not_touch() -> None:
    _, K, P, V = SIZES[0]
    q, k = torch.randn(2, K, 3, 9).transpose(1, 3), torch.randn(2, 3, 9, K).transpose(1, 2)
    v, q_shared = torch.randn(2, 3, 9, V).transpose(1, 2), torch.randn(2, 3, 9, P).transpose(1, 2)
    k_shared = torch.randn(2, P, 9).transpose(1, 2)
    tensors = (q, q_shared, k, k_shared, v)
    torch.testing.assert_close(
        native.causal_attention(*tensors), reference.causal_attention(*tensors)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores(dtype: torch.dtype) -> None:
    """Scores of a thousand and more: one key wins, nothing overflows."""
    tensors = [100 * t for t in inputs(1, 300, SIZES[2], dtype)]
    got, expected = (run(m, *tensors, SIZES[2][1]) for m in (native, reference))
    # exp of a difference of scores of 1e5, which fp32 knows to 1e-2
    torch.testing.assert_close(got, expected, rtol=0.1, atol=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_reaches_those_who_see_it(dtype: torch.dtype) -> None:
    queries, keys_values, k_shared = inputs(1, 60, SIZES[0], dtype)
    keys_values[0, 30] = torch.nan
    out = run(native, queries, keys_values, k_shared, SIZES[0][1])
    assert out[:, 30:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_nothing(dtype: torch.dtype) -> None:
    tensors = inputs(2, 550, SIZES[0], dtype)
    results, before = [], torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            torch.manual_seed(0)
            results.append(check(tensors, SIZES[0][1]))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
