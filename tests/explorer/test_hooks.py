"""The hooks: one table, nothing left behind, and the model none the wiser."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from deltamoe.explorer.hooks import HOOKS, watching
from deltamoe.layers import KdaState, MlaState, Routing
from deltamoe.model import HybridLM
from tests.docs.pages import ROOT, rows

IDS = torch.tensor([[256, 1, 2, 3, 4]])


def test_every_layer_is_seen_whole(model: HybridLM) -> None:
    seen: dict[int, dict[str, Any]] = {}
    with torch.inference_mode(), watching(model, seen.__setitem__):
        model(IDS)
    assert list(seen) == [0, 1, 2, 3]
    for layer, captured in seen.items():
        modules = dict(model.blocks[layer].named_modules())
        assert set(captured) == {hook.name for hook in HOOKS if hook.module in modules}
        torch.testing.assert_close(
            captured["before"] + captured["mixer.output"], captured["between"], rtol=0, atol=0
        )
        torch.testing.assert_close(
            captured["between"] + captured["channel.output"], captured["after"], rtol=0, atol=0
        )
        assert isinstance(captured["mixer.state"], KdaState if layer < 3 else MlaState)
        assert isinstance(captured["channel.routing"], Routing if layer else type(None))
    torch.testing.assert_close(seen[0]["after"], seen[1]["before"], rtol=0, atol=0)


def test_every_hook_has_a_block_that_it_looks_at(model: HybridLM) -> None:
    mla = replace(model.config.mla, query_rank=7)
    wide = HybridLM(replace(model.config, mla=mla))
    modules = {
        name for m in (model, wide) for block in m.blocks for name, _ in block.named_modules()
    }
    assert {hook.module for hook in HOOKS} <= modules


def test_a_watched_model_answers_the_same_to_the_last_bit(model: HybridLM) -> None:
    with torch.inference_mode():
        alone, _ = model(IDS)
        with watching(model, lambda layer, captured: None):
            watched, _ = model(IDS)
    assert torch.equal(alone, watched)


def test_hooks_come_off_whatever_happens(model: HybridLM) -> None:
    with pytest.raises(ZeroDivisionError), watching(model, lambda layer, captured: None):
        raise ZeroDivisionError
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_the_documentation_has_the_table() -> None:
    written = [
        [f"`{h.name}`", f"`{h.module}`" if h.module else "the block", h.side, h.meaning]
        for h in HOOKS
    ]
    assert rows(ROOT / "docs" / "explorer.md", "hooks") == written
