"""What the network may not do, over real sockets."""

import socket
import time
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest
from starlette.routing import Route

from deltamoe.engine import Engine
from tests.server.serving import Running, running, until

KEYS = {"api_keys": ("first-key", "second-key")}
ASKED = {"prompt": "a", "max_tokens": 2}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def hasty(engine: Engine) -> Iterator[Running]:
    """A server with short deadlines."""
    limits = {"receive_timeout_s": 0.6, "keep_alive_s": 1, "write_timeout_s": 0.6}
    with running(engine, max_connections=40, **limits) as server:
        yield server


@pytest.fixture(scope="module")
def locked(engine: Engine) -> Iterator[Running]:
    """A server with keys."""
    with running(engine, allowed_origins=("https://good.example",), **KEYS) as server:
        yield server


def closed_after(connection: socket.socket) -> float:
    """Seconds until the other side has closed."""
    begin = time.monotonic()
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    connection.close()
    return time.monotonic() - begin


def test_every_route_wants_a_key(locked: Running) -> None:
    routes = [r for r in _routes(locked.app.routes) if isinstance(r, Route) or hasattr(r, "path")]
    asked = 0
    for route in routes:
        for method in getattr(route, "methods", None) or ():
            path = route.path.replace("{model_id:path}", "x").replace("{state_id}", "x")
            for headers in (
                {},
                bearer("wrong-key"),
                bearer(""),
                {"Authorization": "Basic first-key"},
            ):
                answer = locked.ask(method, path, ASKED if method == "POST" else None, headers)
                assert answer.status == (200 if path == "/health" else 401), (method, path)
                asked += 1
    assert asked > 60  # the list of routes was not empty
    assert locked.get("/nowhere").status == 401
    assert locked.get("/v1/models").json["error"]["code"] == "invalid_api_key"
    for key in KEYS["api_keys"]:
        assert locked.get("/v1/models", **bearer(key)).status == 200


def _routes(routes: list) -> list:
    """Routes, those of included routers among them."""
    found = []
    for route in routes:
        inner = getattr(getattr(route, "original_router", None), "routes", None)
        found += _routes(inner) if inner else [route]
    return found


def test_states_belong_to_a_key(locked: Running) -> None:
    one, two = (bearer(key) for key in KEYS["api_keys"])
    kept = locked.post("/v1/states", {"prompt": "secret"}, **one).json["id"]
    assert locked.get(f"/v1/states/{kept}", **one).status == 200
    assert locked.get(f"/v1/states/{kept}", **two).status == 404
    assert locked.get("/v1/states", **two).json["data"] == []
    assert locked.post("/v1/completions", ASKED | {"state": kept}, **two).status == 404


def test_beginnings_belong_to_a_key(locked: Running) -> None:
    one, two = (bearer(key) for key in KEYS["api_keys"])
    asked = {"prompt": "a secret document " * 8, "max_tokens": 1}

    def cached(key: dict[str, str]) -> int:
        usage = locked.post("/v1/completions", asked, **key).json["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert cached(one) == 0
    assert cached(one) > 0
    assert cached(two) == 0


def test_forged_names_are_refused(server: Running) -> None:
    for host in ("evil.example", "evil.example:8000", "8.8.8.8", "", "[", "localhost.evil.example"):
        answer = server.get("/v1/models", Host=host)
        assert answer.status == 403, host
        assert answer.json["error"]["code"] == "host_not_allowed"
    for host in ("localhost", "127.0.0.1:1234", "[::1]:80"):
        assert server.get("/v1/models", Host=host).status == 200, host


def test_foreign_pages_are_refused(locked: Running) -> None:
    key = bearer("first-key")
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        assert locked.post("/v1/completions", ASKED, Origin=origin, **key).status == 403
    own = locked.post("/v1/completions", ASKED, Origin=locked.url, **key)
    assert own.status == 200
    assert "access-control-allow-origin" not in own.headers
    good = locked.post("/v1/completions", ASKED, Origin="https://good.example", **key)
    assert good.headers["access-control-allow-origin"] == "https://good.example"
    preflight = {"Access-Control-Request-Method": "POST"}
    asked = locked.ask(
        "OPTIONS", "/v1/completions", headers=preflight | {"Origin": "https://good.example"}
    )
    assert asked.status == 204
    assert "Authorization" in asked.headers["access-control-allow-headers"]
    evil = locked.ask("OPTIONS", "/", headers=preflight | {"Origin": "https://evil.example"})
    assert evil.status == 403


def test_only_json_is_read(server: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = server.ask("POST", "/v1/completions", ASKED, {"Content-Type": kind})
        assert answer.status == 415, kind


def test_large_bodies_are_refused_at_once(server: Running) -> None:
    begin = time.monotonic()
    answer = server.ask("POST", "/v1/completions", body=b"[" + b" " * (2 << 20))
    assert answer.status == 413
    assert answer.json["error"]["code"] == "request_too_large"
    assert time.monotonic() - begin < 1.0  # 0.1 on a quiet machine
    connection = server.connect()
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: application/json\r\n\r\n"
    )
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    for _ in range(40):
        connection.sendall(chunk)
    assert b" 413 " in connection.recv(65536)
    connection.close()


def test_an_announced_large_body_is_not_waited_for(server: Running) -> None:
    times = []
    for _ in range(5):
        connection = server.connect()
        begin = time.monotonic()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2097152\r\n"
            b"Content-Type: application/json\r\nExpect: 100-continue\r\n\r\n"
        )
        assert b" 413 " in connection.recv(65536)  # nothing of the body was sent
        times.append(time.monotonic() - begin)
        connection.close()
    assert min(times) < 0.1


