import math

import pytest
import torch

from deltamoe.errors import ConfigError, NonFiniteError
from deltamoe.inference.sampler import (
    Greedy,
    MinP,
    RepetitionPenalty,
    Sampler,
    Temperature,
    TopK,
    TopP,
)

ROWS, VOCAB = 5, 17


@pytest.fixture
def logits():
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(1)) * 3


@pytest.fixture
def seen():
    return torch.rand(ROWS, VOCAB, generator=torch.Generator().manual_seed(2)) < 0.4


def kept(logits):
    return [[i for i, x in enumerate(row) if x > -math.inf] for row in logits.tolist()]


def softmax(row):
    weights = [math.exp(x - max(row)) for x in row]
    return [w / sum(weights) for w in weights]


def test_temperature_divides(logits, seen):
    ours = Temperature(0.5)(logits, seen).softmax(-1)
    assert torch.allclose(ours, (logits / 0.5).softmax(-1), atol=1e-6)  # fp32 rounding


def test_greedy_keeps_the_first_maximum(seen):
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]])
    assert kept(Greedy()(logits, seen[:2, :3])) == [[1], [0]]


@pytest.mark.parametrize("k", [1, 4, VOCAB, 100])
def test_top_k_by_definition(logits, seen, k):
    expected = [sorted(sorted(range(VOCAB), key=lambda i: -row[i])[:k]) for row in logits.tolist()]
    assert kept(TopK(k)(logits, seen)) == expected


def test_top_k_keeps_ties(seen):
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0]])
    assert kept(TopK(2)(logits, seen[:1, :5])) == [[1, 2, 3, 4]]


@pytest.mark.parametrize("p", [1e-46, 1e-9, 0.3, 0.9, 0.999])  # the first is 0 in fp32
def test_top_p_by_definition(logits, seen, p):
    expected = []
    for row in logits.tolist():
        probabilities, nucleus = softmax(row), []
        for i in sorted(range(VOCAB), key=lambda i: -row[i]):
            nucleus.append(i)
            if sum(probabilities[j] for j in nucleus) >= p:
                break
        expected.append(sorted(nucleus))
    assert kept(TopP(p)(logits, seen)) == expected
    assert kept(TopP(torch.full((len(logits), 1), p))(logits, seen)) == expected


@pytest.mark.parametrize("p", [0.01, 0.2, 1.0])
def test_min_p_by_definition(logits, seen, p):
    expected = [
        [i for i, x in enumerate(softmax(row)) if x >= p * max(softmax(row)) * (1 - 1e-6)]
        for row in logits.tolist()
    ]
    assert kept(MinP(p)(logits, seen)) == expected


def test_repetition_penalty_by_definition(logits, seen):
    ours = RepetitionPenalty(1.7)(logits, seen).tolist()
    for row, marks, result in zip(logits.tolist(), seen.tolist(), ours, strict=True):
        for x, is_seen, y in zip(row, marks, result, strict=True):
            expected = (x / 1.7 if x > 0 else x * 1.7) if is_seen else x
            assert y == pytest.approx(expected, rel=1e-6)  # fp32 rounding
            assert not is_seen or y < x


def test_rules_come_in_the_documented_order():
    sampler = Sampler(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    assert sampler.rules == (
        RepetitionPenalty(1.2),
        Temperature(0.5),
        TopK(3),
        TopP(0.9),
        MinP(0.1),
    )
    assert Sampler(temperature=0.0, top_k=3).rules == (Greedy(),)
    assert Sampler(temperature=1.0).rules == ()


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-5])
def test_vanishing_temperature_is_greedy(logits, seen, temperature):
    sampler = Sampler(temperature=temperature)
    drawn = sampler.sample(logits, seen, [sampler.generator(str(row)) for row in range(ROWS)])
    assert drawn.tolist() == logits.argmax(-1).tolist()


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).clamp(min=-1e30)
    sampler = Sampler(temperature=1.0, top_k=3)
    generator = sampler.generator("")
    seen = torch.zeros(1, 4, dtype=torch.bool)
    draws = 4000
    counts = torch.zeros(4)
    for _ in range(draws):
        counts[sampler.sample(logits, seen, [generator])] += 1
    expected = logits.softmax(-1)[0]
    # five standard deviations of a binomial share are at most 5 * 0.5 / sqrt(4000) = 0.04
    assert torch.allclose(counts / draws, expected, atol=0.04)
    assert counts[2] == 0


def test_seed_decides_and_neighbours_do_not(logits, seen):
    def draws(seed, rows):
        sampler = Sampler(temperature=1.5, seed=seed)
        generators = [sampler.generator(str(row)) for row in rows]
        return [sampler.sample(logits[rows], seen[rows], generators).tolist() for _ in range(20)]

    together = draws(7, [0, 1, 2])
    assert draws(7, [0, 1, 2]) == together
    assert draws(8, [0, 1, 2]) != together
    assert draws(7, [1]) == [[ids[1]] for ids in together]


def test_rows_do_not_share_their_luck():
    sampler = Sampler(temperature=1.0)
    flat = torch.zeros(2, 1000)
    seen = torch.zeros(2, 1000, dtype=torch.bool)
    generators = [sampler.generator("one"), sampler.generator("two")]
    drawn = torch.stack([sampler.sample(flat, seen, generators) for _ in range(10)])
    assert (drawn[:, 0] != drawn[:, 1]).sum() >= 9  # a coincidence has one chance in a thousand


def test_the_global_random_state_is_left_alone(logits, seen):
    before = torch.get_rng_state()
    sampler = Sampler(seed=3)
    sampler.sample(logits, seen, [sampler.generator(str(row)) for row in range(ROWS)])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(logits, seen, damage):
    logits[2, 3] = damage
    sampler = Sampler()
    with pytest.raises(NonFiniteError, match="not finite"):
        sampler.sample(logits, seen, [sampler.generator(str(row)) for row in range(ROWS)])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_values_out_of_range_are_named(key, value):
    with pytest.raises(ConfigError, match=f"^{key} = "):
        Sampler(**{key: value})
