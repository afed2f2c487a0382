"""Many clients at once, good and bad. The counts are those of a busy server, the model is tiny."""

import asyncio
import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

from deltamoe.engine import Engine, EngineOptions, Request, Ticket
from deltamoe.testing import tiny_model
from deltamoe.tokenizer import ByteTokenizer
from tests.server.serving import Running, running, until

MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def unchecked() -> Iterator[None]:
    """Here the time counts; that shapes are right is for the other tests to see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    options = EngineOptions(
        max_sequences=64, max_waiting=64, context=1024, state_bytes=256 * MIB, cache_bytes=0
    )
    with Engine(tiny_model(), ByteTokenizer(), options) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    with running(engine) as server:
        yield server


@dataclass
class Told:
    """What a client was told."""

    status: int
    head: dict[str, str]
    text: str
    num_tokens: int


async def ask(server: Running, data: dict[str, Any], path: str = "/v1/completions") -> Told:
    """A stream, read to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        body = json.dumps(data | {"stream_options": {"include_usage": True}}).encode()
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        told = Told(int((await reader.readline()).split()[1]), {}, "", 0)
        while (line := (await reader.readline()).decode().strip()) != "":
            name, _, value = line.partition(": ")
            told.head[name.lower()] = value
        is_whole = told.status != 200
        while line := (await reader.readline()).decode():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if event["choices"]:
                    choice = event["choices"][0]
                    told.text += choice.get("text", "")
                else:
                    told.num_tokens = event["usage"]["completion_tokens"]
            is_whole |= line.startswith("data: [DONE]")
        assert is_whole
        return told
    finally:
        writer.close()


async def health_waits(server: Running, done: asyncio.Event) -> list[float]:
    """Seconds that ``/health`` took, again and again."""
    waits = []
    while not done.is_set():
        begin = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b" 200 " in await reader.readline()
        writer.close()
        waits.append(time.monotonic() - begin)
        await asyncio.sleep(0.02)
    return waits


def p99(waits: list[float]) -> float:
    return sorted(waits)[int(0.99 * len(waits))]


def asked(number: int, *, max_tokens: int = 64) -> dict[str, Any]:
    return {
        "prompt": f"story {number} " * (1 + number % 5),
        "max_tokens": max_tokens,
        "temperature": 0.9 if number % 2 else 0.0,
        "seed": number,
        "ignore_eos": True,
        "stream": True,
    }


def test_64_streams_are_64_solos(server: Running, engine: Engine) -> None:
    async def at_once() -> list[Told]:
        return await asyncio.gather(*(ask(server, asked(number)) for number in range(64)))

    async def one_by_one() -> list[Told]:
        return [await ask(server, asked(number)) for number in range(64)]

    answers, alone = asyncio.run(at_once()), asyncio.run(one_by_one())
    assert [answer.status for answer in answers] == [200] * 64
    assert [answer.num_tokens for answer in answers] == [64] * 64
    for number in range(64):
        assert answers[number].text == alone[number].text, number
    assert engine.stats().state_bytes == 0


def test_256_at_once_are_answered_or_told_to_wait(server: Running) -> None:
    async def at_once() -> tuple[list[Told], list[float]]:
        done = asyncio.Event()
        watching = asyncio.create_task(health_waits(server, done))
        answers = await asyncio.gather(
            *(ask(server, asked(number, max_tokens=100)) for number in range(256))
        )
        done.set()
        return answers, await watching

    answers, waits = asyncio.run(at_once())
    assert {answer.status for answer in answers} <= {200, 429}
    answered = [answer for answer in answers if answer.status == 200]
    assert len(answered) >= 128  # 64 that run and 64 that wait
    assert all(answer.num_tokens == 100 for answer in answered)
    assert all(answer.head["retry-after"] for answer in answers if answer.status == 429)
    # 0.25 s on a quiet machine; here client, server and engine share two cores with others
    assert p99(waits) < 1.5


