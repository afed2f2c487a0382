"""The experts in C++ against their definition: forward, gradients, invariances."""

import pytest
import torch
import torch.nn.functional as F

from deltamoe.ops.experts import feed_forward, mix_experts, run_experts

# N tokens, D, E experts, A choices, F: every size different, most no multiple of 16
SHAPES = [
    (37, 40, 5, 2, 24),
    (13, 7, 6, 3, 9),
    (300, 50, 3, 2, 70),
    (1, 33, 4, 1, 17),
    (150, 64, 16, 2, 32),
    (1500, 30, 2, 1, 300),  # more rows and hidden channels than one task takes at once
    (450, 1060, 9, 4, 18),  # more channels, and experts for every thread with rows for two groups
]
KINDS = {  # of x, of the matrices, of the products
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "autocast": (torch.float32, torch.float32, torch.bfloat16),
    "bf16 tokens": (torch.bfloat16, torch.float32, torch.bfloat16),
}
# Products of bf16 operands: 8 bits, through three products, the largest entry as the measure.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 0.015}


class Case:
    """Tensors for one call, and what the definition in fp64 makes of the very same numbers."""

    def __init__(self, shape, kind="fp32", *, is_swiglu=True, seed=0):
        N, D, E, A, H = shape
        generator = torch.Generator().manual_seed(seed)
        x_dtype, w_dtype, self.dtype = KINDS[kind]

        def normal(*size, dtype=w_dtype, scale=1.0):
            return (scale * torch.randn(size, generator=generator)).to(dtype).requires_grad_()

        self.x = normal(N, D, dtype=x_dtype)
        self.weights = torch.rand(N, A, generator=generator).requires_grad_()
        self.w_gate = normal(E, H, D, scale=D**-0.5) if is_swiglu else None
        self.w_up = normal(E, H, D, scale=D**-0.5)
        self.w_down = normal(E, D, H, scale=H**-0.5)
        busy = max(E - 1, A)  # the last expert sleeps
        ranks = torch.rand(N, busy, generator=generator).argsort(dim=1)
        self.ids = ranks[:, :A].contiguous()
        self.d_y = torch.randn(N, D, generator=generator).to(x_dtype)

    @property
    def arguments(self):
        return self.x, self.ids, self.weights, self.w_gate, self.w_up, self.w_down

    @property
    def leaves(self):
        tensors = (self.x, self.weights, self.w_gate, self.w_up, self.w_down)
        return [t for t in tensors if t is not None]

    def run(self, backend="native", *, capacity=None):
        y, counts = mix_experts(
            *self.arguments, capacity=capacity, dtype=self.dtype, backend=backend
        )
        return y, counts, torch.autograd.grad(y, self.leaves, self.d_y)

    def exact(self, *, capacity=None):
        def wide(tensor):
            return None if tensor is None else tensor.detach().double().requires_grad_()

        x, ids, *others = self.arguments
        tensors = [wide(t) for t in (x, *others)]
        y, counts = mix_experts(
            tensors[0], ids, *tensors[1:], capacity=capacity, backend="segments"
        )
        leaves = [t for t in tensors if t is not None]
        return y, counts, torch.autograd.grad(y, leaves, self.d_y.double())


def assert_near(got, wanted, tolerance):
    for a, b in zip((got[0], *got[2]), (wanted[0], *wanted[2]), strict=True):
        scale = b.abs().max().item()
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * scale + 1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_swiglu", [True, False], ids=["swiglu", "ffn"])
def test_answers_and_gradients(shape, kind, is_swiglu):
    case = Case(shape, kind, is_swiglu=is_swiglu)
    got, wanted = case.run(), case.exact()
    assert [g.dtype for g in got[2]] == [leaf.dtype for leaf in case.leaves]
    assert torch.equal(got[1], wanted[1])
    assert_near(got, wanted, TOLERANCES[case.dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES[2:], (900, 768, 3, 1, 32)], ids=str)
