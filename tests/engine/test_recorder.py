"""What a recorder keeps is what the engine answers, and a text it leads along is kept to."""

import pytest
import torch

from deltamoe.engine import Request
from deltamoe.engine.core import Core
from deltamoe.engine.recorder import Recorder
from tests.engine.harness import COLD, TOKENIZER, answers, model_of, prompt

pytestmark = pytest.mark.usefixtures("unchecked")

REQUEST = Request(prompt=prompt("what is drawn"), max_tokens=6, ignore_end=True)


def core() -> Core:
    return Core(model_of("hybrid"), TOKENIZER, COLD)


def test_a_run_is_what_was_answered():
    [result] = answers(core(), [REQUEST])
    recorder = Recorder(core())
    job = recorder.add(REQUEST)
    [run] = recorder.runs(job)
    assert run.ids == result.choices[0].ids == recorder.results[job].choices[0].ids
    assert run.cuts == job.prompt_cuts
    assert run.logits.shape == (6, TOKENIZER.vocab_size)
    assert run.ids == tuple(run.logits.argmax(-1).tolist())


def test_one_that_follows_is_led_along_the_text():
    text = tuple(b"driven")
    recorder = Recorder(core(), text)
    job = recorder.follow(REQUEST)
    [run] = recorder.runs(job)
    assert recorder.results[job].choices[0].ids == text
    assert run.ids != text  # what it would have written is kept
    ids = torch.tensor([[*REQUEST.prompt, *text[:-1]]])
    with torch.inference_mode():
        logits, _ = model_of("hybrid")(ids)
    expected = logits[0, len(REQUEST.prompt) - 1 :, : TOKENIZER.vocab_size]
    # another order of sums in fp32; logits are about 1
    torch.testing.assert_close(run.logits, expected, rtol=0, atol=1e-5)


def test_what_is_drawn_beside_others_is_counted():
    recorder = Recorder(core())
    jobs = [recorder.add(REQUEST) for _ in range(2)]
    recorder.runs(jobs[0])
    assert len(recorder.runs(jobs[1])[0].ids) == 6
    assert all(0 < recorder.num_beside[job] <= 6 for job in jobs)
    alone = Recorder(core())
    [run] = alone.runs(job := alone.add(REQUEST))
    assert (alone.num_beside[job], len(run.ids)) == (0, 6)


def test_a_failed_request_is_not_silent():
    recorder = Recorder(core())
    job = recorder.add(REQUEST)
    with pytest.raises(RuntimeError, match="broken"):
        recorder.core.fail(job, RuntimeError("broken"))
