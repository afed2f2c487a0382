"""Traces by unguessable names, bounded in number and bytes."""

import numpy as np
import pytest

from deltamoe.errors import DataError
from deltamoe.explorer import Trace
from deltamoe.explorer.store import TraceStore


def sized(nbytes: int) -> Trace:
    return Trace({}, {"a": np.zeros(nbytes, np.uint8)})


def test_the_newest_stay() -> None:
    store = TraceStore(most_traces=2)
    names = [store.add(sized(1)) for _ in range(2)]
    store.get(names[0])
    third = store.add(sized(1))
    assert len(store) == 2
    assert [name for name, _ in store.newest_first()] == [third, names[0]]
    with pytest.raises(DataError, match="record it again"):
        store.get(names[1])


def test_bytes_are_bounded_and_the_newest_is_kept() -> None:
    store = TraceStore(most_bytes=100)
    store.add(sized(60))
    store.add(sized(60))
    assert store.nbytes == 60
    big = store.add(sized(1000))
    assert len(store) == 1
    assert store.get(big).nbytes == 1000


def test_names_cannot_be_guessed() -> None:
    store = TraceStore()
    names = {store.add(sized(1)) for _ in range(20)}
    assert len(names) == 20
    assert all(len(name) >= 22 for name in names)  # 128 bits in base 64
