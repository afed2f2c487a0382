"""How a server ends: told to, or because its engine died."""

import threading
import time
from collections.abc import Iterator

import pytest

from deltamoe.engine import Engine, EngineOptions
from deltamoe.testing import tiny_model
from deltamoe.tokenizer import ByteTokenizer
from tests.server.serving import Answer, Running, running, until

LONG = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True}


@pytest.fixture
def fresh() -> Iterator[Engine]:
    options = EngineOptions(max_sequences=32, max_waiting=8, state_bytes=64 << 20, cache_bytes=0)
    with Engine(tiny_model(), ByteTokenizer(), options) as engine:
        yield engine


class Asking(threading.Thread):
    """A client in a thread of its own."""

    def __init__(self, server: Running, data: dict) -> None:
        super().__init__()
        self._server = server
        self._data = data
        self.answer: Answer | None = None
        self.start()

    def run(self) -> None:
        self.answer = self._server.post("/v1/completions", self._data)

    @property
    def last(self) -> object:
        """The last event; the whole answer of a stream that was refused before its first piece."""
        self.join(timeout=30)
        assert self.answer is not None
        return self.answer.events[-1] if self.answer.status == 200 else self.answer.json


def test_short_answers_finish_and_long_ones_are_told(fresh: Engine) -> None:
    with running(fresh, grace_s=5.0) as server:
        short = Asking(server, LONG | {"max_tokens": 40})
        long = [Asking(server, LONG) for _ in range(4)]
        until(lambda: fresh.stats().num_running >= 4)
        begin = time.monotonic()
        server.server.stop()
        refused = server.post("/v1/completions", LONG)
        assert refused.status == 503
        assert refused.json["error"]["code"] == "shutting_down"
        assert server.get("/health").status == 503
        assert short.last == "[DONE]"
        for client in long:
            assert client.last == "[DONE]" or client.last["error"]["code"] == "shutting_down"
        until(lambda: server.server.should_exit)
        assert time.monotonic() - begin < 9.0  # 5 to finish in, and what a busy machine adds
        assert server.server.exit_code == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_ends_the_server(fresh: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(fresh) as server:
        clients = [Asking(server, LONG) for _ in range(4)]
        until(lambda: fresh.stats().num_running == 4)

        def fail() -> None:
            raise RuntimeError("a fault of the machine")

        monkeypatch.setattr(fresh._core, "step", fail)
        until(lambda: not fresh.is_alive)
        health = server.get("/health")
        assert health.status == 503
        assert health.json["status"] == "engine_dead"
        for client in clients:
            assert client.last["error"]["code"] == "engine_dead"
        until(lambda: server.server.should_exit, seconds=3.0)
        assert server.server.exit_code == 1
