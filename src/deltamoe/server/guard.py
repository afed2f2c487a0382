"""What stands between the network and the endpoints.

``Guard`` looks at a request's head before its body is read: who asks (key), through which name
(host), from which page (origin), how much is to come. ``guarded_protocol`` bounds what the HTTP
library leaves open: the time a request may take to arrive, the time an answer may go unread, and
the number of connections. Refusing is all either does. Knows nothing of models.
"""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from deltamoe.server.errors import ApiError, as_api_error
from deltamoe.server.service import Service, key_scope
from deltamoe.server.settings import Settings, is_loopback

__all__ = ["MAX_HEADER_BYTES", "Guard", "GuardedProtocol", "guarded_protocol"]

MAX_HEADER_BYTES = 16 << 10
_LINGER_S = 2.0
_LINGER_BYTES = 16 << 20
_OPEN = ("/health",)  # answered without a key
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type",
    "Access-Control-Max-Age": "600",
}


class Guard:
    """The outermost layer of the app.

    Args:
        app: what is guarded.
        service: whose settings hold, and whose requests are counted.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        settings = service.settings
        self._keys = [(_digest(key), key_scope(key)) for key in settings.api_keys]
        self._names = {"localhost", settings.host.lower()}
        self._names |= {name.lower() for name in settings.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a refusal, or hand the request on with its body read."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        origin = headers.get("origin")
        answering = _Answering(send)
        self._service.num_requests += 1
        try:
            if origin is not None and origin != _own_origin(scope, headers):
                answering.origin = self._checked_origin(origin)
            self._check_host(headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _send(answering, 204, b"", _PREFLIGHT)
                return
            scope["deltamoe.scope"] = self._check_key(scope, headers)
            self._check_body(scope, headers)
            body = await self._read_body(receive)
            if body is None:
                return
            scope["deltamoe.body_bytes"] = len(body)
            await self._app(scope, _replayed(body, receive), answering)
        except Exception as error:
            if answering.status:
                raise
            await self._refuse(as_api_error(error), headers, receive, answering)
        finally:
            self._service.num_requests -= 1
            self._service.metrics.answered(answering.status)

    def _check_host(self, headers: dict[str, str]) -> None:
        try:
            host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        except ValueError:  # half an IPv6 address
            host = ""
        if host.lower() not in self._names and not self._is_own_address(host):
            raise ApiError(
                403,
                f"the name {host[:100]!r} is not this server's; its owner can allow it "
                "with --allow-host",
                code="host_not_allowed",
            )

    def _checked_origin(self, origin: str) -> str:
        if origin not in self._service.settings.allowed_origins:
            raise ApiError(
                403,
                f"pages of {origin[:100]!r} may not call this server; its owner can allow them "
                "with --allow-origin",
                code="origin_not_allowed",
            )
        return origin

    def _is_own_address(self, host: str) -> bool:
        """Whether a host is a plain address, which no foreign name can be made to lead to."""
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return address.is_loopback or not is_loopback(self._service.settings.host)

    def _check_key(self, scope: Scope, headers: dict[str, str]) -> str:
        """The scope of the key that was sent."""
        if not self._keys or scope["path"] in _OPEN:
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = _digest(given.strip() if scheme.lower() == "bearer" else "")
        found = ""
        for known, its_scope in self._keys:  # every one, so that time tells nothing
            if hmac.compare_digest(known, digest):
                found = its_scope
        if not found:
            raise ApiError(
                401,
                "expected an API key of this server: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found

    def _check_body(self, scope: Scope, headers: dict[str, str]) -> None:
        if self._service.is_draining and scope["path"] not in _OPEN:
            raise ApiError(
                503,
                "the server is shutting down",
                code="shutting_down",
                headers={"Retry-After": "5"},
            )
        most = self._service.settings.max_body_bytes
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > most:
            raise _too_large(most)
        if scope["method"] in ("POST", "PUT", "PATCH"):
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(
                    415,
                    f"content type {kind[:60]!r}: expected application/json",
                    code="unsupported_media_type",
                )

    async def _read_body(self, receive: Receive) -> bytes | None:
        """The whole body; None if the client left."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._service.settings.max_body_bytes:
                raise _too_large(self._service.settings.max_body_bytes)
            if not message.get("more_body", False):
                return bytes(body)

    async def _refuse(
        self, error: ApiError, headers: dict[str, str], receive: Receive, send: Send
    ) -> None:
        """Answer at once; what is still being sent is read and thrown away for a moment.

        Closing a connection on bytes that nobody has read would reset it, and the client would see
        that instead of the answer.
        """
        is_pending = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        extra = error.headers | ({"Connection": "close"} if is_pending else {})
        await _send(send, error.status, error.encoded(), extra, is_last=not is_pending)
        if not is_pending:
            return
        num_bytes, more = 0, True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while more and num_bytes < _LINGER_BYTES:
                    message = await receive()
                    num_bytes += len(message.get("body", b""))
                    more = message.get("more_body", False)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most:,} bytes", code="request_too_large")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("latin-1", "replace")).digest()


