"""The same text gives the same logits, however it is read.

One shot = pieces = token by token = batched with neighbours = padded = packed = after the state was
copied. In fp64 to 1e-9: what differs is only the order of sums.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deltamoe.model import HybridLM
from deltamoe.testing import tiny_config, tiny_model

T = 70  # more than one chunk of 64

_base = tiny_config()
MODELS = {
    "hybrid": {},
    "kda alone": {"mla_every": 0},
    "mla alone": {"mla_every": 1},
    "mla first": {"mixers": ("mla", "kda", "mla", "kda")},
    "dense": {"first_dense_layers": 4},
    "no convolution": {"kda": replace(_base.kda, conv_size=0)},
    "no output gate": {"kda": replace(_base.kda, output_gate="none")},
    "swish output gate": {"kda": replace(_base.kda, output_gate="swish")},
    "bounded decay": {"kda": replace(_base.kda, decay="bounded")},
    "beta to 2": {"kda": replace(_base.kda, max_beta=2.0)},
    "rope": {"mla": replace(_base.mla, has_rope=True)},
    "query rank": {"mla": replace(_base.mla, query_rank=11)},
    "no rope channels": {"mla": replace(_base.mla, rope_dim=0)},
    "softmax router": {"moe": replace(_base.moe, scoring="softmax", has_balance_bias=False)},
    "classic experts": {
        "moe": replace(_base.moe, scoring="topk_softmax", expert="ffn", num_shared_experts=0)
    },
    "tied": {"tie_embeddings": True},
}


@pytest.fixture(params=MODELS, scope="module")
def model(request: pytest.FixtureRequest) -> HybridLM:
    return tiny_model(torch.float64, **MODELS[request.param])


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 257, (3, T), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def read(model: HybridLM, ids: Tensor, cuts: list[int], state=None) -> tuple[Tensor, object]:
    pieces = []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        logits, state = model(ids[:, start:stop], state)
        pieces.append(logits)
    return torch.cat(pieces, dim=1), state


def assert_equal(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "cuts",
    [list(range(3, T, 3)), [16, 32, 48, 64], [64], [1, 2, 3, 4, 40, *range(62, T)]],
    ids=["threes", "sixteens", "one chunk", "single tokens at the start and across a chunk's end"],
)
def test_pieces(model: HybridLM, ids: Tensor, cuts: list[int]) -> None:
    whole, final = model(ids)
    got, state = read(model, ids, cuts)
    assert_equal(got, whole)
    for a, b in zip(state.tensors(), final.tensors(), strict=True):
        assert_equal(a, b)
    assert state.lengths.tolist() == [T] * 3


def test_token_by_token(ids: Tensor) -> None:
    model = tiny_model(torch.float64)
    got, _ = read(model, ids, list(range(1, T)))
    assert_equal(got, model(ids)[0])


def test_neighbours(model: HybridLM, ids: Tensor) -> None:
    together, _ = model(ids)
    for row in range(3):
        alone, _ = model(ids[row : row + 1])
        assert_equal(together[row], alone[0])


def test_padding_and_what_follows_it(model: HybridLM, ids: Tensor) -> None:
    lengths = torch.tensor([T, 65, 1])
    padded, state = model(ids, lengths=lengths)
    assert state.lengths.tolist() == lengths.tolist()
    more = torch.tensor([2, 5, 3])
    tail = ids[:, :5]
    then, state = model(tail, state, lengths=more)
    last, _ = model(ids[:, :1], state)  # a step of decoding on rows of unequal length
    for row in range(3):
        n, m = int(lengths[row]), int(more[row])
        text = torch.cat([ids[row, :n], tail[row, :m], ids[row, :1]])
        alone, _ = model(text[None])
        assert_equal(padded[row, :n], alone[0, :n])
        assert_equal(then[row, :m], alone[0, n : n + m])
        assert_equal(last[row, 0], alone[0, -1])


def test_packed(model: HybridLM, ids: Tensor) -> None:
    lengths = [T, 13, 1]
    packed = torch.cat([ids[row, :n] for row, n in enumerate(lengths)])[None]
    borders = torch.tensor([0, *lengths]).cumsum(0)
    out = model.hidden(packed, cu_seqlens=borders)
    assert out.state is None
    logits = model.logits(out.hidden)
    for row, n in enumerate(lengths):
        alone, _ = model(ids[row : row + 1, :n])
        assert_equal(logits[0, borders[row] : borders[row + 1]], alone[0])


def test_selected_rows(model: HybridLM, ids: Tensor) -> None:
    lengths = torch.tensor([T, 20, 4])
    _, state = model(ids, lengths=lengths)
    rows = torch.tensor([2, 0, 2])
    got, _ = model(ids[:, :2], state.select(rows))
    for place, row in enumerate(rows.tolist()):
        text = torch.cat([ids[row, : lengths[row]], ids[place, :2]])[None]
        alone, _ = model(text)
        assert_equal(got[place], alone[0, -2:])


def test_a_state_is_a_value(model: HybridLM, ids: Tensor) -> None:
    _, state = model(ids[:, :20])
    copies = [x.clone() for x in state.tensors()]
    first, _ = model(ids[:, 20:], state)
    for x, copy in zip(state.tensors(), copies, strict=True):
        assert torch.equal(x, copy)
    second, _ = model(ids[:, 20:], state)
    assert torch.equal(first, second)


def test_the_empty_state_is_no_state(model: HybridLM, ids: Tensor) -> None:
    assert_equal(model(ids, model.initial_state(3))[0], model(ids)[0])


def test_causality(model: HybridLM, ids: Tensor) -> None:
    whole, _ = model(ids)
    changed = ids.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 257
    other, _ = model(changed)
    assert_equal(other[:, :40], whole[:, :40])
    assert not torch.allclose(other[:, 40:], whole[:, 40:])


@pytest.mark.parametrize(
    # fp32 rounds at 6e-8 and the tiny model's large random weights multiply that by about 1e3
    ("dtype", "tolerance"),
    [(torch.float32, 1e-4)],
)
def test_pieces_in_fp32(ids: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_model(dtype)
    whole, _ = model(ids)
    got, _ = read(model, ids, [1, 2, 3, 20])
    torch.testing.assert_close(got, whole, rtol=0, atol=tolerance)


def test_four_thousand_tokens_keep_the_state_finite_and_true() -> None:
    """Decoding far beyond any chunk equals reading in one go."""
    model = tiny_model(torch.float32, mla_every=0)
    ids = torch.randint(0, 257, (1, 4000), generator=torch.Generator().manual_seed(6))
    _, state = model(ids[:, :-20])
    got, state = read(model, ids[:, -20:], list(range(1, 20)), state)
    whole, _ = model(ids)
    assert all(x.isfinite().all() for x in state.tensors())
    torch.testing.assert_close(got, whole[:, -20:], rtol=0, atol=1e-4)  # fp32, as above
