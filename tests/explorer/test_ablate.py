"""Parts switched off are off, and nothing else is."""

from typing import Any

import numpy as np
import pytest
import torch

from deltamoe.errors import ConfigError
from deltamoe.explorer.ablate import SwitchedOff, ablate, switched_off
from deltamoe.model import HybridLM, KdaState
from deltamoe.testing import tiny_model
from deltamoe.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
IDS = [256, *b"what is switched off"]


def off(**parts: Any) -> SwitchedOff:
    return SwitchedOff(**parts)


def test_nothing_off_changes_nothing(model: HybridLM) -> None:
    found = ablate(model, TOKENIZER, IDS, off())
    assert found["before"] == found["after"]
    assert found["divergence"] == 0.0
    assert found["by_token"]["divergence"] == [0.0] * len(IDS)


@pytest.mark.parametrize(
    "parts",
    [
        {"layers": (1,)},
        {"heads": ((0, 3),)},
        {"heads": ((3, 1),)},
        {"experts": ((1, 0),)},
        {"experts": ((1, 0), (1, 2)), "experts_are": "silent"},
    ],
)
def test_something_off_changes_the_answer_and_comes_back(
    model: HybridLM, parts: dict[str, Any]
) -> None:
    found = ablate(model, TOKENIZER, IDS, off(**parts))
    assert found["divergence"] > 0
    assert found["before"]["next"] != found["after"]["next"]
    assert found["before"] == ablate(model, TOKENIZER, IDS, off())["after"]
    assert found == ablate(model, TOKENIZER, IDS, off(**parts))


def test_the_numbers_are_those_of_the_distributions(model: HybridLM) -> None:
    found = ablate(model, TOKENIZER, IDS, off(layers=(2,)))
    ids = torch.tensor([IDS])
    with torch.inference_mode():
        before = model(ids)[0][0].log_softmax(-1)
        with switched_off(model, off(layers=(2,))):
            after = model(ids)[0][0].log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1)
    np.testing.assert_allclose(found["by_token"]["divergence"], divergence, rtol=1e-4, atol=1e-6)
    losses = -after[:-1].gather(-1, ids[0, 1:, None])
    assert found["after"]["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    top = found["after"]["next"][0]
    assert top["id"] == int(after[-1].argmax())
    assert top["probability"] == pytest.approx(float(after[-1].max().exp()), rel=1e-5)


def test_a_layer_off_lets_the_stream_pass(model: HybridLM) -> None:
    seen: list[torch.Tensor] = []
    handle = model.blocks[2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode(), switched_off(model, off(layers=(0, 1))):
        model(torch.tensor([IDS]))
    handle.remove()
    torch.testing.assert_close(seen[0], model.embedding(torch.tensor([IDS])), rtol=0, atol=0)


def test_a_silent_head_remembers_nothing(model: HybridLM) -> None:
    with torch.inference_mode():
        _, whole = model(torch.tensor([IDS]))
        with switched_off(model, off(heads=((1, 2),))):
            _, without = model(torch.tensor([IDS]))
    before, after = whole.layers[1], without.layers[1]
    assert isinstance(before, KdaState)
    assert isinstance(after, KdaState)
    assert before.memory[0, 2].norm() > 0
    assert (after.memory[0, 2] == 0).all()
    torch.testing.assert_close(after.memory[0, [0, 1, 3]], before.memory[0, [0, 1, 3]])


@pytest.mark.parametrize("scoring", ["sigmoid", "topk_softmax"])
@pytest.mark.parametrize("has_balance_bias", [True, False])
def test_an_expert_never_chosen_is_replaced(scoring: Any, has_balance_bias: bool) -> None:
    from dataclasses import replace

    from deltamoe.testing import tiny_config

    moe = tiny_config().moe
    assert moe is not None
    moe = replace(moe, scoring=scoring, has_balance_bias=has_balance_bias)
    model = tiny_model(moe=moe)
    with torch.inference_mode():
        before = model.hidden(torch.tensor([IDS])).routings[1]
        assert before is not None
        busiest = int(before.counts.argmax())
        with switched_off(model, off(experts=((1, busiest),))):
            after = model.hidden(torch.tensor([IDS])).routings[1]
    assert after is not None
    assert after.counts[busiest] == 0
    assert after.counts.sum() == before.counts.sum()
    torch.testing.assert_close(
        after.expert_weights.sum(-1), before.expert_weights.sum(-1), rtol=1e-5, atol=0
    )


def test_a_silent_expert_weighs_nothing(model: HybridLM) -> None:
    with torch.inference_mode(), switched_off(model, off(experts=((1, 0),), experts_are="silent")):
        routing = model.hidden(torch.tensor([IDS])).routings[1]
    assert routing is not None
    is_off = routing.expert_ids == 0
    assert is_off.any()
    assert (routing.expert_weights[is_off] == 0).all()
    assert (routing.expert_weights[~is_off] > 0).all()


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"layers": (4,)}, "layer 4"),
        ({"layers": (-1,)}, "layer -1"),
        ({"heads": ((0, 4),)}, "head of layer 0: 4"),
        ({"heads": ((3, 3),)}, "there are 3"),
        ({"experts": ((0, 0),)}, "no experts"),
        ({"experts": ((1, 5),)}, "there are 5"),
        ({"experts": tuple((1, e) for e in range(4))}, "1 experts left"),
    ],
)
def test_what_cannot_be_switched_off(model: HybridLM, parts: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ablate(model, TOKENIZER, IDS, off(layers=parts.pop("layers", (0,)), **parts))
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_one_token_has_no_loss(model: HybridLM) -> None:
    assert ablate(model, TOKENIZER, [256], off())["before"]["loss"] is None
