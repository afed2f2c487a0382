"""The C++ kernels are the recurrence too, in fp32 and bf16, on any shape and number of threads."""

import pytest
import torch

from deltamoe.ops.backend import select
from deltamoe.ops.kda import kda_chunk, kda_recurrent
from deltamoe.ops.kda import native as native_kda
from deltamoe.ops.native import why_not
from tests.ops.kda.inputs import REGIMES, H, K, V, assert_same, kda_inputs, outputs_and_gradients

_reason = why_not("kda")
pytestmark = pytest.mark.skipif(_reason is not None, reason=f"native: {_reason}")

# Heads, key and value channels that no vector divides, and some that fill several.
SIZES = [(2, 3, 6, 5, 7), (1, 1, 1, 16, 48), (1, 2, 2, 33, 17), (3, 1, 2, 64, 32)]


def exact(inputs, **options):
    wide = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    return outputs_and_gradients(
        lambda *a, **o: kda_recurrent(*a, backend="reference", **o), wide, **options
    )


def native(inputs, **options):
    return outputs_and_gradients(
        lambda *a, **o: kda_chunk(*a, backend="native", **o), inputs, **options
    )


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 131])
def test_chunk_is_the_recurrence(regime: str, T: int) -> None:
    inputs = kda_inputs(regime, T, torch.float32)
    # fp32 rounds at 6e-8, times the length of a chain of nearly cancelling corrections
    assert_same(native(inputs), exact(inputs), 1e-4)


def kept_bytes(dtype: torch.dtype) -> int:
    inputs = kda_inputs("random", 128, dtype, sizes=(1, 2, 2, 64, 32))
    out, _ = kda_chunk(*inputs.values(), backend="native")
    lent = {x.data_ptr() for x in inputs.values()}
    return sum(x.nbytes for x in out.grad_fn.saved_tensors if x.data_ptr() not in lent)