def test_too_many_brackets_hold_nobody_up(server: Running) -> None:
    """Lists of lists where texts are expected: one complaint, not one for each."""
    for body in (b'{"prompt": [' + b"[]," * 300_000 + b"[]]}", b"[" * 500_000):
        begin = time.monotonic()
        answer = server.ask("POST", "/v1/completions", body=body)
        assert answer.status == 400
        assert len(answer.body) < 2000
        assert time.monotonic() - begin < 3.0  # 0.4 on a quiet machine; 10 with all complaints


def test_large_heads_are_refused(server: Running) -> None:
    connection = server.connect()
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 40_000)
    assert b" 400 " in connection.recv(65536)
    connection.close()


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"POST /v1/completions HTTP/1.1\r\nHost: local",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 20\r\n\r\n{",
    ],
    ids=["silent", "in mid-head", "in mid-body"],
)
def test_slow_senders_are_cut(hasty: Running, said: bytes) -> None:
    connection = hasty.connect()
    connection.sendall(said)
    assert 0.3 < closed_after(connection) < 2.5


def test_a_trickle_does_not_help(hasty: Running) -> None:
    connection = hasty.connect()
    begin = time.monotonic()
    is_open = True
    while is_open and time.monotonic() - begin < 5.0:
        try:
            connection.sendall(b"x")
            time.sleep(0.05)
        except OSError:  # reset or broken pipe, as the system has it
            is_open = False
    connection.close()
    assert time.monotonic() - begin < 3.0


def test_idle_connections_are_closed_and_busy_ones_kept(hasty: Running) -> None:
    client = HTTPConnection("127.0.0.1", hasty.port, timeout=20)
    for _ in range(5):
        client.request("GET", "/health")
        response = client.getresponse()
        assert response.status == 200
        response.read()
        connection = client.sock
        time.sleep(0.3)  # together longer than the receive deadline
    assert client.sock is connection  # it was one connection all the time
    assert closed_after(connection) < 3.0
    client.close()


def test_long_answers_are_not_cut(hasty: Running) -> None:
    """The deadline is for requests; this answer takes longer."""
    asked = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "n": 8, "stream": True}
    begin = time.monotonic()
    while time.monotonic() - begin < 0.8:
        assert hasty.post("/v1/completions", asked).events[-1] == "[DONE]"


def test_one_connection_too_many(hasty: Running) -> None:
    others = [hasty.connect() for _ in range(40)]
    until(lambda: len(hasty.server.server_state.connections) >= 40)
    one_more = hasty.connect()
    assert b" 503 " in one_more.recv(65536)
    for connection in (*others, one_more):
        connection.close()
    until(lambda: not hasty.server.server_state.connections)
    assert hasty.get("/health").status == 200


def test_a_client_that_leaves_cancels(server: Running, engine: Engine) -> None:
    for stream in (True, False):
        before = engine.stats().counters.num_cancelled
        asked = {"prompt": "b", "max_tokens": 250, "n": 8, "ignore_eos": True, "stream": stream}
        connection = server.send("/v1/completions", asked)
        if stream:
            connection.recv(100)
        else:
            until(lambda: engine.stats().num_running)
        connection.close()
        until(lambda: engine.stats().num_running == 0, seconds=2.0)
        assert engine.stats().counters.num_cancelled == before + 1
        assert engine.stats().state_bytes == 0


def test_a_client_that_does_not_read_is_cut(engine: Engine) -> None:
    with running(engine, max_tokens=500, write_timeout_s=0.5) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        body = (
            b'{"prompt": "a", "max_tokens": 490, "n": 8, "ignore_eos": true, "stream": true, '
            b'"logprobs": 20}'
        )
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
            b"\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )
        until(lambda: server.service.num_requests == 1)
        until(lambda: server.service.num_requests == 0, seconds=30)
        until(lambda: engine.stats().num_running == 0)
        connection.close()
        assert server.get("/health").status == 200
