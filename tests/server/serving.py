"""A server in a thread, on a real socket, around a tiny model."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

from fastapi import FastAPI

from deltamoe.engine import Engine
from deltamoe.server import Settings, create_app
from deltamoe.server.lifecycle import Server
from deltamoe.server.service import Service
from deltamoe.tokenizer import ChatTemplate

MODEL = "tiny"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events, the last one left as it is."""
        lines = [line for line in self.body.decode().split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        data = [line.removeprefix("data: ") for line in lines]
        return [item if item == "[DONE]" else json.loads(item) for item in data]


class Running:
    """A server that runs, and the plainest of clients."""

    def __init__(self, app: FastAPI, port: int, server: Server) -> None:
        self.app = app
        self.port = port
        self.server = server
        self.url = f"http://127.0.0.1:{port}"
        service = app.state.service
        assert isinstance(service, Service)
        self.service = service

    def ask(
        self,
        method: str,
        path: str,
        data: Any = None,
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        head = dict(headers or {})
        if data is not None:
            body = json.dumps(data).encode()
        if body is not None:
            head.setdefault("Content-Type", "application/json")
        connection.request(method, path, body, head)
        response = connection.getresponse()
        answer = Answer(
            response.status,
            {name.lower(): value for name, value in response.getheaders()},
            response.read(),
        )
        connection.close()
        return answer

    def post(self, path: str, data: Any, **headers: str) -> Answer:
        return self.ask("POST", path, data, headers)

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def connect(self, *, buffer: int = 0) -> socket.socket:
        """A connection; ``buffer`` bounds the bytes that wait at its end to be read."""
        connection = socket.socket()
        connection.settimeout(20)
        if buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def send(self, path: str, data: Any, *, buffer: int = 0) -> socket.socket:
        """A request on its way; what comes back is the caller's business."""
        body = json.dumps(data).encode()
        connection = self.connect(buffer=buffer)
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        return connection


@contextmanager
def running(
    engine: Engine, *, chat_template: ChatTemplate | None = None, **settings: Any
) -> Iterator[Running]:
    """Serve an engine for a while."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    port = listening.getsockname()[1]
    app = create_app(
        engine,
        engine.tokenizer,
        Settings(model_id=MODEL, port=port, **settings),
        chat_template=chat_template,
    )
    server = Server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        until(lambda: server.started)
        yield Running(app, port, server)
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


def until(condition: Any, *, seconds: float = 10.0) -> float:
    """Wait for a condition; how long it took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "it did not happen in time"
        time.sleep(0.005)
    return time.monotonic() - begin
