import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from deltamoe.errors import DataError
from deltamoe.evaluation.bits_per_byte import bits_per_byte, loss_by_position
from deltamoe.evaluation.token_losses import ScoredTokens, streamed_losses, window_losses
from deltamoe.testing import tiny_model
from deltamoe.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
DOCUMENTS = ["Hello there", "", "a", "The quick brown fox jumps."]


@pytest.fixture(scope="module")
def model():
    return tiny_model(torch.float64, num_layers=2)


@pytest.fixture(scope="module")
def stream():
    encoded = [[TOKENIZER.end_id, *TOKENIZER.encode(text)] for text in DOCUMENTS]
    starts = np.cumsum([0, *map(len, encoded)])[:-1]
    return np.concatenate([np.array(ids) for ids in encoded]), starts


def by_definition(model, token_ids, starts):
    """One segment after another, each in one pass and without a state."""
    losses = np.full(len(token_ids), np.nan)
    for start, stop in pairwise([*starts, len(token_ids) - 1]):
        ids = torch.from_numpy(token_ids[start : stop + 1])[None]
        with torch.no_grad():
            logits, _ = model(ids[:, :-1])
        losses[start + 1 : stop + 1] = (
            -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten()
        )
    losses[token_ids == TOKENIZER.end_id] = np.nan
    return losses


@pytest.mark.parametrize(("context", "rows"), [(7, 2), (16, 1), (1000, 8)])
def test_windows_by_definition(model, stream, context, rows):
    token_ids, documents = stream
    scored = window_losses(model, token_ids, documents, context=context, rows=rows)
    starts = sorted({*range(0, len(token_ids), context), *documents.tolist()})
    assert scored.segment_starts.tolist() == starts
    # the result is rounded to fp32
    expected = by_definition(model, token_ids, starts)
    np.testing.assert_allclose(scored.losses, expected, rtol=1e-6)


@pytest.mark.parametrize(("chunk", "rows"), [(1, 1), (5, 2), (1000, 8)])
def test_streamed_by_definition(model, stream, chunk, rows):
    token_ids, documents = stream
    scored = streamed_losses(model, token_ids, documents, chunk=chunk, rows=rows)
    expected = by_definition(model, token_ids, documents.tolist())
    np.testing.assert_allclose(scored.losses, expected, rtol=1e-6)


def test_every_token_but_the_borders_is_scored(model, stream):
    token_ids, documents = stream
    scored = window_losses(model, token_ids, documents, context=8)
    assert scored.is_scored.sum() == sum(len(text) for text in DOCUMENTS)
    assert np.array_equal(~scored.is_scored, token_ids == TOKENIZER.end_id)


def test_progress_ends_at_the_end(model, stream):
    for score, option in ((window_losses, "context"), (streamed_losses, "chunk")):
        done = []
        score(model, *stream, **{option: 8}, rows=2, progress=done.append)
        assert done == sorted(done)
        assert done[-1] == len(stream[0])


def scored_by_hand(text, losses, segment_starts):
    return ScoredTokens(
        token_ids=np.array([TOKENIZER.end_id, *TOKENIZER.encode(text)]),
        losses=np.array([np.nan, *losses], dtype=np.float32),
        segment_starts=np.array(segment_starts),
    )


def test_bits_per_byte_by_hand():
    scored = scored_by_hand("ab🙂", [math.log(2), math.log(4), 0, 0, 0, 0], [0])
    assert bits_per_byte(scored, TOKENIZER) == pytest.approx(3 / 6)


def test_a_model_that_knows_nothing_needs_all_bits(stream):
    model = tiny_model(num_layers=2)
    with torch.no_grad():
        model.head.weight.zero_()
    scored = window_losses(model, *stream, context=16)
    assert bits_per_byte(scored, TOKENIZER) == pytest.approx(math.log2(257), rel=1e-6)


def test_nothing_to_score(model):
    border = np.array([TOKENIZER.end_id])
    scored = window_losses(model, border, np.array([0]), context=8)
    with pytest.raises(DataError, match="empty"):
        bits_per_byte(scored, TOKENIZER)


def test_loss_by_position_by_hand():
    scored = scored_by_hand("abcdefg", [1, 2, 3, 4, 5, 6, 7], [0, 4])
    assert scored.num_visible.tolist() == [0, 1, 2, 3, 4, 1, 2, 3]
    assert [tuple(row) for row in loss_by_position(scored)] == [
        (1, 1, 2, (1 + 5) / 2),
        (2, 3, 4, (2 + 3 + 6 + 7) / 4),
        (4, 4, 1, 4.0),
    ]
