"""What a submitted request is to whoever waits for it: pieces as they come, and a result.

The engine's thread puts pieces in; one consumer takes them out, blocking or with asyncio. Knows
nothing of how they are made.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from deltamoe.engine.request import Piece, Result

__all__ = ["Ticket", "wake"]


class Ticket:
    """One submitted request.

    Args:
        id: names it in logs.
        cancel: asks the engine to end it.

    Attributes:
        id: as given.
    """

    def __init__(self, id: str, cancel: Callable[["Ticket"], None]) -> None:
        self.id = id
        self._cancel = cancel
        self._pieces: deque[Piece] = deque()
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    @property
    def is_done(self) -> bool:
        """Whether nothing follows."""
        return self._result is not None or self._error is not None

    def cancel(self) -> None:
        """End the request within one step; its result is what it has written so far."""
        self._cancel(self)

    def pieces(self) -> Iterator[Piece]:
        """Everything that is added to any choice, as it comes.

        Raises:
            BaseException: the error that ended the request.
        """
        while True:
            is_done = self.is_done  # before the pieces: none comes after
            while self._pieces:
                yield self._pieces.popleft()
            if is_done:
                break
            with self._changed:
                while not self._pieces and not self.is_done:
                    self._changed.wait()
        if self._error is not None:
            raise self._error

    async def apieces(self) -> AsyncIterator[Piece]:
        """``pieces`` for asyncio."""
        changed = asyncio.Event()
        self._waiting = asyncio.get_running_loop(), changed
        try:
            while True:
                changed.clear()
                is_done = self.is_done
                while self._pieces:
                    yield self._pieces.popleft()
                if is_done:
                    break
                await changed.wait()
        finally:
            self._waiting = None
        if self._error is not None:
            raise self._error

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the end.

        Args:
            timeout: in seconds; None waits as long as it takes.

        Raises:
            TimeoutError: it took longer; the request goes on.
            BaseException: the error that ended the request.
        """
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self.is_done:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"request {self.id} was not finished after {timeout} s")
                self._changed.wait(left)
        return self._ended()

    async def aresult(self) -> Result:
        """``result`` for asyncio; pieces that come meanwhile are passed over."""
        async for _ in self.apieces():
            pass
        return self._ended()

    def _ended(self) -> Result:
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    # The engine's side

    def on_piece(self, piece: Piece) -> None:
        """Put a piece in; ``wake`` tells the consumer."""
        self._pieces.append(piece)

    def on_result(self, result: Result) -> None:
        """Nothing follows."""
        self._result = result

    def on_error(self, error: BaseException) -> None:
        """Nothing follows."""
        self._error = error


def wake(tickets: "set[Ticket]") -> None:
    """Tell the consumers of these tickets that something has come; once a loop and step."""
    events: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for ticket in tickets:
        if (waiting := ticket._waiting) is not None:
            events.setdefault(waiting[0], []).append(waiting[1])
        with ticket._changed:
            ticket._changed.notify_all()
    for loop, changed in events.items():
        try:
            loop.call_soon_threadsafe(_set_all, changed)
        except RuntimeError:  # the loop was closed, and its consumer with it
            continue


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
