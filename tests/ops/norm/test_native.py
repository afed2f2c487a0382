"""The C++ norms are the definition's, forward and backward, whatever the layout."""

import pytest
import torch

from deltamoe.ops import native as libraries
from deltamoe.ops.norm import native, reference

_reason = libraries.why_not("norm")
pytestmark = pytest.mark.skipif(_reason is not None, reason=f"native: {_reason}")

SIZES = [1, 7, 16, 61, 130]
FORMS = ["none", "sigmoid", "swish"]
BF16 = torch.bfloat16


def run(module, x, logits, weight, activation: str, dtype: torch.dtype | None):
    if activation == "none":
        return module.rms_norm(x, weight, 1e-5, dtype=dtype)
    return module.gated_rms_norm(x, logits, weight, 1e-5, activation=activation, dtype=dtype)


def check(x, logits, weight, activation: str, dtype: torch.dtype | None = None):
    """Compare with the definition in fp64; return what the C++ made."""
    inputs = [t.detach().requires_grad_() for t in (x, logits, weight)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y = run(native, *inputs, activation, dtype)
    expected = run(reference, *exact, activation, None)
    assert y.dtype == (dtype or x.dtype)
    assert y.shape == x.shape
    # One rounding at the end in bf16; in fp32 a few, or a sum of some hundred terms of about 1.
    bound = {"rtol": 2**-8, "atol": 1e-5} if y.dtype == BF16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y.double(), expected, **bound)
    d_y = torch.randn_like(y)
    used = [0, 2] if activation == "none" else [0, 1, 2]
    got = torch.autograd.grad(y, [inputs[i] for i in used], d_y)
    wanted = torch.autograd.grad(expected, [exact[i] for i in used], d_y.double())
    for g, w, i in zip(got, wanted, used, strict=True):
        assert g.dtype == inputs[i].dtype
        bound = {"rtol": 2**-8, "atol": 1e-4} if g.dtype == BF16 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(g.double(), w, **bound)
    return [y, *got]


