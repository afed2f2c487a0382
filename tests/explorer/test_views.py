"""What each view shows as numbers, against the arrays and what follows from them."""

import json
from typing import Any

import numpy as np
import pytest

from deltamoe.errors import ConfigError, DataError
from deltamoe.explorer import Capture, Trace, derive, trace
from deltamoe.explorer.views import VIEWS, show
from deltamoe.model import HybridLM
from deltamoe.tokenizer import ByteTokenizer
from tests.explorer.conftest import PROMPT


@pytest.mark.parametrize("name", VIEWS)
def test_every_view_is_plain_json(recorded: Trace, name: str) -> None:
    found = show(recorded, name, token=-1)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["view"] == name
    assert set(VIEWS[name].depends) <= set(found)


def test_the_memory(recorded: Trace) -> None:
    found = show(recorded, "memory", layer=1, head=3, token=9)
    np.testing.assert_allclose(found["memory"], derive.memory(recorded, 1, 9)[3], rtol=1e-5)
    np.testing.assert_allclose(
        found["change"], derive.memory_change(recorded, 1, 9)[3], rtol=1e-4, atol=1e-7
    )
    np.testing.assert_allclose(found["recall"], derive.recall(recorded, 1, 9)[:, 3], rtol=1e-4)
    np.testing.assert_allclose(found["retention"], derive.retention(recorded, 1, 9)[:, 3])
    # r and delta by their definitions: M_t = decay M_(t-1) + k delta^T
    key = recorded.array("kda.key", 1)[9, 1]  # two value heads a key head
    decay = np.exp(recorded.array("kda.log_decay", 1)[9, 3])
    before = np.array(found["memory"]) - np.array(found["change"])
    recalled = key @ (decay[:, None] * before)
    # fp32 against sums in another order, of numbers that partly cancel
    np.testing.assert_allclose(found["recalled"], recalled, rtol=1e-3, atol=1e-5)
    delta = found["beta"] * (np.array(found["value"]) - recalled)
    np.testing.assert_allclose(found["delta"], delta, rtol=1e-3, atol=1e-5)
    assert found["memory_norm"] == pytest.approx(found["memory_norms"][9][3], rel=1e-4)
    assert found["change_norm"] == pytest.approx(found["change_norms"][9][3], rel=1e-3)


def test_the_answer_is_what_the_output_norm_was_given(recorded: Trace, model: HybridLM) -> None:
    normed = recorded.array("kda.answer_normed", 1)[9, 3]
    answer = np.array(show(recorded, "memory", layer=1, head=3, token=9)["answer"])
    weight = model.blocks[1].get_parameter("mixer.output_norm.weight").detach().numpy()
    eps = model.config.norm_eps
    expected = answer / np.sqrt((answer**2).mean() + eps) * weight
    np.testing.assert_allclose(normed, expected, rtol=1e-3, atol=1e-5)


def test_decay(recorded: Trace) -> None:
    found = show(recorded, "decay", layer=0, head=2)
    np.testing.assert_allclose(found["half_life"], recorded.array("kda.half_life", 0), rtol=1e-6)
    np.testing.assert_array_equal(found["beta"], recorded.array("kda.beta", 0))
    channels = -np.log(2) / recorded.array("kda.log_decay", 0)[:, 2]
    np.testing.assert_allclose(found["channel_half_life"], channels, rtol=1e-5)


def test_attention(recorded: Trace) -> None:
    found = show(recorded, "attention", head=1, token=9)
    assert found["layer"] == 3
    heads = derive.attention(recorded, 3, token=9)
    np.testing.assert_array_equal(found["heads"], heads[:, :10])
    assert [len(row) for row in found["map"]] == list(range(1, recorded.num_tokens + 1))
    # a row alone and in its map are products of other shapes
    np.testing.assert_allclose(found["map"][9], found["heads"][1], rtol=1e-5, atol=1e-8)


def test_sparse_activation(recorded: Trace) -> None:
    found = show(recorded, "sparse", layer=2, token=5)
    order = np.argsort(found["ranks"])
    assert order[: len(found["chosen"])].tolist() == found["chosen"]
    assert found["scores_with_bias"] == sorted_by(found["scores_with_bias"], order)
    scale = recorded.config.moe.routed_scale if recorded.config.moe else None
    assert found["sum_of_weights"] == pytest.approx(scale, rel=1e-6)
    answers = recorded.array("experts.answers", 2)[5]
    np.testing.assert_allclose(found["answer_norms"], np.linalg.norm(answers, axis=-1), rtol=1e-5)


