"""The engine's requests behind one HTTP request.

A request with many prompts needs one free place only: it keeps a few of its prompts in the engine
at a time, and waits for one of its own to finish rather than fail half-way. Leaving early cancels
whatever is left. A grammar is compiled aside, while the streams go on. Knows nothing of JSON.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from fastapi import Request as HttpRequest

from deltamoe.engine import Piece, QueueFullError, Request, Result, Ticket
from deltamoe.server.errors import ApiError
from deltamoe.server.service import Service

__all__ = ["Batch", "until_disconnect"]

_WINDOW = 16  # prompts of one request in the engine at once
_RETRY_S = 0.02

Answer = TypeVar("Answer")
Deliver = Callable[[int, Piece], Awaitable[None]]


class Batch:
    """Requests that are answered together.

    Args:
        service: whose engine runs them.
        requests: at least one.
    """

    def __init__(self, service: Service, requests: Sequence[Request]) -> None:
        self._service = service
        self._todo = deque(enumerate(requests))
        self._num_requests = len(requests)
        self._tickets: dict[int, Ticket] = {}
        self._is_admitted = False

    async def run(self, deliver: Deliver | None = None) -> list[Result]:
        """Wait for all results, in the order of the requests.

        Args:
            deliver: called with (number of the request, piece) for each piece as it comes; while it
                waits, pieces gather in the engine and wake nobody.

        Raises:
            QueueFullError: there is no room for the first.
            DeltamoeError: the first failure of any; the others are cancelled.
        """
        results: dict[int, Result] = {}

        async def follow() -> None:
            while self._todo:
                number, ticket = await self._submit()
                if deliver is not None:
                    async for piece in ticket.apieces():
                        await deliver(number, piece)
                result = await ticket.aresult()
                del self._tickets[number]
                self._service.metrics.finished(result)
                results[number] = result

        followers = [asyncio.create_task(follow()) for _ in range(min(self._num_requests, _WINDOW))]
        try:
            await asyncio.gather(*followers)
        finally:
            for follower in followers:
                follower.cancel()
            self.cancel()
        return [results[number] for number in range(self._num_requests)]

    async def _submit(self) -> tuple[int, Ticket]:
        number, request = self._todo.popleft()
        while True:
            try:
                ticket = await _submitted(self._service, request)
            except QueueFullError:
                if not self._is_admitted:
                    raise
                await asyncio.sleep(_RETRY_S)
            else:
                self._is_admitted = True
                self._tickets[number] = ticket
                return number, ticket

    def cancel(self) -> None:
        """End what is not finished; nothing if all is."""
        self._todo.clear()
        while self._tickets:
            self._tickets.popitem()[1].cancel()


async def _submitted(service: Service, request: Request) -> Ticket:
    """Hand a request to the engine; where a grammar is to be compiled, in the thread for that."""
    if request.json_schema is None:
        return service.engine.submit(request)
    service.check_room()
    service.num_compiling += 1
    compiling = service.compiler.submit(service.engine.submit, request)
    try:
        return await asyncio.wrap_future(compiling)
    except asyncio.CancelledError:
        compiling.add_done_callback(_end)  # it may be too late to stop it
        raise
    finally:
        service.num_compiling -= 1


def _end(submitted: "Future[Ticket]") -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()


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