def test_threads_change_nothing(shape, kind):
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(Case(shape, kind).run())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][2], results[1][2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_a_token_does_not_depend_on_its_neighbours(kind):
    case = Case(SHAPES[0], kind)
    whole = case.run()[0]
    x, ids, weights, *matrices = case.arguments
    with torch.no_grad():
        for n in range(0, len(x), 5):
            part = slice(n, n + 1)
            alone, _ = mix_experts(
                *(x[part], ids[part], weights[part], *matrices), dtype=case.dtype, backend="native"
            )
            torch.testing.assert_close(alone[0], whole[n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capacity", [1, 5, 70])
def test_capacity_drops_whom_the_definition_drops(capacity):
    case = Case(SHAPES[2])
    got, wanted = case.run(capacity=capacity), case.exact(capacity=capacity)
    assert torch.equal(got[1], wanted[1])
    assert_near(got, wanted, TOLERANCES[torch.float32])


def test_one_expert_takes_all():
    case = Case((200, 20, 6, 1, 12))
    case.ids.fill_(4)
    got = case.run()
    assert_near(got, case.exact(), TOLERANCES[torch.float32])
    assert got[1].tolist() == [0, 0, 0, 0, 200, 0]
    assert torch.count_nonzero(got[2][3][:4]) == 0  # w_up of experts without rows


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_at_all(kind):
    case = Case((0, 8, 3, 2, 5), kind)
    y, counts, gradients = case.run()
    assert y.shape == (0, 8)
    assert counts.tolist() == [0, 0, 0]
    assert all(torch.count_nonzero(g) == 0 for g in gradients)


def test_strided_inputs():
    case, straight = Case(SHAPES[0]), Case(SHAPES[0])

    def strided(tensor):
        wider = torch.stack([tensor.detach(), tensor.detach()], dim=-1)
        return wider[..., 0].requires_grad_()

    for name in ("x", "weights", "w_gate", "w_up", "w_down"):
        setattr(case, name, strided(getattr(case, name)))
    case.d_y = case.d_y[:, :1].expand_as(case.d_y)
    straight.d_y = case.d_y.contiguous()
    for a, b in zip(case.run()[2], straight.run()[2], strict=True):
        assert torch.equal(a, b)


def test_a_nan_stays_in_its_own_token():
    case = Case(SHAPES[0])
    with torch.no_grad():
        good = mix_experts(*case.arguments, backend="native")[0]
        case.x[3, 2] = float("nan")
        y = mix_experts(*case.arguments, backend="native")[0]
    assert y[3].isnan().all()
    others = [n for n in range(len(y)) if n != 3]
    assert torch.equal(y[others], good[others])


def test_an_expert_that_does_not_exist_is_refused():
    case = Case(SHAPES[0])
    case.ids[2, 1] = 5
    with pytest.raises(IndexError, match=r"\[0, 5\)"):
        case.run()


@pytest.mark.parametrize("is_swiglu", [True, False])
def test_rows_that_are_sorted_already(is_swiglu):
    case = Case(SHAPES[0], is_swiglu=is_swiglu)
    counts = torch.tensor([20, 0, 9, 8, 0])
    got = run_experts(case.x, counts, *case.arguments[3:], backend="native")
    wanted = run_experts(case.x, counts, *case.arguments[3:], backend="reference")
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1, 10, 6), (2, 40, 33, 50)])
@pytest.mark.parametrize("is_swiglu", [True, False])
def test_the_expert_that_everyone_visits(size, is_swiglu):
    B, T, D, H = size
    x = torch.randn(B, T, D, requires_grad=True)
    gate, up = (torch.randn(H, D, requires_grad=True) for _ in range(2))
    down = torch.randn(D, H, requires_grad=True)
    leaves = [x, gate, up, down] if is_swiglu else [x, up, down]
    y = feed_forward(x, gate if is_swiglu else None, up, down)
    hidden = F.silu(F.linear(x, gate)) * F.linear(x, up) if is_swiglu else F.gelu(F.linear(x, up))
    wanted = F.linear(hidden, down)
    for a, b in zip(
        (y, *torch.autograd.grad(y.square().sum(), leaves)),
        (wanted, *torch.autograd.grad(wanted.square().sum(), leaves)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-6 * b.abs().max().item())
