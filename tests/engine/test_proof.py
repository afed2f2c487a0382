"""A sound engine proves itself, and every known way of damaging a state is found.

The damages are those that other engines have had, each patched into ours; the proof has to name
the ways that suffer from it.
"""

from functools import cache

import pytest
import torch

from deltamoe.engine import proof
from deltamoe.engine.core import Core
from deltamoe.engine.proof import prove
from deltamoe.engine.reader import Batch
from deltamoe.engine.sequence import Sequence
from deltamoe.engine.snapshots import Found, Snapshots
from deltamoe.engine.state_pool import Handle, StatePool
from deltamoe.errors import ConfigError
from deltamoe.model import HybridLM, KdaState, ModelState
from deltamoe.testing import tiny_model
from tests.engine.harness import MODELS, TOKENIZER, model_of, prompt

pytestmark = pytest.mark.usefixtures("unchecked")

TEXT = "However it is run, the answer is the same; that is what this is to show. "


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.float32) for kind in MODELS),
        ("hybrid", torch.bfloat16),
        ("hybrid", torch.float64),
    ],
)
def test_a_sound_engine_proves_itself(kind, dtype):
    seen = []
    model = model_of(kind, dtype)
    found = prove(model, TOKENIZER, prompt(TEXT[:48]), num_tokens=8, on_way=seen.append)
    assert found.is_right, [way for way in found.ways if not way.is_right]
    assert tuple(seen) == found.ways
    assert found.has_decoder == (dtype != torch.float64)
    alike = [way for way in found.ways if way.difference_alike is not None]
    assert len(alike) == 11
    assert all(way.must_be_equal == found.has_decoder for way in alike)
    if found.has_decoder:
        assert {way.difference_alike for way in alike} == {0.0}
    assert all(way.number for way in found.ways if way.number is not None)
    assert {way.name for way in found.ways if way.number is None} == {
        "again",
        "the model's forward pass",
    }


# One layer of each kind is enough to be damaged.
@cache
def small_model(dtype) -> HybridLM:
    return tiny_model(dtype, num_layers=2, mla_every=2)


def wrong_ways(dtype=torch.float32) -> dict[str, str]:
    found = prove(small_model(dtype), TOKENIZER, prompt(TEXT[:40]), num_tokens=5)
    return {way.name: way.fault for way in found.ways if way.fault is not None}


RESTORING = {"prefix: the whole prompt", "prefix: half the prompt", "put aside", "forked"}


def test_a_snapshot_of_garbage(monkeypatch):
    snapshot = StatePool.snapshot

    def unwritten(pool, handle):
        taken = snapshot(pool, handle)
        taken.memory.uniform_()
        return taken

    monkeypatch.setattr(StatePool, "snapshot", unwritten)
    found = wrong_ways()
    assert set(found) >= RESTORING
    assert {found[name] for name in RESTORING} == {"not equal to the last bit"}


def with_memory(state, change):
    return ModelState(
        tuple(
            KdaState(layer.conv, change(layer.memory)) if isinstance(layer, KdaState) else layer
            for layer in state.layers
        ),
        state.lengths,
    )


# The plain way reads its chunks wrongly, too: it is what the others disagree with. In bf16 only
# what is no rounding for most tokens counts.
READING = {
    torch.float32: {"the model's forward pass", "chunks of 3", "token by token"},
    torch.bfloat16: {"chunks of 3"},
}


@pytest.mark.parametrize("dtype", list(READING))
def test_chunks_that_take_the_memory_for_transposed(monkeypatch, dtype):
    read = StatePool.read

    def transposed(pool, handle):
        state = read(pool, handle)
        return with_memory(state, lambda memory: memory.mT.reshape(memory.shape))

    monkeypatch.setattr(StatePool, "read", transposed)
    assert set(wrong_ways(dtype)) >= READING[dtype]


@pytest.mark.parametrize("dtype", list(READING))
def test_a_state_that_every_chunk_drops(monkeypatch, dtype):
    read = StatePool.read
    monkeypatch.setattr(
        StatePool, "read", lambda pool, handle: with_memory(read(pool, handle), torch.zeros_like)
    )
    assert set(wrong_ways(dtype)) >= READING[dtype]


def test_slots_that_are_not_zeroed(monkeypatch):
    monkeypatch.setattr(StatePool, "acquire", lambda pool: Handle(pool._free_slots.pop(), [], 0))
    assert set(wrong_ways()) == {"in places that held others"}


