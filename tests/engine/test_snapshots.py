from dataclasses import replace

import numpy as np
import pytest

from deltamoe.engine.snapshots import Snapshots
from deltamoe.engine.state_pool import PoolSize, StatePool
from tests.engine.harness import OPTIONS, model_of


def store(**changes):
    model = model_of("hybrid")
    pool = StatePool(model, PoolSize.of(model, replace(OPTIONS, **changes)))
    return pool, Snapshots(pool)


def handle_of(pool, length):
    handle = pool.acquire()
    pool.reserve(handle, length)
    handle.length = length
    return handle


def ids_of(*ids):
    return np.array(ids, np.int64)


def length_found(snapshots, ids, scope="a", limit=100, cuts=None):
    kept, _ = snapshots.find(scope, ids, limit=limit, cuts=cuts)
    return None if kept is None else kept.snapshot.length


def test_the_longest_prefix_is_found():
    pool, snapshots = store()
    for length in (2, 5, 7):
        snapshots.keep("a", np.arange(length), handle_of(pool, length), (length,), is_cold=True)
    assert length_found(snapshots, np.arange(9)) == 7
    assert length_found(snapshots, np.arange(9), limit=6) == 5
    assert length_found(snapshots, ids_of(0, 1, 2, 9)) == 2
    assert length_found(snapshots, ids_of(5)) is None
    assert snapshots.find("a", ids_of(0, 1, 2, 9), limit=9, cuts=None).num_known == 3


def test_scopes_know_nothing_of_each_other():
    pool, snapshots = store()
    snapshots.keep("a", np.arange(4), handle_of(pool, 4), (4,), is_cold=True)
    assert length_found(snapshots, np.arange(4), scope="b") is None
    assert snapshots.find("b", np.arange(4), limit=4, cuts=None).num_known == 0


def test_only_what_was_cut_alike_is_found_if_asked_for():
    pool, snapshots = store()
    snapshots.keep("a", np.arange(4), handle_of(pool, 4), (4,), is_cold=True)
    snapshots.keep("a", np.arange(6), handle_of(pool, 6), (3, 6), is_cold=False)
    assert length_found(snapshots, np.arange(9), cuts=(4, 8)) == 4
    assert length_found(snapshots, np.arange(9), cuts=(3, 6, 8)) == 6
    assert length_found(snapshots, np.arange(9), cuts=(8,)) is None


def test_the_cold_one_of_two_stays():
    pool, snapshots = store()
    handle = handle_of(pool, 4)
    for cuts, is_cold, expected in (
        ((1, 4), False, (1, 4)),
        ((2, 4), False, (1, 4)),
        ((4,), True, (4,)),
        ((3, 4), False, (4,)),
    ):
        snapshots.keep("a", np.arange(4), handle, cuts, is_cold=is_cold)
        assert snapshots.find("a", np.arange(4), limit=4, cuts=None).kept.cuts == expected
        assert len(snapshots) == 1


def test_the_least_recently_used_goes_first():
    pool, snapshots = store()
    pool.size = pool.size._replace(cached_slot_bytes=3 * pool.size.slot_bytes)
    handle = handle_of(pool, 2)
    for first in range(3):
        snapshots.keep("a", ids_of(first, 0), handle, (2,), is_cold=True)
    assert length_found(snapshots, ids_of(0, 0)) == 2
    snapshots.keep("a", ids_of(3, 0), handle, (2,), is_cold=True)
    found = [length_found(snapshots, ids_of(first, 0)) for first in range(4)]
    assert found == [2, None, 2, 2]
    assert snapshots.num_evicted == 1


def test_pages_have_a_budget_too():
    pool, snapshots = store()
    pool.size = pool.size._replace(num_cached_pages=3)
    one, other, long = handle_of(pool, 8), handle_of(pool, 8), handle_of(pool, 16)
    snapshots.keep("a", ids_of(1, 1), one, (2,), is_cold=True)
    snapshots.keep("a", ids_of(1, 1, 1), one, (2,), is_cold=True)  # the same two pages
    assert (len(snapshots), pool.num_cached_pages) == (2, 2)
    snapshots.keep("a", ids_of(2, 2), other, (2,), is_cold=True)
    assert (len(snapshots), pool.num_cached_pages) == (1, 2)
    snapshots.keep("a", ids_of(3, 3), long, (2,), is_cold=True)  # never fits, and evicts nobody
    assert (len(snapshots), pool.num_cached_pages) == (1, 2)


def test_one_that_is_held_has_no_name_and_may_be_evicted():
    pool, snapshots = store()
    pool.size = pool.size._replace(cached_slot_bytes=pool.size.slot_bytes)
    handle = handle_of(pool, 4)
    held = snapshots.hold(handle, (4,))
    assert length_found(snapshots, np.arange(4)) is None
    snapshots.keep("a", np.arange(4), handle, (4,), is_cold=True)
    assert held.snapshot is None
    snapshots.drop(held)  # again, without effect
    assert length_found(snapshots, np.arange(4)) == 4


@pytest.mark.parametrize("cache_bytes", [0, 1])
def test_without_a_budget_nothing_is_kept(cache_bytes):
    pool, snapshots = store(cache_bytes=cache_bytes)
    handle = handle_of(pool, 4)
    assert snapshots.hold(handle, (4,)) is None
    snapshots.keep("a", np.arange(4), handle, (4,), is_cold=True)
    assert (len(snapshots), snapshots.nbytes) == (0, 0)


def test_clearing_gives_everything_back():
    pool, snapshots = store()
    handle = handle_of(pool, 7)
    for length in (3, 5, 7):
        handle.length = length
        snapshots.keep("a", np.arange(length), handle, (length,), is_cold=True)
    assert snapshots.nbytes > 0
    snapshots.clear()
    assert (len(snapshots), snapshots.nbytes, pool.num_cached_pages) == (0, 0, 0)
