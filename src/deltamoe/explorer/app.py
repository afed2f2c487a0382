"""The web application behind the page: routes, checks, streams. Needs no torch.

It serves the page's files and the API of docs/explorer.md, from a live model or from a trace file.
The model works in one thread, one request after the other; what a request waits for is streamed,
and when the browser goes away the work stops.
"""

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from deltamoe.errors import ConfigError, DataError, DeltamoeError
from deltamoe.explorer import requests, runs, views, wire
from deltamoe.explorer.format import Trace, to_bytes
from deltamoe.explorer.quantities import MOST_TOKENS
from deltamoe.explorer.store import MOST_BYTES, MOST_TRACES, TraceStore
from deltamoe.version import __version__

__all__ = ["STATIC", "Model", "create_app"]

STATIC = Path(__file__).parent / "static"
_LOG = logging.getLogger("deltamoe")
_MOST_BODY_BYTES = 1 << 20
_BODY_S = 10.0  # a request's body must be here within so many seconds
_MOST_WAITING = 8
_PLACE = ("layer", "head", "token")
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

Event = dict[str, Any]
Tell = Callable[[Event], None]


@runtime_checkable
class Model(Protocol):
    """A model at work; ``deltamoe.explorer.live.Live`` is one."""

    source: dict[str, Any]
    prompt_tokens: int
    context: int
    chat_form: str

    def model(self) -> dict[str, Any]: ...  # noqa: D102  (see Live)
    def trace(self, request: requests.TraceRequest, tell: Tell) -> Trace: ...  # noqa: D102
    def branch(  # noqa: D102
        self, request: requests.BranchRequest, origin: Trace, tell: Tell
    ) -> Trace: ...
    def ablate(  # noqa: D102
        self, request: requests.AblateRequest, origin: Trace
    ) -> dict[str, Any]: ...
    def chat(  # noqa: D102
        self, request: requests.ChatRequest, tell: Tell
    ) -> dict[str, Any]: ...


class _RefusedError(Exception):
    """An answer other than 200, with its sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _GoneError(Exception):
    """Nobody waits for this work any more."""


def create_app(
    *,
    model: Model | None = None,
    first: Trace | None = None,
    runs_folder: Path | None = None,
    opened: Path | None = None,
    static: Path = STATIC,
    any_host: bool = False,
) -> ASGIApp:
    """The application.

    Args:
        model: a live model; None shows ``first`` alone.
        first: a trace that is there from the beginning.
        runs_folder: whose training runs are shown; None shows none.
        opened: the run that was opened, resolved; marked in the list of runs.
        static: the page's files.
        any_host: serve other hosts than this machine (a proxy in front does the checking).
    """
    explorer = _Explorer(model, first, runs_folder, opened)

    async def page(request: Request) -> Response:
        return FileResponse(static / "index.html")

    routes = [
        Route("/", page),
        Route("/api/status", explorer.status),
        Route("/api/model", explorer.describe_model),
        Route("/api/trace", explorer.trace, methods=["POST"]),
        Route("/api/branch", explorer.branch, methods=["POST"]),
        Route("/api/ablate", explorer.ablate, methods=["POST"]),
        Route("/api/chat", explorer.chat, methods=["POST"]),
        Route("/api/traces", explorer.traces),
        Route("/api/trace/{id}", explorer.summary),
        Route("/api/trace/{id}/file", explorer.file),
        Route("/api/trace/{id}/view/{view}", explorer.view),
        Route("/api/trace/{id}/{array}", explorer.array),
        Route("/api/runs", explorer.runs),
        Route("/api/runs/{name}", explorer.run),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            _RefusedError: _refuse,
            DeltamoeError: _refuse,
            404: _not_found,
            405: _not_found,
            Exception: _fail,
        },
    )
    app.mount("/static", StaticFiles(directory=static, check_dir=False))
    return _Guard(app, any_host=any_host)


class _Guard:
    """Refuses other hosts and origins, and adds the headers every answer carries."""

    def __init__(self, app: ASGIApp, *, any_host: bool) -> None:
        self._app, self._any_host = app, any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]
        }

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                present = {key for key, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(
                        (key.lower().encode(), value.encode())
                        for key, value in _HEADERS.items()
                        if key.lower().encode() not in present
                    ),
                ]
            await send(message)

        if not self._any_host and (why := _foreign(headers)):
            await _sentence(403, why)(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


def _foreign(headers: Mapping[str, str]) -> str:
    """Why a request is none of this machine's page; "" if it is."""
    host = headers.get("host", "")
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if name.lower() not in _LOOPBACK:
        return f"Host {host[:100]!a} is not this machine: open the page as http://127.0.0.1:PORT"
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
        return f"Origin {origin[:100]!a} is another site; only this page may ask"
    return ""


