import numpy as np
import pytest

from deltamoe.data.stream import Shard, TokenStream
from deltamoe.errors import DataError


def make(shard_lengths, starts=(0,), vocab_size=1000):
    ids = np.arange(sum(shard_lengths), dtype=np.uint16)
    cuts = np.cumsum(shard_lengths)[:-1]
    shards = [Shard(f"shard {i}", part) for i, part in enumerate(np.split(ids, cuts))]
    return TokenStream(
        shards,
        np.array(starts, dtype=np.uint64),
        num_bytes=10,
        vocab_size=vocab_size,
        fingerprint="",
    )


@pytest.mark.parametrize("shard_lengths", [[20], [7, 13], [1, 1, 18], [5, 5, 5, 5]])
def test_shards_read_as_one(shard_lengths):
    stream = make(shard_lengths)
    for start in range(21):
        for stop in range(start, 21):
            assert stream.tokens(start, stop).tolist() == list(range(start, stop))
    assert stream.take(np.array([19, 0, 7, 6, 0])).tolist() == [19, 0, 7, 6, 0]
    assert stream.num_tokens == 20


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (0, 21)])
def test_positions_outside_are_a_mistake(start, stop):
    with pytest.raises(ValueError, match="expected 0 <= start"):
        make([20]).tokens(start, stop)


def test_an_unknown_id_is_named_by_shard_and_byte():
    stream = make([7, 13], vocab_size=12)
    assert stream.tokens(0, 12).max() == 11
    with pytest.raises(DataError, match="shard 1: token id 12 at byte 10"):
        stream.tokens(3, 20)


def test_documents():
    stream = make([7, 13], starts=(0, 3, 4, 15))
    assert [document.tolist() for document in stream.documents()] == [
        [0, 1, 2],
        [3],
        list(range(4, 15)),
        list(range(15, 20)),
    ]
    assert stream.document_lengths.tolist() == [3, 1, 11, 5]
    assert stream.num_documents == 4
    borders = [stream.is_border(i, i + 1).item() for i in range(20)]
    assert np.flatnonzero(borders).tolist() == [0, 3, 4, 15]
    assert stream.is_border(3, 16).tolist() == borders[3:16]


def test_in_memory_and_joined():
    a = TokenStream.in_memory([[1, 2], []], end_id=9, vocab_size=10, num_bytes=2)
    b = TokenStream.in_memory([[3]], end_id=9, vocab_size=10, num_bytes=1)
    both = TokenStream.joined([a, b])
    assert both.tokens(0, 6).tolist() == [9, 1, 2, 9, 9, 3]
    assert both.document_starts.tolist() == [0, 3, 4]
    assert (both.num_bytes, both.num_documents) == (3, 3)
    assert len({a.fingerprint, b.fingerprint, both.fingerprint}) == 3
    assert TokenStream.joined([a]) is a