def test_grammars_are_compiled_beside_64_streams(server: Running) -> None:
    """A schema that takes a fifth of a second, eight times; the loop is asked meanwhile."""
    field = {
        f"field_{i}": {"type": "string", "pattern": f"^[a-z]{{1,{i % 50 + 1}}}$"}
        for i in range(900)
    }

    def nasty(number: int) -> dict[str, Any]:
        schema = {"type": "object", "properties": field | {f"own_{number}": {"type": "null"}}}
        form = {"type": "json_schema", "json_schema": {"name": "nasty", "schema": schema}}
        turns = [{"role": "user", "content": "fill it in"}]
        return {"messages": turns, "max_tokens": 4, "response_format": form, "stream": True}

    async def at_once() -> tuple[list[Told], list[Told], list[float]]:
        done = asyncio.Event()
        streams = [
            asyncio.create_task(ask(server, asked(number, max_tokens=200))) for number in range(56)
        ]
        await asyncio.sleep(0.2)
        watching = asyncio.create_task(health_waits(server, done))
        filled = await asyncio.gather(
            *(ask(server, nasty(number), "/v1/chat/completions") for number in range(8))
        )
        answers = await asyncio.gather(*streams)
        done.set()
        return filled, answers, await watching

    filled, answers, waits = asyncio.run(at_once())
    assert {answer.status for answer in answers} == {200}
    assert {answer.status for answer in filled} <= {200, 400}  # compiled, and too wide to follow
    assert all(answer.num_tokens == 200 for answer in answers)
    # 0.25 s is the bar; a machine that others use as well adds to it
    assert p99(waits) < 0.75
    assert server.service.num_compiling == 0


def test_a_client_that_leaves_while_its_grammar_is_compiled(
    server: Running, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_compiling, may_go_on = threading.Event(), threading.Event()
    submit = engine.submit

    def slowly(request: Request) -> Ticket:
        is_compiling.set()
        assert may_go_on.wait(10)
        return submit(request)

    monkeypatch.setattr(engine, "submit", slowly)
    before = engine.stats().counters.num_cancelled
    turns = [{"role": "user", "content": "a"}]
    form = {"type": "json_object"}
    asked = {"messages": turns, "max_tokens": 900, "response_format": form}
    clients = [server.send("/v1/chat/completions", asked) for _ in range(3)]
    assert is_compiling.wait(10)
    until(lambda: server.service.num_compiling == 3)
    for client in clients:
        client.close()
    until(lambda: server.service.num_compiling == 0)
    may_go_on.set()  # the first was begun, and its request goes in; the others never were
    until(lambda: engine.stats().counters.num_cancelled == before + 1)
    until(lambda: not engine.stats().num_running)
    assert engine.stats().counters.num_cancelled == before + 1


def test_no_grammar_is_compiled_for_a_full_queue() -> None:
    options = EngineOptions(max_sequences=1, max_waiting=0, context=2048, cache_bytes=0)
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
    asked = {"messages": [{"role": "user", "content": "a"}], "response_format": form}
    with Engine(tiny_model(), ByteTokenizer(), options) as engine, running(engine) as server:
        assert server.post("/v1/chat/completions", asked).status == 400
        data = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True}
        busy = server.send("/v1/completions", data)
        until(lambda: engine.stats().num_running == 1)
        assert server.post("/v1/chat/completions", asked).status == 429
        busy.close()


def test_clients_that_leave_at_random_leave_nothing(server: Running, engine: Engine) -> None:
    chance = random.Random(0)
    for _ in range(2):
        connections = []
        for number in range(100):
            data = asked(number, max_tokens=900) | {"stream": bool(number % 3)}
            connections.append(server.send("/v1/completions", data))
        until(lambda: server.service.num_requests == 100)
        until(lambda: engine.stats().num_running == 64)
        chance.shuffle(connections)
        for connection in connections:
            connection.close()
            time.sleep(chance.uniform(0.0, 0.004))

        def is_left() -> bool:
            stats = engine.stats()
            return bool(
                server.service.num_requests
                or stats.num_running
                or stats.num_waiting
                or stats.state_bytes
                or stats.cache_bytes
            )

        assert until(lambda: not is_left()) < 2.0
    assert server.service.pace.num_streams == 0


