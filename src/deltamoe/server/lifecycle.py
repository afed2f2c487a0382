"""From a listening socket to the exit code of the process that served.

The first SIGTERM or SIGINT ends the server with what runs: new requests are told 503, running ones
have ``grace_s`` to finish and are told so otherwise. A second signal ends it at once. An engine
that died takes the process with it, so that whoever watches the process starts another.
"""

import asyncio
import gc
import logging
import os
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from deltamoe.server.guard import MAX_HEADER_BYTES, guarded_protocol
from deltamoe.server.service import Service

__all__ = ["Server", "serve"]

_LOG = logging.getLogger("deltamoe.server")
_LAST_WORDS_S = 1.0  # for answers that are being sent when the engine has ended


class Server(uvicorn.Server):
    """uvicorn with our endings.

    Attributes:
        exit_code: 0, or 1 if the engine died.
    """

    def __init__(self, app: FastAPI) -> None:
        service = app.state.service
        assert isinstance(service, Service)
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=guarded_protocol(settings),  # type: ignore[arg-type]  # any factory will do
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=settings.keep_alive_s,
                timeout_graceful_shutdown=int(_LAST_WORDS_S),
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            )
        )
        self.exit_code = 0
        self._service = service
        self._ending: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note the first signal, which the loop sees within a tenth of a second; obey the second.

        Nothing is written that could be left half done, so the second ends the process here.
        """
        if self._service.is_draining:
            os._exit(128 + sig)
        self.stop()

    def stop(self) -> None:
        """What the first signal does, for a server in a thread."""
        self._service.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        """Look for a signal and at the engine, ten times a second."""
        if self._ending is None:
            if not self._service.engine.is_alive and not self._service.is_draining:
                _LOG.error("the engine died", exc_info=self._service.engine.failure)
                self.exit_code = 1
                self._ending = asyncio.create_task(self._say_last_words())
            elif self._service.is_draining:
                self._ending = asyncio.create_task(self._drain())
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        grace_s = max(self._service.settings.grace_s - _LAST_WORDS_S, 0.0)
        await asyncio.to_thread(self._service.engine.close, grace_s=grace_s)
        await self._say_last_words()

    async def _say_last_words(self) -> None:
        waited_s = 0.0 if self.exit_code == 0 else -_LAST_WORDS_S  # /health says why, for a second
        while waited_s < _LAST_WORDS_S and (self._service.num_requests or waited_s < 0):
            await asyncio.sleep(0.02)
            waited_s += 0.02
        self.should_exit = True


def serve(app: FastAPI, *, sockets: list[socket.socket] | None = None) -> int:
    """Answer until told to end.

    Args:
        app: as ``create_app`` made it.
        sockets: listening already; None opens the one of the settings.

    Returns:
        0 after a signal, 1 if the engine died.
    """
    server = Server(app)
    # What is there now stays: looking through it again for garbage would hold up every stream for
    # a third of a second, each time a client sends a quarter of a million brackets.
    gc.collect()
    gc.freeze()
    server.run(sockets=sockets)
    return server.exit_code