def _own_origin(scope: Scope, headers: dict[str, str]) -> str:
    return f"{scope['scheme']}://{headers.get('host', '')}"


class _Answering:
    """Sends an answer, with what browsers should know added.

    Attributes:
        origin: the foreign page that may read it.
        status: that was sent; 0 before.
    """

    def __init__(self, send: Send) -> None:
        self.origin: str | None = None
        self.status = 0
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            extra = [(b"x-content-type-options", b"nosniff")]
            if self.origin is not None:
                extra += [
                    (b"access-control-allow-origin", self.origin.encode("latin-1")),
                    (b"vary", b"Origin"),
                ]
            message = {**message, "headers": [*message["headers"], *extra]}
        await self._send(message)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A body that has been read, once; then whatever the connection says."""
    is_read = False

    async def receiving() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receiving


async def _send(
    send: Send, status: int, body: bytes, headers: dict[str, str], *, is_last: bool = True
) -> None:
    head = {"content-length": str(len(body)), **headers}
    if body:
        head["content-type"] = "application/json"
    encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in head.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body, "more_body": not is_last})


class GuardedProtocol(H11Protocol):
    """One connection, with deadlines.

    Args:
        settings: holds them.
        others: as for uvicorn's protocol.
    """

    def __init__(self, settings: Settings, *args: Any, **others: Any) -> None:
        super().__init__(*args, **others)
        self._settings = settings
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse one connection too many; start the clock of any other."""
        super().connection_made(transport)
        if (why := self._why_refused()) is not None:
            transport.write(_raw_refusal(why))
            transport.close()
            return
        self._await_request()

    @property
    def address(self) -> str:
        """The client's, without its port; "" where there is none."""
        return self.client[0] if self.client else ""

    def _why_refused(self) -> str | None:
        settings = self._settings
        if len(self.connections) > settings.max_connections:
            return f"more than {settings.max_connections} connections are open"
        if not self.address or is_loopback(self.address):
            return None
        theirs = sum(
            isinstance(other, GuardedProtocol) and other.address == self.address
            for other in self.connections
        )
        if theirs > settings.max_connections_per_address:
            return (
                f"more than {settings.max_connections_per_address} connections from {self.address}"
            )
        return None

    def data_received(self, data: bytes) -> None:
        """Take bytes; the clock runs until they are a whole request."""
        if self._deadline is None:
            self._await_request()
        super().data_received(data)
        self._stop_if_received()

    def _await_request(self) -> None:
        self._deadline = self.loop.call_later(self._settings.receive_timeout_s, self._give_up)

    def _stop_if_received(self) -> None:
        if self.conn.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED, h11.ERROR):
            self._stop(self._deadline)
            self._deadline = None

    def on_response_complete(self) -> None:
        """Between requests the keep-alive time counts; in mid-request, the deadline."""
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE:
            self._stop(self._deadline)
            self._deadline = None

    def pause_writing(self) -> None:
        """The client does not read: wait for it, but not for ever."""
        super().pause_writing()
        if self._write_deadline is None:
            self._write_deadline = self.loop.call_later(
                self._settings.write_timeout_s, self._give_up
            )

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self._stop(self._write_deadline)
        self._write_deadline = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clocks."""
        self._stop(self._deadline)
        self._stop(self._write_deadline)
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


def guarded_protocol(settings: Settings) -> Callable[..., asyncio.Protocol]:
    """What uvicorn makes its connections with."""
    return partial(GuardedProtocol, settings)


def _raw_refusal(why: str) -> bytes:
    body = json.dumps(ApiError(503, why, code="too_many_connections").body()).encode()
    lines: Iterable[str] = (
        "HTTP/1.1 503 Service Unavailable",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Retry-After: 1",
        "Connection: close",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
