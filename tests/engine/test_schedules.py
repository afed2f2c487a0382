"""Many ways to run the same requests, chosen by hypothesis; each must give the same answers.

The engine is stepped by hand. Whatever is submitted, cancelled, preempted, evicted or audited in
between, a request that ends has the answer it has alone, and nothing is left behind. What "the
same" means depends on the precision: every bit in fp32, 1e-9 in fp64, and in bf16 the same tokens
as long as no margin is so small that rounding may turn it.
"""

import tempfile
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from deltamoe.engine import EngineOptions, Request
from deltamoe.engine.core import Core
from deltamoe.inference import load_text_state, save_text_state
from deltamoe.testing import tiny_config, tiny_model
from tests.engine.harness import (
    COLD,
    TOKENIZER,
    Recorder,
    answers,
    assert_empty,
    everything,
    prompt,
    solo,
)

pytestmark = pytest.mark.usefixtures("unchecked")

TEXTS = ["", "a", "the beginning", "the beginning is shared", "the beginning is not", "z" * 20]
REQUESTS = [
    replace(rules, prompt=prompt(text))
    for text in TEXTS
    for rules in (
        Request(prompt=(0,), max_tokens=6, num_logprobs=0),
        Request(prompt=(0,), max_tokens=4, temperature=1.0, seed=1, n=2, num_logprobs=1),
        Request(prompt=(0,), max_tokens=9, temperature=0.8, top_k=20, seed=2, scope="other"),
        Request(prompt=(0,), max_tokens=0, prompt_logprobs=0),
        Request(prompt=(0,), max_tokens=3, frequency_penalty=1.0, reuse=False),
    )
]
# Short ones: every token of a text has to be routed without doubt.
GREEDY = [
    Request(prompt=prompt(beginning + end), max_tokens=12)
    for beginning in "kqrxz"
    for end in ("", "s", "st", "stu", "stuff", "a", "am")
]


# Two layers are enough for every kind of state; the second has experts.
MODELS = {
    "hybrid": {"mla_every": 2},
    "all kda": {"mla_every": 0},
    "all mla": {"mla_every": 1},
    "softmax router": {
        "mla_every": 2,
        "moe": replace(tiny_config().moe, scoring="softmax", has_balance_bias=False),
    },
}


@cache
def small_model(kind, dtype):
    return tiny_model(dtype, num_layers=2, **MODELS[kind])


class Likeness(ABC):
    """What "the same answer" means in one precision.

    Attributes:
        dtype: of the model.
        requests: what is asked.
        head: what a state file has read.
        prefill_chunk: of the schedules.
        is_exact: whether reuse keeps to the cuts of a cold reading.
    """

    dtype: torch.dtype
    requests = REQUESTS
    head = prompt("the beginning")
    prefill_chunk = COLD.prefill_chunk
    is_exact = False

    @abstractmethod
    def check(self, kind, request, result, expected):
        """Refuse another answer."""


@cache
def expected(likeness, kind, single_tokens):
    options = replace(COLD, single_tokens=single_tokens)
    return solo(Core(small_model(kind, likeness.dtype), TOKENIZER, options), likeness.requests)


@cache
def from_a_file(likeness, kind):
    model = small_model(kind, likeness.dtype)
    head = Request(prompt=likeness.head, max_tokens=0, keep_state=True)
    [result] = answers(Core(model, TOKENIZER, COLD), [head])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        save_text_state(path, result.choices[0].state, model)
        return load_text_state(path, model)


class EveryBit(Likeness):
    dtype = torch.float32
    is_exact = True

    def check(self, kind, request, result, expected):
        assert everything([result]) == everything([expected])


def logprobs_of(result):
    entries = [entry for choice in result.choices for entry in choice.logprobs]
    entries += [entry for entry in result.prompt_logprobs or () if entry is not None]
    return [value for entry in entries for _, value in ((entry.id, entry.logprob), *entry.top)]


class InFp64(Likeness):
    dtype = torch.float64

    def check(self, kind, request, result, expected):
        assert [each.ids for each in result.choices] == [each.ids for each in expected.choices]
        given = torch.tensor(logprobs_of(result), dtype=torch.float64)
        alone = torch.tensor(logprobs_of(expected), dtype=torch.float64)
        # a prompt behind a state file has scores of its own tokens only
        torch.testing.assert_close(given, alone[-len(given) :], rtol=0, atol=1e-9)


