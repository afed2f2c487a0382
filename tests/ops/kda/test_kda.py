"""Every KDA backend is the recurrence: outputs, final memory and every gradient."""

import pytest
import torch

from deltamoe.errors import BackendUnavailableError
from deltamoe.ops.backend import BACKENDS, select
from deltamoe.ops.kda import kda_chunk, kda_recurrent
from tests.ops.kda.inputs import REGIMES, H, K, V, assert_same, kda_inputs, outputs_and_gradients

# fp64 proves the algebra, so these run on the CPU; the CUDA kernels are held to the same
# definition in test_fla.py.
BACKEND_NAMES = [b.name for b in BACKENDS["kda"] if b.why_not("cpu", torch.float64) is None]


@pytest.fixture(params=BACKEND_NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def definition(inputs, **options):
    return outputs_and_gradients(
        lambda *a, **o: kda_recurrent(*a, backend="reference", **o), inputs, **options
    )


def chunked(backend, inputs, **options):
    return outputs_and_gradients(
        lambda *a, **o: kda_chunk(*a, backend=backend, **o), inputs, **options
    )


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 64, 65, 131])
def test_chunk_is_the_recurrence(backend: str, regime: str, T: int) -> None:
    inputs = kda_inputs(regime, T)
    # fp64 against fp64: what is left is rounding; 1e-9 proves the algebra
    assert_same(chunked(backend, inputs), definition(inputs), 1e-9)


@pytest.mark.parametrize("T", [200, 300])
def test_long_sequences(backend: str, T: int) -> None:
    inputs = kda_inputs("mixed_decay", T)
    assert_same(chunked(backend, inputs), definition(inputs), 1e-9)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 50, 64, 128])
def test_chunk_size_changes_nothing(backend: str, chunk_size: int) -> None:
    inputs = kda_inputs("correlated_slow", 77)
    assert_same(chunked(backend, inputs, chunk_size=chunk_size), definition(inputs), 1e-9)


@pytest.mark.parametrize("regime", REGIMES)
def test_fp32(backend: str, regime: str) -> None:
    inputs = kda_inputs(regime, 130, torch.float32)
    exact = definition({n: x.detach().double().requires_grad_() for n, x in inputs.items()})
    # fp32 rounds at 6e-8. Correlated keys with beta at 1 or 2 make a long chain of nearly
    # cancelling corrections, which multiplies that by the length of the chain: 130 steps.
    assert_same(chunked(backend, inputs), exact, 1e-4)


@pytest.mark.parametrize("regime", ["random", "mixed_decay", "correlated_slow"])
def test_bf16(backend: str, regime: str) -> None:
    inputs = kda_inputs(regime, 100, torch.bfloat16)
    exact = definition({n: x.detach().double().requires_grad_() for n, x in inputs.items()})
    got = chunked(backend, inputs)
    assert got["out"].dtype == torch.bfloat16
    assert got["memory"].dtype == torch.float32
    # the inputs are exact in both; only results are rounded to bf16, at 2^-9 of each entry
    assert_same(got, exact, 2**-8)


@pytest.mark.parametrize("lengths", [(5,), (1, 64, 0, 17), (130, 3, 65, 64, 1), (0, 0), (0, 9)])
def test_packed_sequences_do_not_meet(backend: str, lengths: tuple[int, ...]) -> None:
    inputs = kda_inputs("erasing", sum(lengths), sequences=len(lengths), sizes=(1, H, 2 * H, K, V))
    borders = torch.tensor([0, *lengths]).cumsum(0)
    packed = chunked(backend, inputs, cu_seqlens=borders)
    assert_same(packed, definition(inputs, cu_seqlens=borders), 1e-9)
    alone = []
    for n in range(len(lengths)):
        span = slice(int(borders[n]), int(borders[n + 1]))
        piece = {name: x.detach()[:, span] for name, x in inputs.items() if name != "memory"}
        alone.append(kda_recurrent(*piece.values(), inputs["memory"].detach()[n : n + 1]))
    torch.testing.assert_close(
        packed["out"], torch.cat([o for o, _ in alone], 1), rtol=0, atol=1e-9
    )
    torch.testing.assert_close(
        packed["memory"], torch.cat([m for _, m in alone]), rtol=0, atol=1e-9
    )


def test_a_sequence_may_be_cut_anywhere(backend: str) -> None:
    inputs = {name: x.detach() for name, x in kda_inputs("correlated_slow", 90).items()}
    memory = inputs.pop("memory")
    whole, final = kda_chunk(*inputs.values(), memory, backend=backend)
    for cut in (1, 37, 64, 89):
        head, between = kda_chunk(*(x[:, :cut] for x in inputs.values()), memory, backend=backend)
        tail, end = kda_recurrent(*(x[:, cut:] for x in inputs.values()), between, backend=backend)
        torch.testing.assert_close(torch.cat([head, tail], 1), whole, rtol=0, atol=1e-9)
        torch.testing.assert_close(end, final, rtol=0, atol=1e-9)


def test_no_token_leaves_the_memory_alone(backend: str) -> None:
    inputs = {name: x.detach() for name, x in kda_inputs("random", 3).items()}
    memory = inputs.pop("memory")
    for run in (kda_chunk, kda_recurrent):
        out, after = run(*(x[:, :0] for x in inputs.values()), memory, backend=backend)
        assert out.shape[1] == 0
        assert torch.equal(after, memory)


