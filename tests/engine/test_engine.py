import asyncio
import threading
import time

import pytest

from deltamoe.engine import (
    Engine,
    EngineDeadError,
    QueueFullError,
    Request,
    ShuttingDownError,
)
from deltamoe.engine.core import Core
from deltamoe.errors import ConfigError
from tests.engine.harness import COLD, OPTIONS, TOKENIZER, everything, model_of, prompt, solo

pytestmark = pytest.mark.usefixtures("unchecked")

REQUESTS = [
    Request(prompt=prompt("ab" * at), max_tokens=5 + at, temperature=1.0, seed=at, n=1 + at % 2)
    for at in range(1, 9)
]
LONG = Request(prompt=prompt("long"), max_tokens=5000, ignore_end=True)


@pytest.fixture
def engine():
    with Engine(model_of("hybrid"), TOKENIZER, OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected():
    return everything(solo(Core(model_of("hybrid"), TOKENIZER, COLD), REQUESTS))


def wait_until(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.005)


def is_idle(engine):
    stats = engine.stats()
    return stats.num_running == stats.num_waiting == 0 and stats.state_bytes == 0


def test_generate_answers_in_order(engine, expected):
    assert everything(engine.generate(REQUESTS)) == expected


def test_many_threads_may_ask(engine, expected):
    results = [None] * len(REQUESTS)

    def ask(at):
        results[at] = engine.submit(REQUESTS[at]).result(timeout=30.0)

    threads = [threading.Thread(target=ask, args=[at]) for at in range(len(REQUESTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert everything(results) == expected


def test_pieces_come_as_they_are_written(engine):
    ticket = engine.submit(LONG)
    pieces = ticket.pieces()
    first = next(pieces)
    assert first.finish_reason is None
    assert not ticket.is_done
    ticket.cancel()
    assert sum(len(piece.ids) for piece in pieces) < 5000
    assert ticket.result(timeout=5.0).choices[0].finish_reason == "cancelled"


def test_an_async_stream(engine, expected):
    async def read(request):
        return [piece async for piece in engine.stream(request)]

    async def read_all():
        return await asyncio.gather(*map(read, REQUESTS))

    for pieces, (choices, _) in zip(asyncio.run(read_all()), expected, strict=True):
        for choice in choices:
            own = [piece for piece in pieces if piece.index == choice.index]
            assert sum((piece.ids for piece in own), ()) == choice.ids


def test_an_async_result(engine, expected):
    async def read():
        return await engine.submit(REQUESTS[0]).aresult()

    assert everything([asyncio.run(read())]) == expected[:1]


def test_leaving_a_stream_cancels_it(engine):
    async def leave():
        async for _ in engine.stream(LONG):
            break

    asyncio.run(leave())
    wait_until(lambda: is_idle(engine))
    assert engine.stats().counters.num_cancelled == 1


def test_a_consumer_whose_loop_is_gone_harms_nobody(engine, expected):
    loop = asyncio.new_event_loop()
    ticket = engine.submit(LONG)
    pieces = ticket.apieces()
    loop.run_until_complete(anext(pieces))
    loop.close()
    assert everything(engine.generate(REQUESTS)) == expected
    ticket.cancel()
    wait_until(lambda: is_idle(engine))


def test_cancelling_takes_a_step(engine):
    ticket = engine.submit(LONG)
    next(ticket.pieces())
    steps = engine.stats().counters.num_steps
    ticket.cancel()
    ticket.result(timeout=5.0)
    # the step under way, and how far the thread may have come between the two lines above
    assert engine.stats().counters.num_steps - steps < 50
    wait_until(lambda: is_idle(engine))


def test_cancelling_what_is_done_does_nothing(engine):
    ticket = engine.submit(REQUESTS[0])
    result = ticket.result(timeout=10.0)
    ticket.cancel()
    ticket.cancel()
    assert ticket.result() == result
    assert engine.stats().counters.num_cancelled == 0


def test_a_result_may_take_too_long(engine):
    ticket = engine.submit(LONG)
    with pytest.raises(TimeoutError, match="was not finished"):
        ticket.result(timeout=0.01)
    ticket.cancel()


def test_a_full_queue_refuses_and_generate_waits(monkeypatch, expected):
    options = OPTIONS.__class__(
        **{**OPTIONS.__dict__, "max_sequences": 1, "max_waiting": 2, "context": 6000}
    )
    with Engine(model_of("hybrid"), TOKENIZER, options) as engine:
        tickets = [engine.submit(LONG)]
        next(tickets[0].pieces())
        tickets += [engine.submit(LONG) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait already"):
            engine.submit(LONG)
        for ticket in tickets:
            ticket.cancel()
        assert everything(engine.generate(REQUESTS)) == expected


def test_bad_requests_are_refused_at_once(engine):
    with pytest.raises(ConfigError, match="token ids from 0"):
        engine.submit(Request(prompt=(999,)))
    assert engine.is_alive


def test_closing_lets_the_running_finish(expected):
    engine = Engine(model_of("hybrid"), TOKENIZER, OPTIONS)
    tickets = [engine.submit(request) for request in REQUESTS]
    engine.close()
    assert everything([ticket.result() for ticket in tickets]) == expected
    with pytest.raises((ShuttingDownError, EngineDeadError)):
        engine.submit(REQUESTS[0])
    assert not engine.is_alive


def test_closing_ends_what_does_not_finish():
    engine = Engine(model_of("hybrid"), TOKENIZER, OPTIONS)
    ticket = engine.submit(LONG)
    next(ticket.pieces())
    engine.close(grace_s=0.0)
    with pytest.raises(ShuttingDownError):
        ticket.result(timeout=1.0)
    with pytest.raises(ShuttingDownError):
        list(ticket.pieces())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_says_so(monkeypatch):
    engine = Engine(model_of("hybrid"), TOKENIZER, OPTIONS)
    tickets = [engine.submit(LONG) for _ in range(3)]
    next(tickets[0].pieces())

    def broken(*_):
        raise RuntimeError("a kernel broke")

    monkeypatch.setattr(engine._core.reader, "decode", broken)
    for ticket in tickets:
        with pytest.raises(EngineDeadError, match="a kernel broke"):
            ticket.result(timeout=5.0)
    wait_until(lambda: not engine.is_alive)
    assert isinstance(engine.failure, RuntimeError)
    with pytest.raises(EngineDeadError):
        engine.submit(REQUESTS[0])
    engine.close()


def test_the_heart_beats_while_there_is_nothing_to_do(engine):
    time.sleep(1.2)
    assert engine.heartbeat_age_s < 1.0
    clock = time.thread_time_ns  # this thread's own; the engine's is in the process's
    assert clock() >= 0
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.1  # idle costs next to nothing


def test_everything_comes_back(engine):
    for _ in range(3):
        tickets = [engine.submit(request) for request in REQUESTS]
        tickets[1].cancel()
        tickets[4].cancel()
        for ticket in tickets:
            ticket.result(timeout=10.0)
    wait_until(lambda: is_idle(engine))
    stats = engine.stats()
    assert stats.cache_bytes > 0
    counters = stats.counters
    assert counters.num_finished + counters.num_cancelled == 3 * len(REQUESTS)
    assert len(stats.expert_counts) == 4
    # a token is drawn from each one that is read behind the chunks of the prompts
    num_read = counters.num_prompt_tokens + counters.num_generated_tokens
    assert sum(stats.expert_counts[1]) == 2 * num_read


def test_the_model_keeps_its_mode():
    model = model_of("hybrid")
    with Engine(model, TOKENIZER, OPTIONS):
        assert not model.training


def test_aborting_ends_at_once():
    """Also in the middle of a step that takes long, and for whoever is closing meanwhile."""
    engine = Engine(model_of("hybrid"), TOKENIZER, OPTIONS)
    has_begun, may_end = threading.Event(), threading.Event()

    def stuck():
        has_begun.set()
        may_end.wait(20)

    engine._core.step = stuck
    tickets = [engine.submit(Request(prompt=prompt("a"), max_tokens=5)) for _ in range(3)]
    assert has_begun.wait(5)
    closing = threading.Thread(target=engine.close)
    closing.start()
    begin = time.monotonic()
    engine.abort()
    assert time.monotonic() - begin < 1.0
    closing.join(1)
    assert not closing.is_alive()
    for ticket in tickets:
        with pytest.raises(ShuttingDownError):
            ticket.result(timeout=1)
    with pytest.raises(ShuttingDownError):
        engine.submit(Request(prompt=prompt("a")))
    engine.close()
    may_end.set()
    engine._thread.join(5)
    assert not engine.is_alive
    assert engine.failure is None


def test_aborting_what_runs_takes_one_step():
    engine = Engine(model_of("hybrid"), TOKENIZER, OPTIONS)
    ticket = engine.submit(Request(prompt=prompt("a"), max_tokens=3000, ignore_end=True))
    next(ticket.pieces())
    begin = time.monotonic()
    engine.abort()
    assert time.monotonic() - begin < 0.5
    assert not engine.is_alive
    with pytest.raises(ShuttingDownError):
        ticket.result(timeout=1)
    engine.abort()
