import math

import pytest
import torch

from deltamoe.engine import Request
from deltamoe.engine.sampling import Sampling
from deltamoe.engine.sequence import Job
from deltamoe.errors import ConfigError, NonFiniteError
from deltamoe.inference.sampler import MinP, Temperature, TopK, TopP
from tests.engine.harness import TOKENIZER, Recorder

VOCAB = 260  # three rows of the embedding have no token
RULES = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 5},
    {"temperature": 1.4, "top_p": 0.7},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.0, "repetition_penalty": 1.5},
    {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"logit_bias": {7: 50.0}},
    {"num_logprobs": 3},
]


def sequence(seed=0, prompt=(1, 2, 3), **changes):
    request = Request(prompt=prompt, seed=seed, **changes)
    return Job(request, Recorder(), TOKENIZER, order=0).sequences[0]


@pytest.fixture
def logits():
    return torch.randn(len(RULES), VOCAB, generator=torch.Generator().manual_seed(1)) * 3


@pytest.fixture
def sampling():
    return Sampling(TOKENIZER, torch.device("cpu"))


def one(sampling, logits, row):
    [chosen] = sampling.choose(logits[None].clone(), [row])
    return chosen


@pytest.mark.parametrize(
    "extreme",
    [
        {"top_p": 1e-46},
        {"min_p": 1.0},
        {"min_p": 1e-46},
        {"temperature": 1e-46},
        {"temperature": 100.0},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100.0},
        {"presence_penalty": 100.0, "frequency_penalty": -100.0},
        {"logit_bias": {1: 1e30, 2: -1e30}},
    ],
    ids=str,
)
def test_whatever_is_asked_for_an_id_of_the_vocabulary_is_drawn(sampling, logits, extreme):
    for seed, row in enumerate(logits):
        rules = {"temperature": 1.0, "num_logprobs": 2, **extreme}
        chosen = one(sampling, row * 100, sequence(seed, **rules))
        assert isinstance(chosen, int)
        assert 0 <= chosen < TOKENIZER.vocab_size


def test_a_row_does_not_see_its_neighbours(sampling, logits):
    rows = [sequence(seed, **rules) for seed, rules in enumerate(RULES)]
    together = sampling.choose(logits.clone(), rows)
    alone = [
        one(sampling, own, sequence(seed, **rules))
        for seed, (own, rules) in enumerate(zip(logits, RULES, strict=True))
    ]
    assert together == alone
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    rows = [sequence(seed, **RULES[seed]) for seed in order]
    assert sampling.choose(logits[order].clone(), rows) == [together[at] for at in order]


def test_greedy_takes_the_likeliest(sampling, logits):
    assert one(sampling, logits[0], sequence()) == int(logits[0, :257].argmax())


def test_rows_without_a_token_are_never_chosen(sampling, logits):
    logits[0, 258] = 100.0
    logits[1, 259] = 100.0
    assert one(sampling, logits[0], sequence()) < 257
    assert one(sampling, logits[1], sequence(temperature=1.0)) < 257


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("rules", RULES[1:6], ids=str)
def test_the_draws_follow_the_distribution(sampling, logits, rules):
    """Frequencies over many seeds against the rules of inference.sampler, one after another."""
    number = 2000
    drawn = sampling.choose(
        logits[0].expand(number, -1).clone(), [sequence(seed, **rules) for seed in range(number)]
    )
    expected = logits[:1, :257]
    unseen = torch.zeros(1, 257, dtype=torch.bool)
    for rule in (
        Temperature(rules["temperature"]),
        *([TopK(rules["top_k"])] if "top_k" in rules else []),
        *([TopP(rules["top_p"])] if "top_p" in rules else []),
        *([MinP(rules["min_p"])] if "min_p" in rules else []),
    ):
        expected = rule(expected, unseen)
    expected = expected.softmax(-1)[0]
    counts = torch.bincount(torch.tensor(drawn), minlength=257) / number
    assert counts[expected == 0].sum() == 0
    # 5 standard deviations of a frequency over 2,000 draws
    assert bool(((counts - expected).abs() <= 5 * (expected / number).sqrt() + 1e-3).all())


def test_every_place_has_its_own_number():
    row = sequence(5, temperature=1.0)
    numbers = [row.uniform()]
    for token_id in (9, 9, 9):
        row.push(token_id)
        numbers.append(row.uniform())
    others = [sequence(6).uniform(), sequence(5, prompt=(1,)).uniform()]
    assert len(set(numbers)) == 4
    assert others[0] not in numbers
    assert others[1] == numbers[0]  # seed, choice and place in the answer decide, nothing else
    assert all(0 <= number < 1 for number in numbers)


