import logging
import time
from dataclasses import replace

import pytest
import torch

from deltamoe.engine import Engine, Request
from deltamoe.engine.audit import _STEPS_APART, Auditor
from deltamoe.engine.core import Core
from tests.engine.harness import (
    COLD,
    OPTIONS,
    TOKENIZER,
    Recorder,
    assert_empty,
    drain,
    model_of,
    prompt,
    submit,
)

pytestmark = pytest.mark.usefixtures("unchecked")

TEXT = "A text that is read by many, and by nobody twice."


def run(requests, *, every, damage=False):
    options = replace(OPTIONS, audit_every=every)
    with Engine(model_of("hybrid"), TOKENIZER, options) as engine:
        for number, request in enumerate(requests):
            if damage and number == 1:  # what the first has left behind goes bad
                with torch.inference_mode():
                    for kept in list(engine._core.snapshots._by_use):
                        kept.snapshot.memory.add_(1.0)
            engine.generate([request])
            until = time.monotonic() + 10
            while engine.stats().counters.num_audits < (number + 1) // max(every, 1):
                assert time.monotonic() < until
                time.sleep(0.005)
                if not every:
                    break
        return engine.stats().counters


def requests():
    return [
        Request(
            prompt=prompt(TEXT[: 30 + at]), max_tokens=8, temperature=1.0, seed=at, n=1 + at % 2
        )
        for at in range(6)
    ]


def test_a_sound_engine_is_found_sound():
    """Also where a prefix was cut differently from a cold one: the audit cuts it alike."""
    counters = run(requests(), every=1)
    assert counters.num_cached_tokens > 50
    assert (counters.num_audits, counters.num_audit_mismatches) == (6, 0)
    assert counters.num_finished == 6


def test_audits_are_not_counted_as_anybody_s():
    asked = requests()
    counters = run(asked, every=1)
    plain = run(asked, every=0)
    assert counters.num_audits == 6
    assert plain.num_audits == 0
    for name in ("prompt_tokens", "generated_tokens", "cached_tokens", "rebuilt", "finished"):
        assert getattr(counters, f"num_{name}") == getattr(plain, f"num_{name}"), name


def busy(core, number):
    """Requests that keep a core busy, and are not audited themselves."""
    ask = Request(prompt=prompt("busy"), max_tokens=2000, ignore_end=True)
    return [submit(core, ask) for _ in range(number)]


def finished(core, auditor, ask):
    """A request that was answered, and whose audit is due."""
    recorder = Recorder()
    job = core.add(ask, recorder)
    while not recorder.is_done:
        core.step()
    auditor.note(job, recorder.result)


ASK = Request(prompt=prompt(TEXT), max_tokens=4)


def test_a_busy_engine_audits_now_and_then():
    core = Core(model_of("hybrid"), TOKENIZER, OPTIONS)
    auditor = Auditor(core, every=1)
    busy(core, 2)
    began = []
    for _ in range(3):
        finished(core, auditor, ASK)
    while core.counters.num_steps < 700:
        if auditor.begin(is_idle=False):
            began.append(core.counters.num_steps)
        core.step()
    assert len(began) == 2
    assert began[1] - began[0] == _STEPS_APART
    assert (core.counters.num_audits, core.counters.num_audit_mismatches) == (2, 0)


def test_an_audit_reads_after_everybody():
    core = Core(model_of("hybrid"), TOKENIZER, replace(OPTIONS, cache_bytes=0))
    auditor = Auditor(core, every=1)
    finished(core, auditor, ASK)
    assert auditor.begin(is_idle=True)
    long = Recorder()
    core.add(replace(ASK, prompt=prompt(TEXT * 4), reuse=False), long)
    read = []
    for _ in range(40):
        prompts = [each for each in core.scheduler.running if each.is_prefilling]
        read.append({each.job.is_audit: each.num_read for each in prompts})
        core.step()
    assert any(False in each and each[False] > 0 for each in read)
    assert all(each[True] == 0 for each in read if each.get(False))
    assert (core.counters.num_audits, core.counters.num_audit_mismatches) == (1, 0)


@pytest.mark.parametrize("scarce", ["slots", "pages"])
def test_an_audit_gives_its_place_up(scarce):
    size = Core(model_of("hybrid"), TOKENIZER, COLD).size
    slots, pages = (2, 40) if scarce == "slots" else (4, 30)
    options = replace(
        COLD,
        max_sequences=slots,
        state_bytes=slots * size.slot_bytes + pages * size.page_bytes,
    )
    core = Core(model_of("hybrid"), TOKENIZER, options)
    auditor = Auditor(core, every=1)
    finished(core, auditor, replace(ASK, max_tokens=40))
    assert auditor.begin(is_idle=True)
    core.step()
    assert [each.job.is_audit for each in core.scheduler.running] == [True]
    recorders = [submit(core, ASK) for _ in range(2)]
    drain(core)
    assert all(recorder.result for recorder in recorders)
    assert (core.counters.num_audits, core.counters.num_preemptions) == (0, 0)
    assert core.counters.num_cancelled == 0
    assert_empty(core)
    finished(core, auditor, ASK)
    assert auditor.begin(is_idle=True)
    drain(core)
    assert (core.counters.num_audits, core.counters.num_audit_mismatches) == (1, 0)


def test_an_engine_that_is_never_idle_is_audited():
    options = replace(OPTIONS, audit_every=1, cache_bytes=0)
    with Engine(model_of("hybrid"), TOKENIZER, options) as engine:
        endless = engine.submit(
            Request(prompt=prompt("busy"), max_tokens=engine.context - 20, ignore_end=True)
        )
        until = time.monotonic() + 30
        while engine.stats().counters.num_audits < 1 and not endless.is_done:
            engine.generate([ASK])
            assert time.monotonic() < until
        assert not endless.is_done
        endless.cancel()
        counters = engine.stats().counters
    assert counters.num_audits >= 1
    assert counters.num_audit_mismatches == 0


def test_one_in_so_many():
    assert run(requests(), every=3).num_audits == 2
    assert run(requests(), every=0).num_audits == 0


def test_a_damaged_state_is_found(caplog):
    with caplog.at_level(logging.ERROR, logger="deltamoe"):
        counters = run(requests()[:3], every=1, damage=True)
    assert counters.num_audit_mismatches >= 1
    assert "computed again gave another answer" in caplog.text


def test_logprobs_are_compared_too():
    ask = Request(prompt=prompt(TEXT), max_tokens=4, num_logprobs=0)
    counters = run([ask, ask], every=1)
    assert (counters.num_audits, counters.num_audit_mismatches) == (2, 0)


def test_closing_does_not_wait_for_audits():
    options = replace(OPTIONS, audit_every=1)
    engine = Engine(model_of("hybrid"), TOKENIZER, options)
    engine.generate([Request(prompt=prompt(TEXT), max_tokens=3000, ignore_end=True)])
    begin = time.monotonic()
    engine.close()
    assert time.monotonic() - begin < 2
    assert torch.is_inference_mode_enabled() is False
