import numpy as np
import pytest

from deltamoe.evaluation.recall import BigramLoss, recall
from deltamoe.evaluation.token_losses import ScoredTokens


def by_definition(scored, training, rare):
    """The three kinds, token by token."""
    pairs = list(zip(training[:-1].tolist(), training[1:].tolist(), strict=True))
    tokens, starts = scored.token_ids.tolist(), scored.segment_starts.tolist()
    kinds = {"repeated": [], "first": [], "common": []}
    for i in range(1, len(tokens)):
        if np.isnan(scored.losses[i]):
            continue
        start = max(s for s in starts if s <= i - 1)
        visible = {(tokens[j - 1], tokens[j]) for j in range(start + 1, i)}
        bigram = (tokens[i - 1], tokens[i])
        if pairs.count(bigram) > rare * len(pairs):
            kind = "common"
        else:
            kind = "repeated" if bigram in visible else "first"
        kinds[kind].append(scored.losses[i])
    return {kind: (len(losses), np.mean(losses)) for kind, losses in kinds.items()}


def test_recall_by_definition():
    generator = np.random.default_rng(0)
    training = generator.integers(0, 12, 300)
    losses = generator.random(200).astype(np.float32)
    losses[[0, 60, 61, 150]] = np.nan
    scored = ScoredTokens(
        token_ids=generator.integers(0, 14, 200),
        losses=losses,
        segment_starts=np.array([0, 50, 60, 61, 150]),
    )
    ours = recall(scored, training, rare=0.01)
    expected = by_definition(scored, training, rare=0.01)
    for kind, (num_tokens, loss) in expected.items():
        assert num_tokens > 10
        assert getattr(ours, kind).num_tokens == num_tokens
        assert getattr(ours, kind).loss == pytest.approx(loss, rel=1e-6)  # fp32 losses


def test_a_name_that_comes_back():
    text, training = b"call qz now; qz", b"call now; call now; " * 10
    losses = np.arange(len(text), dtype=np.float32)
    losses[0] = np.nan
    scored = ScoredTokens(
        token_ids=np.frombuffer(text, np.uint8).astype(np.int64),
        losses=losses,
        segment_starts=np.array([0]),
    )
    found = recall(scored, np.frombuffer(training, np.uint8).astype(np.int64), rare=0.001)
    assert found.repeated == BigramLoss(2, (13 + 14) / 2)  # " q" and "qz" again
    assert found.first == BigramLoss(3, (5 + 6 + 7) / 3)  # " q", "qz", "z "


def test_no_tokens_of_a_kind_have_no_loss():
    scored = ScoredTokens(
        token_ids=np.array([1, 2]),
        losses=np.array([np.nan, 1.0], dtype=np.float32),
        segment_starts=np.array([0]),
    )
    found = recall(scored, np.array([], dtype=np.int64))
    assert found.repeated == BigramLoss(0, None)
    assert found.first == BigramLoss(1, 1.0)