def test_slow_senders_do_not_starve_the_others(engine: Engine) -> None:
    with running(engine, receive_timeout_s=2.0) as server:
        quiet = min(ten(server) for _ in range(2))
        slow: list[socket.socket] = []
        for number in range(200):
            connection = server.connect()
            connection.sendall(
                [b"", b"GET /hea", b"POST /v1/completions HTTP/1.1\r\nHost:"][number % 3]
            )
            slow.append(connection)
        # twice the quiet time, and what a busy machine adds
        assert ten(server) < 2 * quiet + 1.0
        until(lambda: not server.server.server_state.connections, seconds=4.0)
        for connection in slow:
            connection.close()


def test_slow_readers_do_not_starve_the_others(engine: Engine) -> None:
    with running(engine, write_timeout_s=4.0) as server:
        quiet = min(ten(server) for _ in range(2))
        long = asked(0, max_tokens=300) | {"logprobs": 20}
        slow = [server.send("/v1/completions", long, buffer=2048) for _ in range(16)]
        until(lambda: engine.stats().num_running == 16)
        until(lambda: not engine.stats().num_running, seconds=30.0)  # written, but not read
        assert server.service.num_requests == 16
        assert ten(server) < 2 * quiet + 1.0
        for connection in server.server.server_state.connections:
            # two events of at most 64 KiB may be on their way when the library says stop
            assert connection.transport.get_write_buffer_size() < 256 << 10
        until(lambda: not server.service.num_requests, seconds=10.0)
        until(lambda: not server.server.server_state.connections)
        for connection in slow:
            connection.close()


def ten(server: Running) -> float:
    """Seconds for ten small requests, one after the other."""
    begin = time.monotonic()
    for number in range(10):
        assert asyncio.run(ask(server, asked(number, max_tokens=8))).status == 200
    return time.monotonic() - begin


def test_a_long_prompt_lets_the_others_go_on() -> None:
    """Between two tokens of those who write, ``step_tokens`` of a prompt are read, not more."""
    num_read, step = 2048, 16
    options = EngineOptions(
        max_sequences=4, context=num_read + 64, prefill_chunk=step, step_tokens=step, cache_bytes=0
    )
    with Engine(tiny_model(), ByteTokenizer(), options) as engine, running(engine) as server:

        async def at_once() -> tuple[Told, Told, Told]:
            writing = asyncio.create_task(ask(server, asked(1, max_tokens=400)))
            while not engine.stats().counters.num_generated_tokens:
                await asyncio.sleep(0.001)
            long = asyncio.create_task(
                ask(server, asked(2, max_tokens=1) | {"prompt": [1] * num_read})
            )
            while not engine.stats().num_prefilling:
                await asyncio.sleep(0.001)
            begin = engine.stats().counters.num_generated_tokens
            short = await ask(server, asked(3, max_tokens=4))
            assert engine.stats().num_prefilling == 1, "the long prompt was read before the short"
            told = await long
            assert engine.stats().counters.num_generated_tokens - begin >= num_read / step / 2
            return await writing, told, short

        for told in asyncio.run(at_once()):
            assert told.status == 200


def test_memory_does_not_grow_with_requests(server: Running) -> None:
    async def many(number: int) -> None:
        todo = iter(range(number))

        async def client() -> None:
            for each in todo:
                await ask(server, asked(each, max_tokens=4))

        await asyncio.gather(*(client() for _ in range(16)))

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")

    asyncio.run(many(200))
    begin, files = resident(), len(os.listdir("/proc/self/fd"))
    asyncio.run(many(300))
    assert resident() - begin < 5 * MIB  # 17 KiB a request; both ends are this process
    until(lambda: len(os.listdir("/proc/self/fd")) <= files + 4)
