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

KEY = "key-of-the-environment"
LONG = {"prompt": "a", "max_tokens": 3000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("serve"))


@contextmanager
def served(
    run: Path, *options: str, key: str = KEY
) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process, where it listens, and what it has said so far."""
    process = subprocess.Popen(
        [sys.executable, "-m", "deltamoe", "serve", str(run), "--port", "0", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DELTAMOE_API_KEY": key},
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


def ask(address: str, path: str, data: object = None, key: str = KEY) -> tuple[int, bytes]:
    connection = HTTPConnection(urlsplit(address).netloc, timeout=30)
    head = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
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


def test_a_kept_text_is_offered_and_keys_share(run: Path, tmp_path: Path) -> None:
    text = "It was a bright cold day in April, and the clocks were striking thirteen."
    file = tmp_path / "april.safetensors"
    kept = ["generate", str(run), "--prompt", text, "--max-tokens", "0", "--save-state", str(file)]
    assert main(kept) == 0
    asked = {"prompt": " Winston", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    options = ("--load-state", str(file), "--load-state", f"again={file}", "--api-key", "other-key")
    options += ("--share-prefixes", "--exact-reuse", "--context", "1Ki", "--states", "64Mi")
    with served(run, *options) as (_, address, _):
        whole = json.loads(
            ask(address, "/v1/completions", asked | {"prompt": text + " Winston"})[1]
        )
        for name, key in (("april", KEY), ("again", "other-key")):
            behind = ask(address, "/v1/completions", asked | {"state": name}, key)
            assert json.loads(behind[1])["choices"] == whole["choices"]
        listed = json.loads(ask(address, "/v1/states")[1])["data"]
        assert {state["id"] for state in listed} == {"april", "again"}
        long = {"prompt": "a document that two keys read " * 8, "max_tokens": 1}
        cached = []
        for key in (KEY, "other-key"):
            usage = json.loads(ask(address, "/v1/completions", long, key)[1])["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert cached[0] == 0
        assert cached[1] > 0


def test_the_explorer_beside(run: Path) -> None:
    with served(run, "--explorer", "--states", "64Mi", "--cache", "0", key="") as (_, address, _):
        assert ask(address, "/explore")[0] == 307
        status, page = ask(address, "/explore/")
        assert status == 200
        assert b"static/app.js" in page
        assert ask(address, "/explore/static/app.js")[0] == 200
        assert json.loads(ask(address, "/explore/api/status")[1])["mode"] == "live"
        status, events = ask(
            address, "/explore/api/trace", {"prompt": "def f", "max_new_tokens": 4}
        )
        assert status == 200
        assert b"event: done" in events
        assert ask(address, "/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200
        for path in ("/explore/../secret", "/explore/static/../../app.py", "/explore/none"):
            assert ask(address, path)[0] == 404, path


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
        (["--explorer", "--api-key", "long-enough"], "--explorer"),
    ):
        assert main(["serve", str(run), *options]) == 2
        assert says in capsys.readouterr().err
    assert main(["serve", str(run), "--api-key-file", str(tmp_path / "none")]) == 3
    assert main(["serve", str(tmp_path / "nothing"), "--port", "0"]) == 3
    state = ["--load-state", str(tmp_path / "none.safetensors")]
    assert main(["serve", str(run), "--port", "0", *state]) == 3
    assert "none.safetensors" in capsys.readouterr().err


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one-key-here\n\ntwo-keys-here\n")
    assert read_keys(file, " three-key ") == ["three-key", "one-key-here", "two-keys-here"]
    assert read_keys(None, "") == []
    for content in (b"", b"\xff\xfe", b"x" * (1 << 17)):
        file.write_bytes(content)
        with pytest.raises(BadFileError):
            read_keys(file, "")
