import pytest
import torch

from deltamoe.engine.proof import prove
from deltamoe.engine.state_pool import StatePool
from deltamoe.errors import ConfigError
from tests.engine.harness import MODELS, TOKENIZER, model_of, prompt

pytestmark = pytest.mark.usefixtures("unchecked")

TEXT = "However it is run, the answer is the same; that is what this is to show. "


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float32) for kind in MODELS), ("hybrid", torch.float64)]
)
def test_a_sound_engine_proves_itself(kind, dtype):
    seen = []
    model = model_of(kind, dtype)
    proof = prove(model, TOKENIZER, prompt(TEXT), num_tokens=12, on_way=seen.append)
    assert proof.is_right, [way for way in proof.ways if not way.is_right]
    assert tuple(seen) == proof.ways
    assert proof.has_decoder == (dtype == torch.float32)
    if proof.has_decoder:
        assert {way.difference for way in proof.ways if way.must_be_equal} == {0.0}
    assert {way.diverges_at for way in proof.ways} == {None}
    names = {way.name for way in proof.ways}
    assert {"the model's forward pass", "forked", "from a state file", "put aside"} <= names


def wrong_ways(**options):
    proof = prove(model_of("hybrid"), TOKENIZER, prompt(TEXT), num_tokens=6, **options)
    return {way.name for way in proof.ways if not way.is_right}


def test_a_snapshot_that_forgets_the_memory_is_found(monkeypatch):
    snapshot = StatePool.snapshot

    def forgetful(pool, handle):
        taken = snapshot(pool, handle)
        taken.memory.zero_()
        return taken

    monkeypatch.setattr(StatePool, "snapshot", forgetful)
    assert wrong_ways() >= {"prefix: the whole prompt", "prefix: half the prompt", "forked"}


def test_pages_that_are_not_copied_are_found(monkeypatch):
    restore = StatePool.restore

    def careless(pool, snapshot):
        handle = restore(pool, snapshot)
        for layer in pool.state.layers:
            if hasattr(layer, "latent") and handle.pages:
                layer.latent[handle.pages[-1]] = 0.5
        return handle

    monkeypatch.setattr(StatePool, "restore", careless)
    assert wrong_ways() >= {"put aside", "forked"}


def test_a_short_prompt_proves_nothing():
    with pytest.raises(ConfigError, match="8 or more"):
        prove(model_of("hybrid"), TOKENIZER, prompt("short"))
