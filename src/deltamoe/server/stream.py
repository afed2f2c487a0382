"""Server-sent events: pieces of text as they come, an error where one breaks them off, the end.

Knows nothing of what is in an event.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from deltamoe.engine import Piece, Result
from deltamoe.server.batch import Batch
from deltamoe.server.errors import as_api_error
from deltamoe.server.pace import Pace

__all__ = ["EventStream", "PieceStream", "event"]


class PieceStream:
    """The pieces of a batch, several at a time where the reader is slower than the model.

    Args:
        batch: what runs; ``close`` cancels it.
        pace: how often the streams of this server send.

    Attributes:
        results: of all requests, once ``next`` has returned nothing.
    """

    def __init__(self, batch: Batch, pace: Pace) -> None:
        self.results: list[Result] = []
        self._batch = batch
        self._ready: dict[tuple[int, int], list[Piece]] = {}
        self._has_news = asyncio.Event()
        self._is_reading = asyncio.Event()
        self._is_reading.set()
        self._run = asyncio.create_task(batch.run(self._deliver))
        self._run.add_done_callback(self._note_end)
        self._pace = pace
        self._is_closed = False
        pace.num_streams += 1

    async def _deliver(self, number: int, piece: Piece) -> None:
        self._ready.setdefault((number, piece.index), []).append(piece)
        self._has_news.set()
        await self._is_reading.wait()

    def _note_end(self, run: asyncio.Task[list[Result]]) -> None:
        self._has_news.set()
        if not run.cancelled():
            run.exception()  # has been seen, also if nobody is left to hear of it

    async def next(self) -> list[tuple[int, Piece]]:
        """What has come since: (number of the request, piece), one a choice; [] at the end.

        Raises:
            DeltamoeError: a request failed; what came before has been returned.
        """
        await self._has_news.wait()
        self._has_news.clear()
        if self._run.done():
            self._has_news.set()
        if self._ready:
            ready, self._ready = self._ready, {}
            return [(number, _joined(pieces)) for (number, _), pieces in ready.items()]
        if self._run.done():
            self.results = self._run.result()
        return []

    async def pause(self) -> None:
        """Let a few tokens gather if many streams are open."""
        if not self._run.done() and (interval_s := self._pace.interval_s):
            self._is_reading.clear()
            await asyncio.sleep(interval_s)
            self._is_reading.set()
            await asyncio.sleep(0)  # what has gathered is delivered before it is sent

    def close(self) -> None:
        """Cancel what is not finished."""
        if not self._is_closed:
            self._is_closed = True
            self._pace.num_streams -= 1
            self._run.cancel()
            self._batch.cancel()


def _joined(pieces: list[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    return Piece(
        index=pieces[0].index,
        text="".join(piece.text for piece in pieces),
        ids=tuple(token_id for piece in pieces for token_id in piece.ids),
        logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
        finish_reason=pieces[-1].finish_reason,
    )


_JSON = json.JSONEncoder(separators=(",", ":"))  # ``json.dumps`` would make one for each event


def event(data: Any) -> bytes:
    """One event."""
    return b"data: " + _JSON.encode(data).encode() + b"\n\n"


class EventStream(Response):
    """A response that is written while its pieces come.

    Args:
        stream: where they come from.
        first: the pieces that have come already.
        render: makes the events of some pieces.
        finish: makes the last events, once the results are there.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        stream: PieceStream,
        first: list[tuple[int, Piece]],
        *,
        render: Callable[[list[tuple[int, Piece]]], Iterator[bytes]],
        finish: Callable[[list[Result]], Iterator[bytes]],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._stream = stream
        self._first = first
        self._render = render
        self._finish = finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until they end, or the client is gone."""

        async def write() -> None:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            async for data in self._events():
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        writing, watching = asyncio.create_task(write()), asyncio.create_task(watch())
        try:
            await asyncio.wait({writing, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stream.close()
            writing.cancel()
            watching.cancel()
            await asyncio.gather(writing, watching, return_exceptions=True)
        if not writing.cancelled():
            writing.result()

    async def _events(self) -> AsyncIterator[bytes]:
        pieces = self._first
        try:
            while pieces:
                if data := b"".join(self._render(pieces)):
                    yield data
                    await self._stream.pause()
                pieces = await self._stream.next()
            yield b"".join(self._finish(self._stream.results)) + b"data: [DONE]\n\n"
        except Exception as error:
            yield event(as_api_error(error).body())