def sorted_by(scores: list[float], order: Any) -> list[float]:
    """The scores, if their order is this one; else what they would be."""
    falling = sorted(scores, reverse=True)
    return [falling[place] for place in np.argsort(order)]


def test_experts_and_their_load(recorded: Trace) -> None:
    chosen = np.array(show(recorded, "experts", layer=1)["chosen"])
    found = show(recorded, "load")
    at = found["layers"].index(1)
    assert found["counts"][at] == np.bincount(chosen.ravel(), minlength=5).tolist()
    share = np.array(found["counts"][at]) / sum(found["counts"][at])
    assert found["fair_share"] == recorded.num_tokens * 2 / 5
    assert found["max_vio"][at] == pytest.approx(share.max() * 5 - 1)
    assert found["dormant_experts"][at] == (share == 0).sum()
    entropy = -sum(p * np.log(p) for p in share if p)
    assert found["entropy"][at] == pytest.approx(entropy)
    assert found["evenness"][at] == pytest.approx(entropy / np.log(5))


def test_the_next_token(recorded: Trace) -> None:
    found = show(recorded, "next", token=4)
    assert found["came"]["id"] == recorded.arrays["tokens.ids"][5]
    rank, probability = found["came"]["rank"], found["came"]["probability"]
    chances = [candidate["probability"] for candidate in found["candidates"]]
    assert chances == sorted(chances, reverse=True)
    if rank <= len(chances):
        assert chances[rank - 1] == pytest.approx(probability, rel=1e-5)
    assert found["all_others"] == pytest.approx(1 - sum(chances), abs=1e-6)
    assert [row["layer"] for row in found["lens"]] == [0, 1, 2, 3]
    assert show(recorded, "next", token=-1)["came"] is None


def test_state_and_cache_cross(recorded: Trace) -> None:
    found = show(recorded, "state")
    assert found["crossover_tokens"] == recorded.summary["model"]["crossover_tokens"]
    assert found["curve"]["tokens"][-1] == 2 * found["crossover_tokens"]
    assert (
        found["curve"]["growing"][50]
        == found["crossover_tokens"] * (found["cache_bytes_per_token"])
    )
    assert found["now"] == recorded.summary["bytes"]


def test_tokens_are_coloured_by_the_nearest_layer(recorded: Trace) -> None:
    found = show(recorded, "tokens", layer=3)
    assert found["first_expert"]["layer"] == 3
    assert found["half_life"]["layer"] == found["memory_change"]["layer"] == 2
    decay = recorded.array("kda.decay_mean", 2).mean(axis=1)
    np.testing.assert_allclose(found["half_life"]["values"], -np.log(2) / decay, rtol=1e-5)


def test_the_boxes_of_a_block(recorded: Trace) -> None:
    boxes = show(recorded, "block", layer=1, head=3, token=9)["boxes"]
    assert boxes["kda.key"]["values"] == recorded.array("kda.key", 1)[9, 1].tolist()
    assert boxes["kda.beta"] == {
        "axes": [],
        "unit": "fraction",
        "values": pytest.approx(float(recorded.array("kda.beta", 1)[9, 3])),
    }
    assert boxes["experts.answers"]["axes"] == ["choice", "width"]
    assert "mla.key" not in boxes
    assert "mlp.gate" in show(recorded, "block", layer=0)["boxes"]


def test_a_short_recording_shows_what_it_has(model: HybridLM) -> None:
    short = trace(model, ByteTokenizer(), PROMPT, capture=Capture(layers=(), has_lens=False))
    assert "memory" not in show(short, "memory")
    assert "channel_half_life" not in show(short, "decay")
    assert "scores" not in show(short, "sparse")
    assert "lens" not in show(short, "next")
    with pytest.raises(DataError, match="record"):
        show(short, "attention")


def test_what_is_not_there_is_said(recorded: Trace) -> None:
    with pytest.raises(ConfigError, match="the views are tokens, block"):
        show(recorded, "memori")
    for place, words in (
        ({"layer": 3}, "not recorded for layer 3"),
        ({"layer": 4}, "4, counted from 0"),
        ({"layer": -1}, "counted from 0"),
        ({"head": 4}, "head = 4"),
        ({"token": 99}, "tokens, counted from 0"),
        ({"token": -99}, "tokens, counted from 0"),
    ):
        with pytest.raises(DataError, match=words):
            show(recorded, "memory", **place)
