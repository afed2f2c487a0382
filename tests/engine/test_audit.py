import logging
import time
from dataclasses import replace

import pytest
import torch

from deltamoe.engine import Engine, Request
from tests.engine.harness import OPTIONS, TOKENIZER, model_of, prompt

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