class _Explorer:
    """The routes' state: the traces kept, and the one thread the model works in."""

    def __init__(
        self, model: Model | None, first: Trace | None, folder: Path | None, opened: Path | None
    ) -> None:
        self._model, self._folder, self._opened = model, folder, opened
        self._store = TraceStore()
        self._first = first
        self._first_id = None if first is None else self._store.add(first)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="explorer")
        self._num_waiting = 0

    async def status(self, request: Request) -> Response:
        live = self._model
        found = self._first.summary["source"] if live is None and self._first else {}
        return JSONResponse(
            {
                "program": f"deltamoe {__version__}",
                "mode": "live" if live else "file" if self._first else "runs",
                "source": found if live is None else live.source,
                "trace": self._first_id,
                "has_runs": self._folder is not None,
                "chat": None if live is None else live.chat_form,
                "is_busy": self._num_waiting > 0,
                "limits": {
                    "prompt_tokens": None if live is None else live.prompt_tokens,
                    "hard_tokens": MOST_TOKENS,
                    "traces": MOST_TRACES,
                    "trace_bytes": MOST_BYTES,
                    "context": None if live is None else live.context,
                },
            }
        )

    async def describe_model(self, request: Request) -> Response:
        if self._model is not None:
            return JSONResponse(await run_in_threadpool(self._model.model))
        if self._first is None:
            raise _RefusedError(404, "nothing is open")
        summary = self._first.summary
        parts = {key: summary[key] for key in ("source", "tokenizer")}
        return JSONResponse({**parts, **summary["model"]})

    async def trace(self, request: Request) -> Response:
        model = self._live()
        asked = await _body(request, requests.TraceRequest)
        return self._recording(lambda tell: model.trace(asked, tell))

    async def branch(self, request: Request) -> Response:
        model = self._live()
        asked = await _body(request, requests.BranchRequest)
        origin = self._trace(asked.trace)
        return self._recording(lambda tell: model.branch(asked, origin, tell))

    async def ablate(self, request: Request) -> Response:
        model = self._live()
        asked = await _body(request, requests.AblateRequest)
        origin = self._trace(asked.trace)
        self._enter()
        try:
            loop = asyncio.get_running_loop()
            return JSONResponse(
                await loop.run_in_executor(self._worker, model.ablate, asked, origin)
            )
        finally:
            self._num_waiting -= 1

    async def chat(self, request: Request) -> Response:
        model = self._live()
        asked = await _body(request, requests.ChatRequest)
        return self._stream(lambda tell: model.chat(asked, tell))

    async def traces(self, request: Request) -> Response:
        kept = [
            {
                "id": name,
                **{
                    key: trace.summary[key]
                    for key in ("prompt", "text", "source", "num_tokens", "num_prompt_tokens")
                },
                "bytes": trace.nbytes,
            }
            for name, trace in self._store.newest_first()
        ]
        return JSONResponse({"traces": kept})

    async def summary(self, request: Request) -> Response:
        name = request.path_params["id"]
        return JSONResponse({"id": name, **self._trace(name).summary})

    async def file(self, request: Request) -> Response:
        trace = self._trace(request.path_params["id"])
        content = await run_in_threadpool(to_bytes, trace)
        return _binary(content, "attachment; filename=trace.safetensors")

    async def array(self, request: Request) -> Response:
        query = _query(request, "layer", "head", "token", "dtype")
        trace = self._trace(request.path_params["id"])
        chosen = {name: _whole(query, name) for name in _PLACE}

        def work() -> bytes:
            name = request.path_params["array"]
            return wire.answer(trace, name, **chosen, dtype=query.get("dtype", "f32"))

        return _binary(await run_in_threadpool(work))

    async def view(self, request: Request) -> Response:
        query = _query(request, *_PLACE)
        trace = self._trace(request.path_params["id"])
        layer, head, token = (_whole(query, name) for name in _PLACE)

        def work() -> dict[str, Any]:
            name = request.path_params["view"]
            return views.show(trace, name, layer=layer, head=head or 0, token=token or 0)

        return JSONResponse(await run_in_threadpool(work))

    async def runs(self, request: Request) -> Response:
        folder = self._folder
        found = (
            [] if folder is None else await run_in_threadpool(runs.list_runs, folder, self._opened)
        )
        return JSONResponse({"runs": found})

    async def run(self, request: Request) -> Response:
        if self._folder is None:
            raise DataError("no training run is open: this is a trace file or a model alone")
        query = _query(request, "from", "points")
        points = _whole(query, "points")
        found = await run_in_threadpool(
            runs.read_run,
            self._folder,
            request.path_params["name"],
            cursor=query.get("from"),
            points=2_000 if points is None else points,
        )
        return JSONResponse(found)

    def _live(self) -> Model:
        if self._model is None:
            raise _RefusedError(
                409,
                "only a trace file is open, and a file cannot answer: open the model with "
                "`deltamoe explore RUN`",
            )
        return self._model

    def _trace(self, name: str) -> Trace:
        return self._store.get(name)

    def _enter(self) -> None:
        if self._num_waiting >= _MOST_WAITING:
            raise _RefusedError(
                503, f"{self._num_waiting} requests wait for the model; try again in a moment"
            )
        self._num_waiting += 1

    def _recording(self, record: Callable[[Tell], Trace]) -> Response:
        def work(tell: Tell) -> Event:
            trace = record(tell)
            return {
                "id": self._store.add(trace),
                "num_tokens": trace.num_tokens,
                "num_prompt_tokens": trace.summary["num_prompt_tokens"],
                "bytes": trace.nbytes,
            }

        return self._stream(work)

    def _stream(self, work: Callable[[Tell], Event]) -> Response:
        """Do some work in the model's thread and send its events as they come."""
        self._enter()
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        is_gone = threading.Event()

        def tell(event: Event) -> None:
            if is_gone.is_set():
                raise _GoneError
            loop.call_soon_threadsafe(events.put_nowait, event)

        def run() -> None:
            try:
                tell({"event": "done", **work(tell)})
            except _GoneError:
                pass
            except DeltamoeError as fault:
                _tell_fault(tell, str(fault))
            except Exception as fault:
                _LOG.exception("explorer: a request failed")
                _tell_fault(tell, f"unexpected {type(fault).__name__}: {fault}")
            finally:
                loop.call_soon_threadsafe(leave)

        def leave() -> None:
            self._num_waiting -= 1
            events.put_nowait(None)

        async def send() -> AsyncIterator[str]:
            while (event := await events.get()) is not None:
                name = event.pop("event")
                yield f"event: {name}\ndata: {json.dumps(event)}\n\n"

        self._worker.submit(run)
        return _EventStream(send(), is_gone.set)


