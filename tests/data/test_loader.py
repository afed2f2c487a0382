import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from deltamoe.data import PreparedData, PreparedSource, TokenStream
from deltamoe.data.loader import NO_TARGET, Loader, validation_batches, windows
from deltamoe.errors import ConfigError, DataError
from deltamoe.tokenizer import ByteTokenizer

END = 256


def make(**sources):
    """Prepared data of named (weight, documents), a document being a list of ids."""
    parts = []
    for name, (weight, documents) in sources.items():
        stream = TokenStream.in_memory(documents, end_id=END, vocab_size=257, num_bytes=1)
        parts.append(PreparedSource(name, weight, stream, stream))
    return PreparedData(ByteTokenizer(), tuple(parts))


# Every token of a document tells the document, so that a row can be checked against them.
DOCUMENTS = [[number] * (3 + 5 * number % 17) for number in range(40)]
MANY = {"many": (1.0, DOCUMENTS)}
ONE = {"one": (1.0, [list(range(200))])}
MIXED = {"a": (3.0, DOCUMENTS[:20]), "b": (1.0, [list(range(200))])}


def equal(a, b):
    return (
        torch.equal(a.ids, b.ids)
        and torch.equal(a.targets, b.targets)
        and torch.equal(a.cu_seqlens, b.cu_seqlens)
        and a.fingerprint == b.fingerprint
    )


@pytest.mark.parametrize("sources", [MANY, ONE, MIXED])
def test_targets_are_the_tokens_that_follow(sources):
    loader = Loader(make(**sources), context=16, rows=4, seed=0)
    for _ in range(50):
        batch = loader.next_batch()
        ids, targets = batch.ids.view(4, 16), batch.targets.view(4, 16)
        assert torch.equal(ids[:, 1:], targets[:, :-1])
        assert batch.ids.dtype == batch.targets.dtype == batch.cu_seqlens.dtype == torch.int64
        assert (batch.targets >= 0).all()


@pytest.mark.parametrize("sources", [MANY, ONE, MIXED])
def test_a_border_stands_at_each_row_and_each_document_and_nowhere_else(sources):
    loader = Loader(make(**sources), context=16, rows=4, seed=0)
    for _ in range(50):
        batch = loader.next_batch()
        expected = {0, 16, 32, 48, 64, *torch.nonzero(batch.ids == END).flatten().tolist()}
        assert batch.cu_seqlens.tolist() == sorted(expected)


def test_documents_are_whole_between_their_borders():
    lengths = {number: len(document) for number, document in enumerate(DOCUMENTS)}
    loader = Loader(make(**MANY), context=64, rows=4, seed=0)
    batch = loader.next_batch()
    num_whole = 0
    for start, stop in pairwise(batch.cu_seqlens.tolist()):
        ids = batch.ids[start:stop].tolist()
        body = ids[ids[0] == END :]
        assert len(set(body)) <= 1
        if ids[0] == END and batch.targets[stop - 1] == END and body:
            assert len(body) == lengths[body[0]]
            num_whole += 1
    assert num_whole > 10


@pytest.mark.parametrize("sources", [MANY, ONE])
def test_an_epoch_reads_everything_once(sources):
    data = make(**sources)
    loader = Loader(data, context=16, rows=1, seed=0)
    per_epoch = data.train.num_tokens // 16
    whole = Counter(data.train.tokens(0, data.train.num_tokens).tolist())
    for _ in range(3):
        read = Counter()
        for _ in range(per_epoch):
            read.update(loader.next_batch().ids.tolist())
        left_out = whole - read
        assert read <= whole
        assert left_out.total() == data.train.num_tokens % 16
    assert loader.epochs == {next(iter(sources)): 3.0}


@pytest.mark.parametrize("sources", [MANY, ONE])
def test_epochs_differ_in_order_and_in_their_cuts(sources):
    data = make(**sources)
    loader = Loader(data, context=16, rows=1, seed=0)
    per_epoch = data.train.num_tokens // 16
    first, second = (
        [tuple(loader.next_batch().ids.tolist()) for _ in range(per_epoch)] for _ in range(2)
    )
    assert first != second
    assert len(set(first) & set(second)) < per_epoch / 2


def test_rows_of_one_text_do_not_come_in_its_order():
    loader = Loader(make(one=(1.0, [[0] * 8 + list(range(248))])), context=8, rows=1, seed=0)
    starts = [int(loader.next_batch().ids[0]) for _ in range(30)]
    assert np.mean(np.diff(starts) == 8) < 0.3


def test_the_seed_decides():
    def read(seed):
        return Loader(make(**MANY), context=16, rows=4, seed=seed).next_batch()

    assert equal(read(0), read(0))
    assert not equal(read(0), read(1))


@pytest.mark.parametrize("sources", [MANY, ONE, MIXED])
@pytest.mark.parametrize("num_before", [0, 1, 7, 40])  # 40 batches are several epochs
def test_it_goes_on_exactly_where_it_was(sources, num_before):
    settings = {"context": 16, "rows": 3, "seed": 5}
    loader = Loader(make(**sources), **settings)
    for _ in range(num_before):
        loader.next_batch()
    position = json.loads(json.dumps(loader.position))
    again = Loader(make(**sources), **settings, position=position)
    for _ in range(30):
        assert equal(loader.next_batch(), again.next_batch())
    assert loader.position == again.position


