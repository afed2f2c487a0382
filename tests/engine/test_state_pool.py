import pytest
import torch

from deltamoe.engine import EngineOptions
from deltamoe.engine.state_pool import PoolSize, StatePool
from deltamoe.errors import ConfigError, DoesNotFitError
from deltamoe.model import KdaState, MlaState
from tests.engine.harness import MODELS, OPTIONS, model_of

IDS = torch.randint(0, 257, (1, 23), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=MODELS)
def model(request):
    return model_of(request.param)


@pytest.fixture
def pool(model):
    return StatePool(model, PoolSize.of(model, OPTIONS))


def state_of(model, length):
    with torch.inference_mode():
        return model.hidden(IDS[:, :length]).state


def placed(pool, model, length):
    handle = pool.acquire()
    assert pool.reserve(handle, length)
    pool.write(handle, state_of(model, length), length)
    return handle


def assert_equal(ours, theirs):
    assert ours.lengths.tolist() == theirs.lengths.tolist()
    for one, other in zip(ours.tensors(), theirs.tensors(), strict=True):
        # fp32: latents read in two pieces, or in one
        assert torch.allclose(one, other, rtol=0, atol=1e-5)


def poison(pool):
    for layer in pool.state.layers:
        for part in layer:
            (part if isinstance(layer, KdaState) else part[1:]).fill_(torch.nan)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 23])
def test_what_is_written_is_read(pool, model, length):
    assert_equal(pool.read(placed(pool, model, length)), state_of(model, length))


def test_latents_are_appended_behind_those_that_are_there(pool, model):
    handle = placed(pool, model, 6)
    assert pool.reserve(handle, 17)
    pool.write(handle, state_of(model, 17), 17)
    assert_equal(pool.read(handle), state_of(model, 17))


def test_a_copy_does_not_follow_the_pool(pool, model):
    handle = placed(pool, model, 9)
    copy = pool.copy(handle)
    poison(pool)
    assert_equal(copy, state_of(model, 9))


def test_a_new_owner_finds_zeros(pool):
    poison(pool)
    handle = pool.acquire()
    assert pool.reserve(handle, 7)
    for layer in pool.state.layers:
        for part in layer:
            mine = part[handle.slot if isinstance(layer, KdaState) else handle.pages]
            assert bool((mine == 0).all())


@pytest.mark.parametrize("length", [8, 10])
def test_whoever_goes_on_from_a_snapshot_changes_nobody(pool, model, length):
    """Full pages are shared, the last one is copied, up to what the snapshot has read."""
    handle = placed(pool, model, length)
    snapshot = pool.snapshot(handle)
    assert pool.reserve(handle, 23)
    pool.write(handle, state_of(model, 23), 23)
    others = [pool.restore(snapshot) for _ in range(2)]
    for other in others:
        assert_equal(pool.read(other), state_of(model, length))
        for layer in pool.state.layers:  # behind the snapshot's tokens nothing was copied
            if isinstance(layer, MlaState) and length % 4:
                assert bool((layer.latent[other.pages[-1], length % 4 :] == 0).all())
    assert pool.reserve(others[0], 23)
    pool.write(others[0], state_of(model, 23), 23)
    assert_equal(pool.read(handle), state_of(model, 23))
    assert_equal(pool.read(others[1]), state_of(model, length))


def test_everything_comes_back(pool, model):
    slots, pages = pool.num_free_slots, pool.num_unused_pages
    handle = placed(pool, model, 10)
    assert pool.pages_to_cache(handle) == pool.pages_for(10)
    snapshot = pool.snapshot(handle)
    assert pool.pages_to_cache(handle) == 0
    assert pool.num_cached_pages == pool.num_running_pages == pool.pages_for(10)
    assert pool.cached_slot_bytes == pool.size.slot_bytes
    needed = pool.pages_to_restore(snapshot)
    free = pool.num_free_pages
    other = pool.restore(snapshot)
    assert free - pool.num_free_pages == needed
    pool.release(handle)
    pool.drop(snapshot)
    pool.release(other)
    assert (pool.num_free_slots, pool.num_unused_pages) == (slots, pages)
    assert (pool.num_running_pages, pool.num_cached_pages, pool.cached_slot_bytes) == (0, 0, 0)


def test_pages_outlive_their_first_owner(pool, model):
    handle = placed(pool, model, 10)
    snapshot = pool.snapshot(handle)
    pool.release(handle)
    for _ in range(pool.num_free_slots):
        other = pool.acquire()
        pool.reserve(other, 8)
    pool.release(other)
    assert_equal(pool.read(pool.restore(snapshot)), state_of(model, 10))


def test_a_sequence_gets_all_the_pages_it_asks_for_or_none():
    model = model_of("hybrid")
    size = PoolSize.of(model, OPTIONS)._replace(num_pages=5)
    pool = StatePool(model, size)
    handle, other = pool.acquire(), pool.acquire()
    assert pool.reserve(handle, 12)
    assert not pool.reserve(other, 12)
    assert (other.pages, pool.num_free_pages) == ([], 2)
    assert pool.reserve(other, 8)


def test_the_budget_is_kept():
    model = model_of("hybrid")
    options = EngineOptions(
        state_bytes=10**6, cache_bytes=10**5, max_sequences=8, page_tokens=16, context=64
    )
    size = PoolSize.of(model, options)
    assert size.num_slots == 8
    assert size.num_pages == 8 * 64 // 16  # more than that nobody could use
    assert size.cached_slot_bytes + size.num_cached_pages * size.page_bytes <= 10**5
    pool = StatePool(model, size)
    nbytes = sum(part.nbytes for layer in pool.state.layers for part in layer)
    budget = size.num_slots * size.slot_bytes
    budget += (1 + size.num_pages + size.num_cached_pages) * size.page_bytes
    assert nbytes == budget


def test_fewer_slots_than_asked_for_if_the_budget_is_small():
    model = model_of("all kda")
    slot_bytes = PoolSize.of(model, OPTIONS).slot_bytes
    options = EngineOptions(state_bytes=3 * slot_bytes + 1, cache_bytes=0)
    assert PoolSize.of(model, options).num_slots == 3


def test_a_budget_without_room_for_one_is_refused():
    with pytest.raises(DoesNotFitError, match="one sequence needs"):
        PoolSize.of(model_of("hybrid"), EngineOptions(state_bytes=100))


def test_a_context_without_room_is_refused():
    with pytest.raises(ConfigError, match="leaves room for"):
        PoolSize.of(model_of("hybrid"), EngineOptions(state_bytes=10**6, context=100_000))