def test_choices_of_one_request_draw_differently():
    job = Job(Request(prompt=(1,), seed=3, n=2), Recorder(), TOKENIZER, order=0)
    assert job.sequences[0].uniform() != job.sequences[1].uniform()


def test_a_request_without_a_seed_gets_a_fresh_one():
    jobs = [Job(Request(prompt=(1,)), Recorder(), TOKENIZER, order=0) for _ in range(2)]
    assert jobs[0].seed != jobs[1].seed


def test_repetition_penalty_counts_prompt_and_answer(sampling):
    logits = torch.zeros(VOCAB)
    logits[[5, 6, 7]] = torch.tensor([4.0, 3.9, 3.8])
    row = sequence(prompt=(5,), repetition_penalty=2.0)
    assert one(sampling, logits, row) == 6
    row.push(6)
    assert one(sampling, logits, row) == 7


def test_presence_and_frequency_count_the_answer_only(sampling):
    logits = torch.zeros(VOCAB)
    logits[[5, 6]] = torch.tensor([4.0, 3.0])
    row = sequence(prompt=(5, 5, 5), frequency_penalty=0.4)
    assert one(sampling, logits, row) == 5
    for expected in (5, 5, 5, 6):  # 4.0, 3.6, 3.2, then 2.8 < 3.0
        chosen = one(sampling, logits, row)
        assert chosen == expected
        row.push(chosen)
    row = sequence(presence_penalty=1.5)
    row.push(5)
    assert one(sampling, logits, row) == 6


def test_a_bias_moves_a_logit(sampling, logits):
    assert one(sampling, logits[0], sequence(logit_bias={99: 100.0})) == 99
    best = int(logits[0, :257].argmax())
    assert one(sampling, logits[0], sequence(logit_bias={best: -100.0})) != best


def test_logprobs_are_those_of_the_model(sampling, logits):
    row = sequence(num_logprobs=4, logit_bias={9: 100.0}, temperature=0.5)
    chosen = one(sampling, logits[0], row)
    expected = logits[0].log_softmax(-1)
    [entry] = row.logprobs
    assert (entry.id, entry.logprob) == (chosen, float(expected[chosen]))
    assert [token_id for token_id, _ in entry.top] == expected[:257].topk(4).indices.tolist()
    assert [value for _, value in entry.top] == expected[:257].topk(4).values.tolist()


def test_the_likeliest_tokens_logprob_is_the_same_number_in_both_places(sampling, logits):
    row = sequence(num_logprobs=1)
    one(sampling, logits[0], row)
    assert row.logprobs[0].top == ((row.logprobs[0].id, row.logprobs[0].logprob),)


def test_logprobs_are_finite(sampling):
    logits = torch.zeros(VOCAB)
    logits[3] = 1e30
    row = sequence(num_logprobs=2, logit_bias={})
    one(sampling, logits, row)
    assert all(math.isfinite(value) for _, value in row.logprobs[0].top)
    assert row.logprobs[0].top[1][1] == -9999.0


@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
def test_damage_stays_in_its_row(sampling, logits, damage):
    rows = [sequence(seed, num_logprobs=1) for seed in range(3)]
    expected = sampling.choose(logits[:3].clone(), [sequence(seed) for seed in range(3)])
    logits[1, 40] = damage
    chosen = sampling.choose(logits[:3].clone(), rows)
    assert isinstance(chosen[1], NonFiniteError)
    assert (chosen[0], chosen[2]) == (expected[0], expected[2])
    assert [len(row.logprobs) for row in rows] == [1, 0, 1]


class OnlyThese:
    def __init__(self, *ids):
        self.ids = list(ids)

    def allowed(self):
        allowed = torch.zeros(257, dtype=torch.bool)
        allowed[self.ids] = True
        return allowed

    def push(self, token_id):
        assert token_id in self.ids

    def copy(self):
        return self


@pytest.mark.parametrize("rules", RULES[:6], ids=str)
def test_a_grammar_rules_out(sampling, logits, rules):
    row = sequence(grammar="eleven or twelve", **rules)
    row.matcher = OnlyThese(11, 12)
    assert one(sampling, logits[0], row) in (11, 12)


def test_a_grammar_that_allows_nothing_fails_its_row_alone(sampling, logits):
    rows = [sequence(grammar="none"), sequence()]
    rows[0].matcher = OnlyThese()
    chosen = sampling.choose(logits[:2].clone(), rows)
    assert isinstance(chosen[0], ConfigError)
    assert chosen[1] == int(logits[1, :257].argmax())
