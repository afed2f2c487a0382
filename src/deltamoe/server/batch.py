"""The engine's requests behind one HTTP request.

A request with many prompts needs one free place only: it keeps a few of its prompts in the engine
at a time, and waits for one of its own to finish rather than fail half-way. Leaving early cancels
whatever is left. Knows nothing of JSON.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from fastapi import Request as HttpRequest

from deltamoe.engine import Engine, Piece, QueueFullError, Request, Result, Ticket
from deltamoe.server.errors import ApiError
from deltamoe.server.metrics import Metrics

__all__ = ["Batch", "until_disconnect"]

_WINDOW = 16  # prompts of one request in the engine at once
_RETRY_S = 0.02

Answer = TypeVar("Answer")
Deliver = Callable[[int, Piece], None]


class Batch:
    """Requests that are answered together.

    Args:
        engine: runs them.
        metrics: told of each result.
        requests: at least one; the first is submitted at once.

    Raises:
        QueueFullError, ConfigError, EngineDeadError, ShuttingDownError: the first was refused.
    """

    def __init__(self, engine: Engine, metrics: Metrics, requests: Sequence[Request]) -> None:
        self._engine = engine
        self._metrics = metrics
        self._todo = deque(enumerate(requests))
        self._tickets: dict[int, Ticket] = {}
        self.num_requests = len(requests)
        self._next = self._submit()

    def _submit(self) -> tuple[int, Ticket]:
        number, request = self._todo[0]
        ticket = self._engine.submit(request)
        self._todo.popleft()
        self._tickets[number] = ticket
        return number, ticket

    async def run(self, deliver: Deliver | None = None) -> list[Result]:
        """Wait for all results, in the order of the requests.

        Args:
            deliver: called with (number of the request, piece) for each piece as it comes.

        Raises:
            DeltamoeError: the first failure of any; the others are cancelled.
        """
        results: dict[int, Result] = {}
        first: list[tuple[int, Ticket]] = [self._next]

        async def follow() -> None:
            while first or self._todo:
                number, ticket = first.pop() if first else await self._submit_patiently()
                if deliver is not None:
                    async for piece in ticket.apieces():
                        deliver(number, piece)
                result = await ticket.aresult()
                del self._tickets[number]
                self._metrics.finished(result)
                results[number] = result

        followers = [asyncio.create_task(follow()) for _ in range(min(self.num_requests, _WINDOW))]
        try:
            await asyncio.gather(*followers)
        finally:
            for follower in followers:
                follower.cancel()
            self.cancel()
        return [results[number] for number in range(self.num_requests)]

    async def _submit_patiently(self) -> tuple[int, Ticket]:
        while True:
            try:
                return self._submit()
            except QueueFullError:
                await asyncio.sleep(_RETRY_S)

    def cancel(self) -> None:
        """End what is not finished; nothing if all is."""
        self._todo.clear()
        while self._tickets:
            self._tickets.popitem()[1].cancel()


async def until_disconnect(request: HttpRequest, answer: Awaitable[Answer]) -> Answer:
    """Wait for an answer as long as somebody is there to hear it.

    Raises:
        ApiError: 499, the client is gone; ``answer`` is cancelled.
    """
    waiting = asyncio.ensure_future(answer)
    watching = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({waiting, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            await asyncio.wait({waiting})
            raise ApiError(499, "the client has closed the connection", code="client_closed")
        return waiting.result()
    finally:
        watching.cancel()
        waiting.cancel()


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