def test_order_is_not_taken_from_anywhere_else():
    np.random.seed(1)
    torch.manual_seed(1)
    a = Loader(make(**MANY), context=16, rows=4, seed=0)
    state = np.random.get_state()[1].tolist()
    torch_state = torch.get_rng_state()
    first = a.next_batch()
    assert np.random.get_state()[1].tolist() == state
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.random.seed(2)
    torch.manual_seed(2)
    assert equal(first, Loader(make(**MANY), context=16, rows=4, seed=0).next_batch())


def test_the_batches_are_the_same_for_ever():
    # A change here breaks the resuming of every run: raise the FORMAT of the position with it.
    batch = Loader(make(**MIXED), context=16, rows=4, seed=0).next_batch()
    assert batch.fingerprint[:16] == "1c707887b0930a12"


def test_weights_decide_the_shares():
    loader = Loader(make(**MIXED), context=16, rows=1, seed=0)
    names = []
    for _ in range(400):
        before = loader.position["rows"]
        loader.next_batch()
        after = loader.position["rows"]
        names.append(next(name for name in after if after[name] != before[name]))
    assert names[:8] == ["a", "a", "b", "a"] * 2
    assert Counter(names) == {"a": 300, "b": 100}


def test_a_text_shorter_than_a_row_goes_round():
    loader = Loader(make(short=(1.0, [[1, 2, 3]])), context=10, rows=1, seed=0)
    for _ in range(5):
        batch = loader.next_batch()
        line = [*batch.ids.tolist(), int(batch.targets[-1])]
        assert len(line) == 11
        pairs = set(pairwise(line))
        assert pairs == {(END, 1), (1, 2), (2, 3), (3, END)}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"format": 2}, ConfigError),
        ({"seed": 1}, ConfigError),
        ({"context": 17}, ConfigError),
        ({"rows": {"a": 1}}, ConfigError),
        ({"rows": {"a": 1, "c": 1}}, ConfigError),
        ({"rows": None}, DataError),
        ({"rows": {"a": -1, "b": 1}}, DataError),
        ({"rows": {"a": True, "b": 1}}, DataError),
    ],
)
def test_a_position_of_another_run_is_refused(change, error):
    data = make(**MIXED)
    position = {**Loader(data, context=16, rows=4, seed=0).position, **change}
    with pytest.raises(error, match="position in the data"):
        Loader(data, context=16, rows=4, seed=0, position=position)


def test_a_fault_in_the_data_does_not_move_the_position():
    good = make(**MANY).sources[0]
    bad = TokenStream(
        good.train._shards, good.train.document_starts, num_bytes=1, vocab_size=5, fingerprint=""
    )
    data = PreparedData(ByteTokenizer(), (PreparedSource("many", 1.0, bad, bad),))
    loader = Loader(data, context=16, rows=4, seed=0)
    before = loader.position
    with pytest.raises(DataError, match="memory: token id"):
        loader.next_batch()
    assert loader.position == before


@pytest.mark.parametrize("context", [1, 7, 16, 1000])
@pytest.mark.parametrize("sources", [MANY, ONE])
def test_a_validation_predicts_every_token_but_the_first_once(sources, context):
    stream = make(**sources).validation
    batches = list(validation_batches(stream, context, rows=3))
    ids = torch.cat([batch.ids for batch in batches]).tolist()
    targets = torch.cat([batch.targets for batch in batches]).tolist()
    tokens = stream.tokens(0, stream.num_tokens).tolist()
    assert ids == tokens[: len(ids)]
    assert [t for t in targets if t != NO_TARGET] == tokens[1:]
    for batch in batches:
        starts = set(range(0, len(batch.ids), context))
        starts |= {i for i, token in enumerate(batch.ids.tolist()) if token == END}
        assert batch.cu_seqlens.tolist() == [*sorted(starts), len(batch.ids)]


def test_a_part_of_the_validation_is_spread_over_it():
    stream = make(**ONE).validation
    starts = windows(stream, 10, max_tokens=50)
    assert starts.tolist() == [0, 40, 80, 120, 160]
    assert windows(stream, 10, max_tokens=3).tolist() == [0]
    assert len(windows(stream, 10, max_tokens=10_000)) == 20
    batches = list(validation_batches(stream, 10, rows=2, max_tokens=50))
    assert [len(batch.ids) for batch in batches] == [20, 20, 10]
    assert equal(batches[0], next(validation_batches(stream, 10, rows=2, max_tokens=50)))


def test_the_last_window_may_be_short_and_says_where_the_text_ends():
    stream = TokenStream.in_memory([[1, 2, 3, 4]], end_id=END, vocab_size=257, num_bytes=1)
    first, last = validation_batches(stream, 3, rows=1)
    assert first.ids.tolist() == [END, 1, 2]
    assert (last.ids.tolist(), last.targets.tolist()) == ([3, 4], [4, NO_TARGET])