# A number of bf16 is right to 2^-9 of itself. Two layers of this model round about ten times on the
# way to a logit, differently for every way of cutting a text, and logits reach 4. Ten such steps of
# either sign are sqrt(10) * 4 * 2^-9 = 0.025, three times which hardly ever happens. A score of the
# router is at most 1/4 of its logit's error, behind about six steps: 3 * sqrt(6) * 2^-9 = 0.014. A
# token whose experts are a tie changes the states behind it.
LEAST_TOKEN_MARGIN = 0.075
LEAST_ROUTING_MARGIN = 0.014


@cache
@torch.inference_mode()
def num_sure(kind, ids, num_prompt):
    """How many of the drawn ids neither margin leaves in doubt."""
    model = small_model(kind, torch.bfloat16)
    out = model.hidden(torch.tensor([ids[:-1]]))
    logits = model.logits(out.hidden)[0, :, : TOKENIZER.vocab_size]
    logits[:, list(TOKENIZER.unused_ids)] = -torch.inf
    best = logits.topk(2).values
    is_sure = best[:, 0] - best[:, 1] > LEAST_TOKEN_MARGIN
    routing = out.routings[1]
    number = routing.expert_ids.shape[1]
    preference = model.blocks[1].channel.router.preference(routing.scores)
    preference = preference.sort(-1, descending=True).values
    is_routed = preference[:, number - 1] - preference[:, number] > LEAST_ROUTING_MARGIN
    from_here = slice(num_prompt - 1, None)
    return int((is_routed.cumprod(0)[from_here] * is_sure[from_here].cumprod(0)).sum())


class InBf16(Likeness):
    """Greedy tokens, up to the first margin that is so small that rounding may decide.

    Attributes:
        num_compared: tokens so far.
    """

    dtype = torch.bfloat16
    requests = GREEDY
    head = prompt("q")
    prefill_chunk = 3

    def __init__(self):
        self.num_compared = 0

    def check(self, kind, request, result, expected):
        ids = expected.choices[0].ids
        number = num_sure(kind, (*request.prompt, *ids), len(request.prompt))
        assert result.choices[0].ids[:number] == ids[:number]
        self.num_compared += number