class _EventStream(StreamingResponse):
    """Server-sent events; ``on_end`` is called when all were sent or nobody listens any more."""

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


def _tell_fault(tell: Tell, message: str) -> None:
    with contextlib.suppress(_GoneError):
        tell({"event": "error", "message": message})


async def _body(request: Request, kind: type[Any]) -> Any:
    """The request's body as one of ``requests``' classes, read with a bound on size and time."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise _RefusedError(415, "Content-Type: expected application/json")

    async def read() -> bytes:
        content = b""
        async for chunk in request.stream():
            content += chunk
            if len(content) > _MOST_BODY_BYTES:
                raise _RefusedError(413, f"a request has at most {_MOST_BODY_BYTES:,} bytes")
        return content

    try:
        content = await asyncio.wait_for(read(), _BODY_S)
    except TimeoutError:
        raise _RefusedError(408, f"the request took longer than {_BODY_S:.0f} s") from None
    except ClientDisconnect:
        raise _RefusedError(400, "the request was cut short") from None
    return requests.parse_request(content, kind)


def _query(request: Request, *known: str) -> Mapping[str, str]:
    """The request's query, which may ask for nothing else."""
    if unknown := sorted(set(request.query_params) - set(known)):
        raise ConfigError(f"unknown query {unknown[0][:40]!a}; expected {', '.join(known)}")
    return request.query_params


def _whole(query: Mapping[str, str], name: str) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    if not text.removeprefix("-").isdecimal() or len(text) > 10:
        raise ConfigError(f"{name} = {text[:40]!a}: expected a whole number")
    return int(text)


def _binary(content: bytes, disposition: str = "inline") -> Response:
    headers = {"Content-Disposition": disposition}
    return Response(content, media_type="application/octet-stream", headers=headers)


def _sentence(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message}}, status_code=status)


async def _refuse(request: Request, fault: Exception) -> Response:
    if isinstance(fault, _RefusedError):
        return _sentence(fault.status, str(fault))
    return _sentence(404 if isinstance(fault, DataError) else 400, str(fault))


async def _not_found(request: Request, fault: Any) -> Response:
    if fault.status_code == 404:
        return _sentence(404, f"nothing at {request.url.path[:200]}; docs/explorer.md has the API")
    return _sentence(fault.status_code, f"{request.method} is not for {request.url.path[:200]}")


async def _fail(request: Request, fault: Exception) -> Response:
    return _sentence(500, f"unexpected {type(fault).__name__}: {fault}")