@pytest.mark.parametrize("activation", FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_fp32(activation: str, size: int) -> None:
    x, logits = torch.randn(3, 100, size), 3 * torch.randn(3, 100, size)  # two blocks of rows
    check(x, logits, torch.randn(size), activation)


@pytest.mark.parametrize("activation", FORMS)
@pytest.mark.parametrize(
    ("inside", "outside"), [(BF16, BF16), (BF16, torch.float32), (torch.float32, BF16)]
)
def test_bf16(activation: str, inside: torch.dtype, outside: torch.dtype) -> None:
    x, logits = torch.randn(2, 9, 61).to(inside), torch.randn(2, 9, 61).to(inside)
    check(x, logits, torch.randn(61), activation, outside)


def test_mixed_inputs() -> None:
    """A bf16 answer opened by fp32 logits; each gradient has its tensor's dtype."""
    check(torch.randn(5, 61).bfloat16(), torch.randn(5, 61), torch.randn(61), "sigmoid")
    check(torch.randn(5, 61), torch.randn(5, 61), torch.randn(61).bfloat16(), "swish")


def test_rows_that_stand_apart() -> None:
    weight, logits = torch.randn(61), torch.randn(2, 3, 61)
    whole = torch.randn(2, 3, 80)
    for x in (whole[..., 5:66], torch.randn(2, 61, 3).transpose(1, 2), torch.randn(3, 2, 61)[1]):
        check(x, logits[: len(x)] if x.ndim == 3 else logits[0, :2], weight, "sigmoid")
        check(x, logits[: len(x)] if x.ndim == 3 else logits[0, :2], weight, "none")


def check_sum(x, branch, weight, dtype: torch.dtype | None = None, asks_of: str = "both"):
    """``add_rms_norm`` beside the definition in fp64; return what the C++ made."""
    inputs = [t.detach().requires_grad_() for t in (x, branch, weight) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    got = native.add_rms_norm(inputs[0], *branch_and_weight(inputs, branch), 1e-5, dtype=dtype)
    wanted = reference.add_rms_norm(exact[0], *branch_and_weight(exact, branch), 1e-5)
    wide = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    assert [t.dtype for t in got] == [wide, dtype or wide]
    for g, w in zip(got, wanted, strict=True):  # the bounds are those of ``check``
        bound = {"rtol": 2**-8, "atol": 1e-5} if g.dtype == BF16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(g.double(), w, **bound)
    d_got = [torch.randn_like(t) for t in got]
    chosen = {"both": [0, 1], "sum": [0], "norm": [1]}[asks_of]
    used = [t for t in inputs if asks_of != "sum" or t is not inputs[-1]]
    grads = torch.autograd.grad(
        [got[i] for i in chosen], used, [d_got[i] for i in chosen], materialize_grads=True
    )
    exact_grads = torch.autograd.grad(
        [wanted[i] for i in chosen], exact[: len(used)], [d_got[i].double() for i in chosen]
    )
    for g, w, i in zip(grads, exact_grads, used, strict=True):
        assert g.dtype == i.dtype
        bound = {"rtol": 2**-8, "atol": 1e-4} if g.dtype == BF16 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(g.double(), w, **bound)
    return [*got, *grads]


def branch_and_weight(tensors: list[torch.Tensor], branch: torch.Tensor | None):
    return [None if branch is None else tensors[1], tensors[-1]]


@pytest.mark.parametrize("outside", [torch.float32, BF16])
@pytest.mark.parametrize(
    ("stream", "added"),
    [(torch.float32, torch.float32), (torch.float32, BF16), (BF16, BF16), (BF16, torch.float32)],
)
@pytest.mark.parametrize("size", SIZES)
def test_sum(size: int, stream: torch.dtype, added: torch.dtype, outside: torch.dtype) -> None:
    # Sums of such eighths are exact in bf16, so that each answer is rounded once.
    x = torch.randint(-30, 30, (3, 100, size)).to(stream) / 8
    branch = torch.randint(-30, 30, (3, 100, size)).to(added) / 8
    check_sum(x, branch, torch.randn(size), outside)


def test_the_norm_is_of_the_sum_as_it_is_rounded() -> None:
    x, branch, weight = (
        torch.randn(9, 61).bfloat16(),
        torch.randn(9, 61).bfloat16(),
        torch.randn(61),
    )
    total, normed = native.add_rms_norm(x, branch, weight, 1e-5)
    assert torch.equal(total, x + branch)
    assert torch.equal(normed, native.rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("asks_of", ["both", "sum", "norm"])
@pytest.mark.parametrize("has_branch", [True, False])
def test_gradients_of_either_answer(asks_of: str, has_branch: bool) -> None:
    branch = torch.randn(2, 5, 61) if has_branch else None
    check_sum(torch.randn(2, 5, 61), branch, torch.randn(61), asks_of=asks_of)


def test_a_sum_without_a_branch_is_the_stream_itself() -> None:
    x, weight = torch.randn(2, 5, 61), torch.randn(61)
    total, normed = native.add_rms_norm(x, None, weight, 1e-5)
    assert total.data_ptr() == x.data_ptr()
    assert torch.equal(normed, native.rms_norm(x, weight, 1e-5))


def test_sum_of_rows_that_stand_apart() -> None:
    x, branch = torch.randn(2, 3, 80)[..., 5:66], torch.randn(2, 61, 3).transpose(1, 2)
    check_sum(x, branch, torch.randn(61), BF16)


def test_sum_with_a_branch_in_fp16() -> None:
    x, branch, weight = torch.randn(4, 61), torch.randn(4, 61).half(), torch.randn(61)
    got = native.add_rms_norm(x, branch.requires_grad_(), weight, 1e-5)
    for g, wanted in zip(got, reference.add_rms_norm(x, branch, weight, 1e-5), strict=True):
        torch.testing.assert_close(g, wanted, rtol=1e-5, atol=1e-5)
    (d_branch,) = torch.autograd.grad(got[0].sum(), branch)
    assert d_branch.dtype == torch.float16


def test_sum_in_fp64_is_the_definition() -> None:
    x, branch, weight = (torch.randn(*shape).double() for shape in ((2, 5), (2, 5), (5,)))
    for got, wanted in zip(
        native.add_rms_norm(x, branch, weight, 1e-5),
        reference.add_rms_norm(x, branch, weight, 1e-5),
        strict=True,
    ):
        assert torch.equal(got, wanted)


def test_no_rows() -> None:
    x, weight = torch.randn(0, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    native.rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert weight.grad.eq(0).all()
    total, normed = native.add_rms_norm(x, x, weight, 1e-5)
    assert total.shape == normed.shape == x.shape


def test_zeros_and_broken_numbers() -> None:
    weight = torch.ones(3)
    assert native.rms_norm(torch.zeros(2, 3), weight, 1e-5).eq(0).all()
    for broken in (torch.nan, torch.inf):
        x = torch.tensor([[1.0, broken, 2.0], [1.0, 2.0, 3.0]])
        got, expected = (m.rms_norm(x, weight, 1e-5) for m in (native, reference))
        torch.testing.assert_close(got, expected, equal_nan=True)
    logits = torch.tensor([[-1e30, 1e30, torch.nan]])
    got = native.gated_rms_norm(torch.ones(1, 3), logits, weight, 1e-5, activation="sigmoid")
    assert got[0, 0] == 0
    assert got[0, 1] == pytest.approx(1, abs=1e-4)
    assert got[0, 2].isnan()


def test_the_gate_is_exact_wherever_it_stands() -> None:
    """To 3e-7 of itself; the norm (root, division, product) and its product round 4 times more."""
    logits = torch.linspace(-87, 87, 64_000).reshape(1000, 64)
    x, weight = torch.ones(1000, 64), torch.ones(64)
    got = native.gated_rms_norm(x, logits, weight, 1e-5, activation="sigmoid")
    expected = logits.double().sigmoid() * (1 + 1e-5) ** -0.5
    torch.testing.assert_close(got.double(), expected, rtol=3e-7 + 4 * 2**-24, atol=0)


def test_the_number_of_threads_changes_nothing() -> None:
    x, logits, weight = torch.randn(1000, 61), torch.randn(1000, 61), torch.randn(61)
    results, before = [], torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            torch.manual_seed(0)
            results.append([*check(x, logits, weight, "swish"), *check_sum(x, logits, weight)])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