def test_what_is_kept_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing without gradients; half of the memories, deltas and reads where products round."""
    chunks, heads, K, V, C = 2, 2, 64, 32, 64
    rounded, system = K * V + C * V + C * C, C * C
    rounds = native_kda._library().kda_rounds(1, C)
    assert kept_bytes(torch.float32) == chunks * heads * 4 * (rounded + system)
    size = 2 if rounds else 4
    assert kept_bytes(torch.bfloat16) == chunks * heads * (size * rounded + 4 * system)
    monkeypatch.setattr(native_kda, "_set_saved", None)  # not callable
    inputs = kda_inputs("random", 20, torch.float32)
    with torch.no_grad():
        kda_chunk(*inputs.values(), backend="native")


@pytest.mark.parametrize("sizes", SIZES)
def test_any_shape(sizes: tuple[int, int, int, int, int]) -> None:
    inputs = kda_inputs("mixed_decay", 150, torch.float32, sizes=sizes)
    assert_same(native(inputs), exact(inputs), 2e-5)  # a chain without near cancellation


@pytest.mark.parametrize("chunk_size", [1, 16, 50, 64, 128, 1000])
def test_chunk_size_changes_nothing(chunk_size: int) -> None:
    inputs = kda_inputs("erasing", 277, torch.float32)
    assert_same(native(inputs, chunk_size=chunk_size), exact(inputs), 1e-4)


@pytest.mark.parametrize("lengths", [(5,), (1, 64, 0, 17), (130, 3, 65, 64, 1), (0, 9)])
def test_packed_sequences_do_not_meet(lengths: tuple[int, ...]) -> None:
    sizes = (1, H, 2 * H, K, V)
    inputs = kda_inputs("erasing", sum(lengths), torch.float32, sequences=len(lengths), sizes=sizes)
    borders = torch.tensor([0, *lengths]).cumsum(0)
    expected = exact(inputs, cu_seqlens=borders)
    assert_same(native(inputs, cu_seqlens=borders), expected, 1e-4)


def assert_relative(got, expected, limit: float) -> None:
    for name, want in expected.items():
        error = (got[name].double() - want).norm() / want.norm().clamp(min=1e-3)
        assert error < limit, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("sizes", [(2, 3, 6, 20, 33), (1, 2, 2, 64, 64)])
@pytest.mark.parametrize("regime", REGIMES)
def test_bf16(regime: str, sizes: tuple[int, int, int, int, int]) -> None:
    inputs = kda_inputs(regime, 200, torch.bfloat16, sizes=sizes)
    got = native(inputs)
    assert got["out"].dtype == torch.bfloat16
    assert got["memory"].dtype == torch.float32
    assert got["d_q"].dtype == torch.bfloat16
    # Where there are tiles for it, products round their operands to bf16, 2^-9 each: measured
    # relative RMS errors are 2e-3 to 6e-3. Correlated keys at beta 1 or 2 make chains of nearly
    # cancelling corrections, which multiply that (3e-2 measured at beta 2 over 200 tokens).
    limit = 2**-4 if regime in ("correlated_slow", "negative_eigenvalues") else 2**-6
    assert_relative(got, exact(inputs), limit)


@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 16, 16), (1, 2, 2, 32, 32), (1, 1, 2, 48, 16)])
def test_chunk_size_changes_nothing_in_bf16(chunk_size: int, sizes: tuple[int, ...]) -> None:
    """Operands whose terms are filled up to a tile, and a short last chunk."""
    inputs = kda_inputs("random", 149, torch.bfloat16, sizes=sizes)
    assert_relative(native(inputs, chunk_size=chunk_size), exact(inputs), 2**-6)  # as above


@pytest.mark.parametrize("lengths", [(5,), (1, 64, 0, 17), (130, 3, 65, 64, 1), (0, 9)])
def test_packed_sequences_do_not_meet_in_bf16(lengths: tuple[int, ...]) -> None:
    sizes = (1, 2, 4, 40, 72)  # no multiples of a tile, and two value heads to a head
    inputs = kda_inputs(
        "erasing", sum(lengths), torch.bfloat16, sequences=len(lengths), sizes=sizes
    )
    borders = torch.tensor([0, *lengths]).cumsum(0)
    expected = exact(inputs, cu_seqlens=borders)
    assert_relative(native(inputs, cu_seqlens=borders), expected, 2**-6)  # as above


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_longer_than_the_caches(dtype: torch.dtype) -> None:
    """More than a megabyte of answers is stored past them."""
    inputs = kda_inputs("random", 1100, dtype, sizes=(1, 2, 2, 16, 128))
    limit = 1e-4 if dtype == torch.float32 else 2**-6  # as above
    assert_relative(native(inputs), exact(inputs), limit)


def test_long_rows_that_begin_on_no_line() -> None:
    inputs = kda_inputs("random", 1500, torch.bfloat16, sizes=(1, 2, 6, 40, 33))
    assert_relative(native(inputs), exact(inputs), 2**-6)  # as above


def test_values_alone_in_bf16() -> None:
    """Rounded products of queries, keys and decays that came in fp32."""
    inputs = kda_inputs("mixed_decay", 150, torch.float32, sizes=(1, 2, 2, 33, 48))
    inputs["v"] = inputs["v"].detach().bfloat16().requires_grad_()
    got = native(inputs)
    assert (got["d_q"].dtype, got["d_v"].dtype) == (torch.float32, torch.bfloat16)
    assert_relative(got, exact(inputs), 2**-6)  # as above


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_change_no_answer(dtype: torch.dtype) -> None:
    """What is kept for the backward pass lies elsewhere than what is not."""
    inputs = kda_inputs("mixed_decay", 150, dtype)
    with torch.no_grad():
        alone = kda_chunk(*inputs.values(), backend="native")
    kept = kda_chunk(*inputs.values(), backend="native")
    assert all(torch.equal(a, b) for a, b in zip(alone, kept, strict=True))


def test_strided_inputs_are_read_in_place() -> None:
    inputs = kda_inputs("mixed_decay", 70, torch.float32, sizes=(2, 3, 3, 5, 5))
    memory = inputs.pop("memory")
    together = torch.cat([inputs[n].detach() for n in ("q", "k", "v")], dim=-1).requires_grad_()
    q, k, v = together.split(5, dim=-1)
    assert not q.is_contiguous()
    out, _ = kda_chunk(q, k, v, inputs["log_decay"], inputs["beta"], memory, backend="native")
    expected, _ = kda_chunk(*inputs.values(), memory, backend="native")
    assert torch.equal(out, expected)
    out.sum().backward()  # type: ignore[no-untyped-call]
    expected.sum().backward()
    grads = torch.cat([inputs[n].grad for n in ("q", "k", "v")], dim=-1)
    assert torch.equal(together.grad, grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    inputs = kda_inputs("mixed_decay", 200, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(native(inputs))
    finally:
        torch.set_num_threads(before)
    for name, want in results[0].items():
        assert all(torch.equal(other[name], want) for other in results[1:]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_is_not_hidden(dtype: torch.dtype) -> None:
    """And stays in its head, though heads take turns in one room."""
    inputs = {n: x.detach() for n, x in kda_inputs("random", 40, dtype, sizes=SIZES[0]).items()}
    sound, _ = kda_chunk(*inputs.values(), backend="native")
    for name in ("q", "k", "v", "log_decay", "beta", "memory"):
        spoiled = {**inputs, name: inputs[name].clone()}
        first = spoiled[name][0, 0] if name == "memory" else spoiled[name][0, 0, 0]
        first.fill_(torch.nan)
        out, memory = kda_chunk(*spoiled.values(), backend="native")
        assert out.isnan().any() or memory.isnan().any(), name
        assert torch.equal(out[:, :, -1], sound[:, :, -1]), name


def test_it_is_the_default_in_fp32() -> None:
    assert select("kda", "auto", "cpu", torch.float32) is select(
        "kda", "native", "cpu", torch.float32
    )


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("sizes", SIZES)
def test_token_by_token_is_the_recurrence(
    regime: str, sizes: tuple[int, int, int, int, int]
) -> None:
    inputs = {n: x.detach() for n, x in kda_inputs(regime, 20, torch.float32, sizes=sizes).items()}
    wide = [x.double() for x in inputs.values()]
    got = dict(
        zip(("out", "memory"), kda_recurrent(*inputs.values(), backend="native"), strict=True)
    )
    want = dict(zip(("out", "memory"), kda_recurrent(*wide, backend="reference"), strict=True))
    assert_same(got, want, 1e-5)  # twenty steps of fp32 rounding


def test_token_by_token_packed_and_unmodified() -> None:
    lengths = (3, 0, 40, 1)
    inputs = kda_inputs(
        "erasing", sum(lengths), torch.float32, sequences=4, sizes=(1, H, 2 * H, K, V)
    )
    tensors = [x.detach() for x in inputs.values()]
    memory = tensors[-1].clone()
    borders = torch.tensor([0, *lengths]).cumsum(0)
    got = kda_recurrent(*tensors, cu_seqlens=borders, backend="native")
    want = kda_recurrent(*tensors, cu_seqlens=borders, backend="reference")
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert torch.equal(tensors[-1], memory)
