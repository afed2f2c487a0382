"""Many ways to run the same requests, chosen by hypothesis; each must give the same answers.

The engine is stepped by hand. Whatever is submitted, cancelled, preempted or evicted in between, a
request that ends has the answer it has alone, to the last bit, and nothing is left behind.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from deltamoe.engine import EngineOptions, Request
from deltamoe.engine.core import Core
from deltamoe.testing import tiny_model
from tests.engine.harness import (
    COLD,
    TOKENIZER,
    assert_empty,
    everything,
    prompt,
    solo,
    submit,
)

pytestmark = pytest.mark.usefixtures("unchecked")

TEXTS = ["", "a", "the beginning", "the beginning is shared", "the beginning is not", "z" * 20]
REQUESTS = [
    replace(rules, prompt=prompt(text))
    for text in TEXTS
    for rules in (
        Request(prompt=(0,), max_tokens=6),
        Request(prompt=(0,), max_tokens=4, temperature=1.0, seed=1, n=2, num_logprobs=1),
        Request(prompt=(0,), max_tokens=9, temperature=0.8, top_k=20, seed=2, scope="other"),
        Request(prompt=(0,), max_tokens=0, prompt_logprobs=0),
        Request(prompt=(0,), max_tokens=3, frequency_penalty=1.0, reuse=False),
    )
]


# Two layers are enough for every kind of state.
MODELS = {"hybrid": 2, "all kda": 0, "all mla": 1}


@cache
def small_model(kind: str):
    return tiny_model(num_layers=2, mla_every=MODELS[kind])


@cache
def expected(kind: str, single_tokens: int):
    options = replace(COLD, single_tokens=single_tokens)
    return everything(solo(Core(small_model(kind), TOKENIZER, options), REQUESTS))


def options_of(
    kind: str, pages: int, slots: int, cache_bytes: int, single_tokens: int
) -> EngineOptions:
    size = Core(small_model(kind), TOKENIZER, COLD).size
    return EngineOptions(
        max_sequences=slots,
        state_bytes=slots * size.slot_bytes + max(pages * size.page_bytes, 1),
        cache_bytes=cache_bytes,
        prefill_chunk=COLD.prefill_chunk,
        single_tokens=single_tokens,
        step_tokens=COLD.step_tokens,
        page_tokens=COLD.page_tokens,
        exact_reuse=True,
    )


class Schedule(RuleBasedStateMachine):
    """Any order of everything that may happen to an engine."""

    @initialize(
        kind=st.sampled_from(list(MODELS)),
        pages=st.integers(12, 40),
        slots=st.integers(1, 5),
        cache_bytes=st.sampled_from([0, 10_000, 30_000, 10**6]),
        single_tokens=st.sampled_from([0, 3, 64]),
    )
    def begin(self, kind, pages, slots, cache_bytes, single_tokens):
        self.expected = expected(kind, single_tokens)
        options = options_of(kind, pages, slots, cache_bytes, single_tokens)
        self.core = Core(small_model(kind), TOKENIZER, options)
        self.asked = []
        self.cancelled = set()

    @rule(which=st.sampled_from(range(len(REQUESTS))))
    def submit(self, which):
        recorder = submit(self.core, REQUESTS[which])
        job = max(self.core.scheduler.jobs(), key=lambda job: job.order)
        self.asked.append((which, recorder, job))

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
        pool = self.core.pool
        for layer in pool.state.layers:
            if hasattr(layer, "memory"):
                layer.memory[pool._free_slots] = torch.nan
            else:
                layer.latent[pool._free_pages] = torch.nan

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
        for number, (which, recorder, _) in enumerate(self.asked):
            assert recorder.error is None
            if recorder.result is not None and number not in self.cancelled:
                assert everything([recorder.result]) == [self.expected[which]]

    def teardown(self):
        if not hasattr(self, "core"):
            return
        for _ in range(10_000):
            if not self.core.has_work:
                break
            self.core.step()
        assert all(recorder.is_done for _, recorder, _ in self.asked)
        self.finished_ones_are_right()
        assert_empty(self.core)


_QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much]


def run(examples: int, steps: int) -> None:
    Schedule.TestCase.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=_QUIET,
        database=None,
    )
    Schedule.TestCase().runTest()


def test_schedules():
    run(examples=150, steps=20)


@pytest.mark.slow
def test_thousands_of_schedules():
    run(examples=3000, steps=40)
