"""``deltamoe serve`` as a process: what it says, whom it answers, how it ends."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from deltamoe.cli import main
from deltamoe.cli.serve import read_keys
from deltamoe.errors import BadFileError
from tests.saved_run import save_run

LONG = {"prompt": "a", "max_tokens": 3000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("serve"))


@contextmanager
def served(run: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process, where it listens, and what it has said so far."""
    process = subprocess.Popen(
        [sys.executable, "-m", "deltamoe", "serve", str(run), "--port", "0", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DELTAMOE_API_KEY": "key-of-the-environment"},
    )
    said: list[str] = []
    assert process.stderr is not None
    try:
        for line in process.stderr:
            said.append(line)
            if "http://" in line:
                break
        else:
            raise AssertionError("".join(said))
        address = next(word for word in line.split() if word.startswith("http://"))
        yield process, address, said
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def ask(address: str, path: str, data: object = None) -> tuple[int, bytes]:
    connection = HTTPConnection(urlsplit(address).netloc, timeout=30)
    head = {"Authorization": "Bearer key-of-the-environment", "Content-Type": "application/json"}
    connection.request("GET" if data is None else "POST", path, json.dumps(data), head)
    response = connection.getresponse()
    answer = response.status, response.read()
    connection.close()
    return answer


def test_it_serves_and_ends_when_told(run: Path) -> None:
    options = ("--context", "4Ki", "--states", "64Mi", "--cache", "8Mi", "--name", "mine")
    with served(run, *options) as (process, address, said):
        assert "a conversation takes" in said[0]
        assert "context 4,096 tokens" in said[1]
        assert "1 API key" in said[2]
        status, body = ask(address, "/v1/models")
        assert status == 200
        assert json.loads(body)["data"][0]["id"] == "mine"
        answers: list[tuple[int, bytes]] = []
        clients = [
            threading.Thread(target=lambda: answers.append(ask(address, "/v1/completions", LONG)))
            for _ in range(32)
        ]
        for client in clients:
            client.start()
        begin = time.monotonic()
        while b"deltamoe_sequences_running 32.0" not in ask(address, "/metrics")[1]:
            assert time.monotonic() - begin < 20
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert process.wait(timeout=20) == 0
        assert time.monotonic() - begin < 12.0  # ten to finish in, and what a busy machine adds
        for client in clients:
            client.join(timeout=10)
        assert len(answers) == 32
        for status, body in answers:
            assert status == 200
            last = body.decode().strip().rpartition("data: ")[2]
            assert last == "[DONE]" or json.loads(last)["error"]["code"] == "shutting_down"


def test_what_is_refused_before_a_model_is_read(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DELTAMOE_API_KEY", raising=False)
    for options, says in (
        (["--host", "0.0.0.0"], "--api-key"),
        (["--port", "99999"], "port"),
        (["--api-key", "short"], "at least 8"),
        (["--allow-origin", "*"], "origins"),
        (["--host", "203.0.113.7", "--api-key", "long-enough"], "cannot listen"),
    ):
        assert main(["serve", str(run), *options]) == 2
        assert says in capsys.readouterr().err
    assert main(["serve", str(run), "--api-key-file", str(tmp_path / "none")]) == 3
    assert main(["serve", str(tmp_path / "nothing"), "--port", "0"]) == 3


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one-key-here\n\ntwo-keys-here\n")
    assert read_keys(file, " three-key ") == ["three-key", "one-key-here", "two-keys-here"]
    assert read_keys(None, "") == []
    for content in (b"", b"\xff\xfe", b"x" * (1 << 17)):
        file.write_bytes(content)
        with pytest.raises(BadFileError):
            read_keys(file, "")
