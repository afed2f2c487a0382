"""What follows from a trace, against the definitions in ``ops``."""

import numpy as np
import pytest
import torch

from deltamoe.errors import DataError
from deltamoe.explorer import Trace, derive
from deltamoe.ops.kda import kda_recurrent
from deltamoe.ops.mla import attend_absorbed


def recurrent_memory(trace: Trace, layer: int, token: int) -> torch.Tensor:
    q, k, v, log_decay, beta = (
        torch.tensor(trace.array(f"kda.{name}", layer))[None, : token + 1].double()
        for name in ("query", "key", "value", "log_decay", "beta")
    )
    return kda_recurrent(q, k, v, log_decay, beta, backend="reference")[1][0]


@pytest.mark.parametrize(("layer", "token"), [(0, 0), (1, 7), (2, 20)])
def test_memory_is_the_recurrence(recorded: Trace, layer: int, token: int) -> None:
    expected = recurrent_memory(recorded, layer, token)
    # fp32 NumPy against fp64: rounding of at most 21 steps
    np.testing.assert_allclose(
        derive.memory(recorded, layer, token), expected, rtol=1e-4, atol=1e-5
    )
    before = recurrent_memory(recorded, layer, token - 1) if token else 0.0
    np.testing.assert_allclose(
        derive.memory_change(recorded, layer, token), expected - before, rtol=1e-3, atol=1e-5
    )


def test_norms_of_the_trace_are_those_of_the_memories(recorded: Trace) -> None:
    memories = [step.after for step in derive.steps(recorded, 1)]
    norms = np.sqrt(np.square(memories).sum(axis=(2, 3)))
    np.testing.assert_allclose(recorded.array("kda.memory_norm", 1), norms, rtol=1e-4)
    changes = np.diff(np.concatenate([np.zeros_like(memories[:1]), memories]), axis=0)
    np.testing.assert_allclose(
        recorded.array("kda.change_norm", 1),
        np.sqrt(np.square(changes).sum(axis=(2, 3))),
        rtol=1e-3,
    )


def test_recall_asks_later_memories(recorded: Trace) -> None:
    token, layer = 5, 1
    found = derive.recall(recorded, layer, token)
    assert found.shape == (recorded.num_tokens - token, 4)
    key = recorded.array("kda.key", layer)[token].repeat(2, axis=0)  # two value heads a key head
    value = recorded.array("kda.value", layer)[token]
    later = recurrent_memory(recorded, layer, token + 4).numpy()
    expected = np.einsum("hk,hkv,hv->h", key, later, value) / (value**2).sum(-1)
    np.testing.assert_allclose(found[4], expected, rtol=1e-3, atol=1e-5)


def test_recall_of_a_full_write_is_whole() -> None:
    """With beta 1 and no decay a key brings back its value, until another takes its place."""
    key = np.zeros((3, 1, 4), np.float32)
    key[0, 0, 0] = key[1, 0, 1] = key[2, 0, 0] = 1.0
    value = np.arange(9, dtype=np.float32).reshape(3, 1, 3) + 1
    value[2] = -value[0]
    arrays = {
        "kda.key": key[None],
        "kda.value": value[None],
        "kda.log_decay": np.zeros((1, 3, 1, 4), np.float32),
        "kda.beta": np.ones((1, 3, 1), np.float32),
    }
    summary = {
        "num_tokens": 3,
        "arrays": [{"name": name, "layers": [0]} for name in arrays],
        "left_out": [],
    }
    trace = Trace(summary, arrays)
    np.testing.assert_allclose(derive.recall(trace, 0, 0)[:, 0], [1.0, 1.0, -1.0])
    np.testing.assert_allclose(derive.retention(trace, 0, 0)[:, 0], 1.0)


def test_one_head_alone_is_the_same(recorded: Trace) -> None:
    for derived in (derive.memory, derive.memory_change):
        whole, one = derived(recorded, 1, 7), derived(recorded, 1, 7, 3)
        np.testing.assert_allclose(one[0], whole[3], rtol=1e-5, atol=1e-7)
    for later in (derive.recall, derive.retention):
        whole, one = later(recorded, 1, 7), later(recorded, 1, 7, 3)
        np.testing.assert_allclose(one[:, 0], whole[:, 3], rtol=1e-5, atol=1e-7)
    with pytest.raises(DataError, match="4, counted from 0"):
        derive.memory(recorded, 1, 7, 4)


def test_half_lives_have_an_end() -> None:
    found = derive.half_life(np.array([-np.log(2), -0.0, 0.0, -1e30], np.float32))
    np.testing.assert_allclose(found, [1.0, 1e9, 1e9, 0.0], atol=1e-20)


def test_retention_is_what_decay_leaves(recorded: Trace) -> None:
    found = derive.retention(recorded, 0, 3)
    np.testing.assert_allclose(found[0], 1.0, rtol=1e-5)
    assert (np.diff(found, axis=0) <= 1e-7).all()
    decay = np.exp(recorded.array("kda.log_decay", 0)[4:7].astype(np.float64)).prod(axis=0)
    key = recorded.array("kda.key", 0)[3].repeat(2, axis=0)
    np.testing.assert_allclose(found[3], (decay * key**2).sum(-1), rtol=1e-4, atol=1e-7)


def test_attention_rows_are_distributions(recorded: Trace) -> None:
    whole = derive.attention(recorded, 3, head=1)
    np.testing.assert_allclose(whole.sum(-1), 1.0, rtol=1e-5)
    assert (np.triu(whole, 1) == 0).all()
    # a row alone and in its map are products of other shapes: NumPy may round them differently
    row = derive.attention(recorded, 3, token=9)[1]
    np.testing.assert_allclose(row, whole[9], rtol=1e-5, atol=1e-8)
    row = derive.attention(recorded, 3, head=1, token=9)
    np.testing.assert_allclose(row, whole[9], rtol=1e-5, atol=1e-8)


def test_attention_is_that_of_the_operator(recorded: Trace) -> None:
    """With sources that are one-hot, the operator's answers are the weights themselves."""
    query, key = (torch.tensor(recorded.array(f"mla.{name}", 3)) for name in ("query", "key"))
    time, heads, width = query.shape
    for head in range(heads):
        # K keys as the latent of width K, through an identity; the values are the places
        out = attend_absorbed(
            query[None, :, head : head + 1],
            query.new_zeros(1, time, 1, 0),
            torch.cat([key[:, head], torch.eye(time)], dim=-1)[None],
            query.new_zeros(1, time, 0),
            torch.eye(width, width + time)[None],
            torch.cat([torch.zeros(time, width), torch.eye(time)], dim=-1)[None],
        )
        np.testing.assert_allclose(
            derive.attention(recorded, 3, head=head), out[0, :, 0], rtol=1e-4, atol=1e-6
        )


def test_what_is_not_there_is_said(recorded: Trace) -> None:
    last = recorded.num_tokens
    for derived in (derive.memory, derive.memory_change, derive.recall, derive.retention):
        with pytest.raises(DataError, match=f"{last} tokens"):
            derived(recorded, 0, last)
        with pytest.raises(DataError, match="not recorded for layer 3"):
            derived(recorded, 3, 0)
    with pytest.raises(DataError, match="name a head"):
        derive.attention(recorded, 3)
    with pytest.raises(DataError, match="3, counted from 0"):
        derive.attention(recorded, 3, head=3)