class Schedule(RuleBasedStateMachine):
    """Any order of everything that may happen to an engine."""

    likeness: Likeness

    @initialize(
        kind=st.sampled_from(list(MODELS)),
        pages=st.integers(12, 40),
        slots=st.integers(1, 5),
        cache_bytes=st.sampled_from([0, 10_000, 30_000, 10**6]),
        single_tokens=st.sampled_from([0, 3, 64]),
    )
    def begin(self, kind, pages, slots, cache_bytes, single_tokens):
        like = self.likeness
        model = small_model(kind, like.dtype)
        size = Core(model, TOKENIZER, COLD).size
        options = EngineOptions(
            max_sequences=slots,
            state_bytes=slots * size.slot_bytes + max(pages * size.page_bytes, 1),
            cache_bytes=cache_bytes * max(like.dtype.itemsize // 4, 1),
            prefill_chunk=like.prefill_chunk,
            single_tokens=single_tokens,
            step_tokens=COLD.step_tokens,
            page_tokens=COLD.page_tokens,
            exact_reuse=like.is_exact,
        )
        self.kind = kind
        self.expected = expected(like, kind, single_tokens)
        self.core = Core(model, TOKENIZER, options)
        self.asked = []
        self.cancelled = set()
        self.unchecked = set()

    def ask(self, which, request, audited=None):
        """Submit what has to be answered as the request of this number."""
        recorder = Recorder()
        job = self.core.add(request, recorder, self.core.prepare(request), audited=audited)
        self.unchecked.add(len(self.asked))
        self.asked.append((which, recorder, job))

    @rule(which=st.integers(0, 100))
    def submit(self, which):
        which %= len(self.likeness.requests)
        self.ask(which, self.likeness.requests[which])

    @rule(which=st.integers(0, 100))
    def go_on_from_a_file(self, which):
        """The same prompt, but its beginning was read by another process."""
        which %= len(self.likeness.requests)
        request = self.likeness.requests[which]
        size = len(self.likeness.head)
        head, tail = request.prompt[:size], request.prompt[size:]
        if not self.likeness.is_exact and head == self.likeness.head and tail:
            state = from_a_file(self.likeness, self.kind)
            self.ask(which, replace(request, prompt=tail, state=state))

    @rule(at=st.integers(0, 100))
    def audit(self, at):
        done = [
            (which, job)
            for number, (which, recorder, job) in enumerate(self.asked)
            if recorder.is_done and number not in self.cancelled and job.request.max_tokens
        ]
        if done and not any(job.is_audit for job in self.core.scheduler.jobs()):
            which, job = done[at % len(done)]
            self.ask(which, replace(job.request, reuse=False), audited=job)

    @rule(times=st.integers(1, 6))
    def step(self, times):
        for _ in range(times):
            self.core.step()

    @rule(at=st.integers(0, 100))
    def preempt(self, at):
        if running := self.core.scheduler.running:
            with torch.inference_mode():
                self.core.preempt(running[at % len(running)])

    @rule(at=st.integers(0, 100))
    def cancel(self, at):
        if self.asked:
            number = at % len(self.asked)
            _, recorder, job = self.asked[number]
            if not recorder.is_done:
                self.cancelled.add(number)
                self.core.cancel(job)
                assert recorder.is_done

    @rule(at=st.integers(0, 100))
    def evict(self, at):
        if kept := list(self.core.snapshots._by_use):
            self.core.snapshots.drop(kept[at % len(kept)])

    @rule()
    def poison_what_is_free(self):
        self.core.pool.spoil()

    @invariant()
    def the_books_are_right(self):
        if not hasattr(self, "core"):
            return
        pool, size = self.core.pool, self.core.size
        handles = [each.handle for each in self.core.scheduler.running]
        assert all(handle is not None for handle in handles)
        assert size.num_slots - pool.num_free_slots == len(handles)
        running = {page for handle in handles for page in handle.pages}
        kept = [kept.snapshot for kept in self.core.snapshots._by_use]
        cached = {page for snapshot in kept for page in snapshot.pages}
        assert pool.num_running_pages == len(running) <= size.num_pages
        assert pool.num_cached_pages == len(cached) <= size.num_cached_pages
        assert pool.cached_slot_bytes == len(kept) * size.slot_bytes <= size.cached_slot_bytes
        assert pool.num_unused_pages == size.num_pages + size.num_cached_pages - len(
            running | cached
        )
        self.finished_ones_are_right()

    def finished_ones_are_right(self):
        for number in sorted(self.unchecked):
            which, recorder, job = self.asked[number]
            assert recorder.error is None
            if recorder.is_done:
                self.unchecked.discard(number)
                if job.is_audit and recorder.result.choices[-1].finish_reason == "cancelled":
                    continue  # its place was needed
                if number not in self.cancelled:
                    request = self.likeness.requests[which]
                    self.likeness.check(self.kind, request, recorder.result, self.expected[which])

    def teardown(self):
        if not hasattr(self, "core"):
            return
        for _ in range(10_000):
            if not self.core.has_work:
                break
            self.core.step()
        assert all(recorder.is_done for _, recorder, _ in self.asked)
        self.finished_ones_are_right()
        assert not self.unchecked
        assert_empty(self.core)


_QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much]


def run(likeness: Likeness, examples: int, steps: int = 20) -> None:
    machine = type("ScheduleOf" + type(likeness).__name__, (Schedule,), {"likeness": likeness})
    machine.TestCase.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=_QUIET,
        database=None,
    )
    machine.TestCase().runTest()


def test_schedules_in_fp32():
    run(EveryBit(), examples=80)


def test_schedules_in_fp64():
    run(InFp64(), examples=10)


def test_schedules_in_bf16():
    likeness = InBf16()
    for _ in range(5):  # a round compares 50 to 600 tokens, as the margins of its prompts allow
        run(likeness, examples=60)
        if likeness.num_compared > 150:
            break
    assert likeness.num_compared > 150


@pytest.mark.slow
def test_thousands_of_schedules_in_fp32():
    run(EveryBit(), examples=2500)


@pytest.mark.slow
def test_hundreds_of_schedules_in_fp64():
    run(InFp64(), examples=200)


@pytest.mark.slow
def test_a_thousand_schedules_in_bf16():
    likeness = InBf16()
    run(likeness, examples=1000)
    assert likeness.num_compared > 3000  # about 7500
