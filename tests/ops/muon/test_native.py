"""Muon in C++ against its definition in fp64."""

import pytest
import torch

from deltamoe.ops.backend import BACKENDS
from deltamoe.ops.muon import muon_step_

_NATIVE = next(backend for backend in BACKENDS["muon"] if backend.name == "native")
WHY_NOT = _NATIVE.why_not("cpu", torch.bfloat16)
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

SHAPES = [(24, 40), (40, 24), (32, 32), (3, 5, 67), (2, 130, 33), (1, 7), (7, 1), (4, 96, 160)]


def three(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(shape, generator=generator) for shape in SHAPES]
        for _ in ("parameters", "gradients", "momenta")
    ]


def step(tensors, backend, dtype=torch.bfloat16, threads=1):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        muon_step_(*tensors, lr=0.1, weight_decay=0.3, beta=0.95, dtype=dtype, backend=backend)
    finally:
        torch.set_num_threads(before)
    return tensors


def test_it_is_as_near_to_the_exact_update_as_the_definition_in_bf16():
    start = three()[0]
    exact = step([[x.double() for x in some] for some in three()], "torch", torch.float64)
    native, torchs = step(three(), "native"), step(three(), "torch")
    for p0, e, n, t in zip(start, exact[0], native[0], torchs[0], strict=True):
        moved = (e - p0).norm()
        allowed = 1.5 * (t.double() - e).norm() + 0.002 * moved
        assert (n.double() - e).norm() < allowed
        assert (n.double() - e).norm() < 0.03 * moved  # five times a rounding to 8 bits


def test_momenta_are_the_definition_s_exactly():
    for a, b in zip(step(three(), "native")[2], step(three(), "torch")[2], strict=True):
        assert torch.equal(a, b)


def test_threads_change_nothing():
    for a, b in zip(*(step(three(), "native", threads=n) for n in (1, 2)), strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


def test_company_changes_nothing():
    together, (p, g, m) = step(three(), "native"), three()
    for i in range(len(SHAPES)):
        step([p[i : i + 1], g[i : i + 1], m[i : i + 1]], "native")
        assert torch.equal(p[i], together[0][i])


def test_large_and_strided_matrices_go_to_the_definition(monkeypatch):
    monkeypatch.setattr("deltamoe.ops.muon.native.LARGEST", 1000)
    wanted, got = step(three(), "torch"), three()
    got[0][1] = got[0][1].t().contiguous().t()
    got[1][0] = got[1][0].t().contiguous().t()  # a strided gradient is copied
    step(got, "native")
    for i in (4, 7):  # 4,290 and 15,360 numbers
        torch.testing.assert_close(got[0][i], wanted[0][i], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[0][1], wanted[0][1], rtol=1e-5, atol=1e-6)
    assert torch.equal(got[0][0], step(three(), "native")[0][0])


def test_a_gradient_of_zeros_decays_only():
    p, g, m = torch.randn(6, 9), torch.zeros(6, 9), torch.zeros(6, 9)
    before = p.clone()
    step([[p], [g], [m]], "native")
    torch.testing.assert_close(p, before * (1 - 0.1 * 0.3))