def test_pages_that_are_not_zeroed_where_rows_are_read_together(monkeypatch):
    """Without a decoder the tail of a row's last page is read, and masked: NaN passes through."""

    def fresh_page(pool):
        page = pool._free_pages.pop()
        pool._running[page] = 1
        pool.num_running_pages += 1
        return page

    monkeypatch.setattr(StatePool, "_fresh_page", fresh_page)
    found = prove(small_model(torch.float64), TOKENIZER, prompt(TEXT[:40]), num_tokens=5)
    assert [way.name for way in found.ways if not way.is_right] == ["in places that held others"]


def test_a_shared_page_that_is_written_to(monkeypatch):
    restore = StatePool.restore

    def careless(pool, snapshot):
        handle = restore(pool, snapshot)
        for layer in pool.state.layers:
            if hasattr(layer, "latent") and handle.pages:
                layer.latent[handle.pages[-1]] = 0.5
        return handle

    monkeypatch.setattr(StatePool, "restore", careless)
    assert set(wrong_ways()) >= {"put aside", "forked"}


def test_a_hit_that_gets_the_slot_of_another(monkeypatch):
    restore = StatePool.restore

    def confused(pool, snapshot):
        handle = restore(pool, snapshot)
        pool._memory[:, handle.slot] = pool._memory[:, (handle.slot + 1) % pool.size.num_slots]
        return handle

    monkeypatch.setattr(StatePool, "restore", confused)
    assert set(wrong_ways()) >= RESTORING


def test_a_row_that_is_given_the_slot_of_another(monkeypatch):
    remove = Batch.remove

    def forgets_who_moved(batch, sequence):
        slots = batch._slots.copy()
        remove(batch, sequence)
        batch._slots[:] = slots

    monkeypatch.setattr(Batch, "remove", forgets_who_moved)
    assert "among neighbours" in wrong_ways()


@pytest.mark.parametrize("number", [4, 10])
def test_a_snapshot_taken_off_its_boundary(monkeypatch, number):
    snapshot = StatePool.snapshot

    def late(pool, handle):
        taken = snapshot(pool, handle)
        if taken.length > 10:  # says that it has read less than it has
            taken.length -= number
            taken.pages = taken.pages[: pool.pages_for(taken.length)]
        return taken

    monkeypatch.setattr(StatePool, "snapshot", late)
    assert set(wrong_ways()) >= {"prefix: half the prompt", "put aside"}


def test_a_rebuilt_state_that_lacks_a_part(monkeypatch):
    def crash(pool, snapshot):
        raise RuntimeError("no memory in this cache")

    monkeypatch.setattr(StatePool, "restore", crash)
    found = wrong_ways()
    assert set(found) >= RESTORING
    assert found["forked"] == "failed: RuntimeError('no memory in this cache')"
    assert "among neighbours" not in found


def test_a_file_that_holds_another_state(monkeypatch):
    load = proof.load_text_state

    def damaged(path, model):
        text = load(path, model)
        return text._replace(state=with_memory(text.state, lambda memory: memory * 1.0001))

    monkeypatch.setattr(proof, "load_text_state", damaged)
    assert wrong_ways() == {"from a state file": "not equal to the last bit"}


def test_reuse_that_reuses_nothing(monkeypatch):
    monkeypatch.setattr(Snapshots, "find", lambda self, scope, ids, **_: Found(None, 0))
    prefixes = ("the whole prompt", "half the prompt", "among neighbours")
    assert wrong_ways() == {f"prefix: {name}": "did not happen" for name in prefixes}


def test_states_that_are_never_put_aside(monkeypatch):
    monkeypatch.setattr(Snapshots, "hold", lambda self, handle, cuts, **_: None)
    found = wrong_ways()
    assert found["put aside"] == found["forked"] == "did not happen"


def test_preemption_that_preempts_nobody(monkeypatch):
    monkeypatch.setattr(Core, "preempt", lambda self, sequence: None)
    assert wrong_ways() == dict.fromkeys(("put aside", "lost and read again"), "did not happen")


def test_requests_that_run_one_after_another(monkeypatch):
    monkeypatch.setattr(Core, "_start", one_at_a_time(Core._start))
    assert wrong_ways()["among neighbours"] == "did not happen"


def one_at_a_time(start):
    def started(core):
        if not core.scheduler.running:
            waiting = core.scheduler.waiting
            core.scheduler.waiting = waiting[:1]
            start(core)
            core.scheduler.waiting += waiting[1:]

    return started


def test_chunks_of_another_size(monkeypatch):
    chunk_end = Sequence.chunk_end
    monkeypatch.setattr(Sequence, "chunk_end", lambda self, step: chunk_end(self, max(step, 8)))
    found = wrong_ways()
    assert found["chunks of 1"] == found["chunks of 3"] == "did not happen"


def test_a_short_prompt_proves_nothing():
    with pytest.raises(ConfigError, match="8 or more"):
        prove(model_of("hybrid"), TOKENIZER, prompt("short"))
