"""Bits per byte, against the definition spelled out token by token."""

import math

import pytest
import torch

from deltamoe.data import PreparedData
from deltamoe.testing import tiny_model
from deltamoe.training.signals import StopRequest
from deltamoe.training.validation import validate

DOCUMENTS = ["To be, or not to be: that is the question.", "Whether 'tis nobler", "é"]
CONTEXT = 16


@pytest.fixture(scope="module")
def held_out() -> PreparedData:
    return PreparedData.in_memory(["training text"], DOCUMENTS)


def run(held_out, **options):
    return validate(
        tiny_model(), held_out.validation, held_out.tokenizer, context=CONTEXT, **options
    )


def test_every_byte_is_predicted_once(held_out):
    model = tiny_model()
    found = run(held_out, rows=2)
    stream = held_out.validation
    ids = stream.tokens(0, stream.num_tokens).tolist()
    borders = set(stream.document_starts.tolist())
    nats, start = 0.0, 0
    for place in range(1, len(ids)):
        if place - 1 in borders or (place - 1) % CONTEXT == 0:
            start = place - 1
        if place not in borders:
            with torch.no_grad():
                logits, _ = model(torch.tensor([ids[start:place]]))
            nats -= logits[0, -1].log_softmax(dim=-1)[ids[place]].item()
    num_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    assert found.num_tokens == num_bytes
    # fp32, packed against alone
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert found.loss == pytest.approx(nats / num_bytes, rel=1e-5)


def test_rows_change_nothing_and_a_second_pass_reads_the_same(held_out):
    one = run(held_out, rows=1, max_tokens=40)
    again = run(held_out, rows=1, max_tokens=40)
    three = run(held_out, rows=3, max_tokens=40)
    assert one == again
    assert one.num_tokens == three.num_tokens < run(held_out, rows=3).num_tokens
    assert one.bits_per_byte == pytest.approx(three.bits_per_byte, rel=1e-5)


def test_the_model_s_mode_comes_back(held_out):
    model = tiny_model().train()
    validate(model, held_out.validation, held_out.tokenizer, context=CONTEXT, rows=2)
    assert model.training


def test_a_stop_is_obeyed_between_batches(held_out):
    stop = StopRequest()
    stop.name = "SIGTERM"
    assert run(held_out, rows=1, stop=stop) is None