def test_no_memory_means_zeros(backend: str) -> None:
    inputs = {name: x.detach() for name, x in kda_inputs("random", 20).items()}
    memory = inputs.pop("memory")
    out, after = kda_chunk(*inputs.values(), backend=backend)
    zeros, expected = kda_chunk(*inputs.values(), memory * 0, backend=backend)
    assert torch.equal(out, zeros)
    assert torch.equal(after, expected)


def test_the_given_memory_is_not_modified(backend: str) -> None:
    inputs = kda_inputs("random", 20)
    before = inputs["memory"].detach().clone()
    kda_chunk(*inputs.values(), backend=backend)
    assert torch.equal(inputs["memory"].detach(), before)


def test_a_later_token_changes_nothing_before_it(backend: str) -> None:
    inputs = {name: x.detach() for name, x in kda_inputs("mixed_decay", 100).items()}
    out, _ = kda_chunk(*inputs.values(), backend=backend)
    for t in (1, 31, 64, 99):
        changed = {n: x.clone() for n, x in inputs.items()}
        for name in ("q", "k", "v", "beta"):
            changed[name][:, t] *= -0.5
        changed["log_decay"][:, t] = -3.0
        other, _ = kda_chunk(*changed.values(), backend=backend)
        assert torch.equal(other[:, :t], out[:, :t])


def test_gradients_against_finite_differences(backend: str) -> None:
    inputs = kda_inputs("random", 9, sizes=(1, 1, 2, 3, 2))
    assert torch.autograd.gradcheck(
        lambda *a: kda_chunk(*a, chunk_size=4, backend=backend), tuple(inputs.values())
    )


def test_reductions_to_simpler_rules(backend: str) -> None:
    """No writing is pure decay; no decay is DeltaNet; one decay a head is Gated DeltaNet."""
    inputs = {name: x.detach() for name, x in kda_inputs("random", 30).items()}
    q, k, v, log_decay, beta, memory = inputs.values()
    _, after = kda_chunk(q, k, v, log_decay, beta * 0, memory, backend=backend)
    expected = memory * log_decay.sum(1).exp()[..., None]
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-9)

    one_decay = log_decay[..., :1].expand_as(log_decay)
    for decay in (one_decay * 0, one_decay):
        _, after = kda_chunk(q, k, v, decay, beta, memory, backend=backend)
        expected = memory
        keys = k.repeat_interleave(v.shape[2] // k.shape[2], dim=2)
        for t in range(30):  # S <- alpha S (I - beta k k^T) + beta k v^T, in the textbook's order
            expected = expected * decay[:, t, :, 0].exp()[..., None, None]
            kt, bt = keys[:, t], beta[:, t, :, None, None]
            outer = torch.einsum("bhk,bhl->bhkl", kt, kt)
            expected = expected - bt * outer @ expected
            expected = expected + bt * torch.einsum("bhk,bhv->bhkv", kt, v[:, t])
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-9)


def test_long_runs_stay_exact() -> None:
    """Four thousand tokens in fp32: the chunk form drifts no further than the recurrence."""
    inputs = kda_inputs("correlated_slow", 4000, torch.float32, sizes=(1, 1, 1, 16, 8))
    inputs = {name: x.detach() for name, x in inputs.items()}
    exact, _ = kda_chunk(*(x.double() for x in inputs.values()))
    by_chunk, _ = kda_chunk(*inputs.values())
    by_step, _ = kda_recurrent(*inputs.values())
    error = (by_chunk - exact).abs().max().item()
    assert error <= 4 * (by_step - exact).abs().max().item() + 1e-6


def test_fresh_memory_is_written_before_it_is_read(poisoned_memory: None) -> None:
    borders = torch.tensor([0, 3, 3, 70])
    inputs = kda_inputs("random", 70, sequences=3, sizes=(1, H, H, K, V))
    result = outputs_and_gradients(
        lambda *a, **o: kda_chunk(*a, backend="dyadic", **o), inputs, cu_seqlens=borders
    )
    assert all(x.isfinite().all() for x in result.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 9, 3, 4)}, "k has shape"),
        ({"beta": (2, 8, 6)}, "beta has shape"),
        ({"memory": (2, 6, 7, 5)}, "memory has shape"),
        ({"v": (2, 9, 4, 7)}, "multiple of q's 3"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict, message: str) -> None:
    inputs = {name: x.detach() for name, x in kda_inputs("random", 9).items()}
    inputs.update({name: torch.zeros(shape) for name, shape in change.items()})
    # beneath the shape-checked signature, so that the message is ours and not the checker's
    from deltamoe.ops.kda.shapes import check_shapes

    with pytest.raises(ValueError, match=message):
        check_shapes(*inputs.values(), None)


@pytest.mark.parametrize("borders", [[0, 5], [1, 9], [0, 7, 5, 9], [0]])
def test_borders_that_do_not_fit_are_refused(borders: list[int]) -> None:
    inputs = kda_inputs("random", 9, sizes=(1, H, H, K, V))
    memory = torch.zeros(max(len(borders) - 1, 1), H, K, V, dtype=torch.float64)
    del inputs["memory"]
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        kda_chunk(*inputs.values(), memory, cu_seqlens=torch.tensor(borders))


def test_a_backend_asked_for_by_name_is_never_replaced() -> None:
    inputs = kda_inputs("random", 3)
    with pytest.raises(BackendUnavailableError, match="known: fla, native, dyadic, reference"):
        kda_chunk(*inputs.values(), backend="fastest")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailableError, match="CUDA"):
            kda_chunk(*inputs.values(), backend="fla")
    assert select("kda", "auto", "cpu", torch.float64).__name__.endswith("dyadic")
