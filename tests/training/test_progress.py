"""The progress line: what it says, how often, and that a closed pipe cannot hurt."""

import io
import sys

from deltamoe.training.progress import Progress

RECORD = {
    "step": 3,
    "loss": 2.5,
    "seconds": 2.0,
    "tokens_per_s": 12345.6,
    "matmul_fraction": 0.31,
    "max_vio": {"1": 0.5, "2": 1.25},
    "dead_experts": {"1": 0, "2": 1},
}


def test_a_plain_line_says_it_all(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress() as progress:
        progress.update({**RECORD, "validation_bits_per_byte": 2.125}, end=100)
    line = stream.getvalue()
    for part in (
        "step 3/100",
        "loss 2.500",
        "val 2.125 bits/byte at 3",
        "12,346 tokens/s",
        "31% of matmul peak",
        "MaxVio 1.25",
        "dead experts 1",
        "3m 14s left",
    ):
        assert part in line


def test_plain_lines_come_every_few_seconds_and_at_the_end(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(every=1e9) as progress:
        for step in range(1, 6):
            progress.update({**RECORD, "step": step}, end=5)
    assert [line.split(" · ")[0] for line in stream.getvalue().splitlines()] == [
        "step 1/5",
        "step 5/5",
    ]


def test_a_closed_pipe_is_silence(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    with Progress() as progress:
        progress.say("hello")
        progress.update(RECORD, end=5)


def test_a_terminal_gets_a_live_line(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress() as progress:
        progress.update(RECORD, end=5)
        progress.say("a warning [not markup]")
    assert "step 3/5" in stream.getvalue()
    assert "a warning [not markup]" in stream.getvalue()
