"""``deltamoe serve`` as a process that meets with an accident, or with impatience."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.saved_run import save_run

LONG = {"prompt": "a", "max_tokens": 3000, "ignore_eos": True, "stream": True}

# The program, with an engine whose thread fails once a file is there.
DYING = """
import sys
from pathlib import Path

from deltamoe.cli import main
from deltamoe.engine.core import Core

step = Core.step

def fails(self):
    if Path(sys.argv[1]).exists():
        raise RuntimeError("a fault of the machine")
    step(self)

Core.step = fails
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("process"))


@contextlib.contextmanager
def serving(*command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and where it listens."""
    process = subprocess.Popen(
        [sys.executable, *command, "--port", "0"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "http://" in line)
        yield process, next(word for word in line.split() if word.startswith("http://"))
    finally:
        process.kill()
        process.communicate()


def get(address: str, path: str) -> tuple[int, bytes]:
    connection = HTTPConnection(urlsplit(address).netloc, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


class Asking(threading.Thread):
    """A client that keeps what it is told, to the end or to the break."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._connection = HTTPConnection(urlsplit(address).netloc, timeout=30)
        self.said = b""
        self.start()

    def run(self) -> None:
        body = json.dumps(LONG)
        head = {"Content-Type": "application/json"}
        with contextlib.suppress(OSError, HTTPException):
            self._connection.request("POST", "/v1/completions", body, head)
            response = self._connection.getresponse()
            while chunk := response.read1():
                self.said += chunk
        self._connection.close()


def wait_until_running(address: str, number: int) -> None:
    begin = time.monotonic()
    while f"deltamoe_sequences_running {number}.0".encode() not in get(address, "/metrics")[1]:
        assert time.monotonic() - begin < 20
        time.sleep(0.02)


def test_a_dead_engine_is_seen_and_ends_the_process(run: Path, tmp_path: Path) -> None:
    fault = tmp_path / "fault"
    with serving("-c", DYING, str(fault), "serve", str(run)) as (process, address):
        clients = [Asking(address) for _ in range(4)]
        wait_until_running(address, 4)
        fault.touch()
        begin = time.monotonic()
        is_well = True
        while is_well:
            assert time.monotonic() - begin < 2.0
            # it is over when the process is: nobody answers then
            with contextlib.suppress(OSError, HTTPException):
                is_well = get(address, "/health")[0] == 200
                continue
            is_well = False
        assert process.wait(timeout=10) == 1
        for client in clients:
            client.join(timeout=10)
            last = client.said.decode().strip().rpartition("data: ")[2]
            assert json.loads(last)["error"]["code"] == "engine_dead"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(run: Path, number: signal.Signals) -> None:
    with serving("-m", "deltamoe", "serve", str(run)) as (process, address):
        clients = [Asking(address) for _ in range(4)]
        wait_until_running(address, 4)
        process.send_signal(number)
        while get(address, "/health")[0] == 200:
            time.sleep(0.01)
        process.send_signal(number)
        begin = time.monotonic()
        assert process.wait(timeout=10) == 128 + number
        assert time.monotonic() - begin < 1.5
        for client in clients:
            client.join(timeout=10)
