"""A real browser on a real server: Debian's Chromium, driven by Playwright, and a tiny model.

Every test's page is watched: a request to another host, an error on the console or an exception in
the page fails the test.
"""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deltamoe.checkpoint import write_checkpoint, write_run_config, write_tensors
from deltamoe.config import DataConfig, RunConfig, to_json
from deltamoe.model import HybridLM
from deltamoe.testing import tiny_model
from deltamoe.tokenizer import ByteTokenizer

STEP = 30
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


def write_run_folder(folder: Path, model: HybridLM) -> Path:
    """A run as training leaves it: its metrics and one checkpoint, of a model as it is."""
    text = folder / "text.txt"
    text.write_text("Once upon a time. " * 200)
    data = DataConfig(path=str(text), context=32, cache=str(folder / "cache"))
    config = RunConfig(model=model.config, data=data)
    run = folder / "tiny"
    run.mkdir()
    write_run_config(run, config)
    with open(run / "metrics.jsonl", "w") as metrics:
        for step in range(1, STEP + 1):
            metrics.write(metrics_line(step))
    state = json.dumps({"format": 1, "step": STEP, "record": {"validation_bits_per_byte": 7.5}})
    files = {
        "model.safetensors": lambda path: write_tensors(path, model.state_dict()),
        "train_state.json": lambda path: path.write_text(state),
        "config.json": lambda path: path.write_text(to_json(config)),
        "tokenizer.json": lambda path: ByteTokenizer().save(path.parent),
    }
    write_checkpoint(run, STEP, files, expected_bytes=1 << 20)
    return run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of four layers."""
    return write_run_folder(tmp_path_factory.mktemp("runs"), tiny_model())


def metrics_line(step: int, **more: Any) -> str:
    """One record of metrics.jsonl, with three sparse layers of five experts."""
    record = {
        "format": 1,
        "step": step,
        "loss": 6.0 * 0.97**step,
        "lr": 1e-3,
        "grad_norm": 1.0 + 1.0 / step,
        "tokens": 256 * step,
        "tokens_per_s": 900.0 + step,
        "load": {str(layer): [60, 50, 40, 54, 52] for layer in (1, 2, 3)},
        "max_vio": {str(layer): 0.17 for layer in (1, 2, 3)},
        "dead_experts": {str(layer): 0 for layer in (1, 2, 3)},
        "half_life": {str(layer): {"median": 6.0, "min": 0.5, "max": 90.0} for layer in range(3)},
        "memory_norm": {str(layer): 2.0 for layer in range(3)},
        **more,
    }
    return json.dumps(record) + "\n"


class Server:
    """An explorer in a thread of this process, at ``address`` until ``stop``."""

    def __init__(self, app: Any) -> None:
        import uvicorn

        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        self.address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        config = uvicorn.Config(
            app, http="h11", lifespan="off", log_level="error", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        """Answer nobody any more."""
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(timeout=10)


@pytest.fixture(scope="session")
def opened_run(run_folder: Path) -> Any:
    """The tiny run, opened."""
    from deltamoe.inference.opened import open_model

    return open_model(run_folder)


@pytest.fixture(scope="session")
def server(run_folder: Path, opened_run: Any) -> Iterator[Server]:
    """The live model's server."""
    from deltamoe.explorer.app import create_app
    from deltamoe.explorer.live import Live

    live = Live(opened_run, name="tiny", prompt_tokens=512)
    made = Server(create_app(model=live, runs_folder=run_folder.parent, opened=run_folder))
    yield made
    made.stop()


@pytest.fixture(scope="session")
def trace_file(tmp_path_factory: pytest.TempPathFactory, opened_run: Any) -> Path:
    """A recorded run of the tiny model, as a file."""
    from deltamoe.explorer import trace

    path = tmp_path_factory.mktemp("traces") / "tiny.safetensors"
    found = trace(
        opened_run.model, opened_run.tokenizer, "Once upon a time", max_new_tokens=12, seed=1
    )
    found.save(path)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for a file's tests; while it runs, nobody else can have an event loop."""
    must = "CI_REQUIRES_CHROMIUM" in os.environ
    program = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        program = None
    if program is None:
        why = "needs Chromium and Playwright: apt-get install chromium; pip install playwright"
        if must:
            pytest.fail(why)
        pytest.skip(why)
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield found
        found.close()


class Watched:
    """What a page asked for and complained of."""

    def __init__(self, page: Any) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.expected: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._hear)

    def _hear(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def check(self) -> None:
        """Nothing foreign was asked for, and nothing unexpected complained of."""
        ours = ("http://127.0.0.1:", "data:", "blob:", "file:")
        foreign = [url for url in self.requests if not url.startswith(ours)]
        assert not foreign, foreign
        complaints = [c for c in self.complaints if not any(e in c for e in self.expected)]
        assert not complaints, complaints


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A fresh page of 1280 by 800; ``page.watched.expected`` excuses what a test provokes."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 800}, color_scheme="light", accept_downloads=True
    )
    context.set_default_timeout(20_000)
    made = context.new_page()
    made.watched = Watched(made)
    yield made
    made.watched.check()
    context.close()


def start(page: Any, address: str, **state: Any) -> None:
    """Open the page and wait until it has started."""
    hashed = "&".join(f"{key}={value}" for key, value in state.items())
    page.goto(address + (f"#{hashed}" if hashed else ""))
    page.wait_for_selector("body[data-started]")


def record(page: Any, prompt: str, *, write: int = 8) -> str:
    """Type a prompt and wait for its trace; returns the trace's id."""
    page.fill("input[name='tokens to write']", str(write))
    page.fill("textarea.prompt", prompt)
    page.press("textarea.prompt", "Enter")
    page.wait_for_selector(".token")
    show(page, "sparse")
    found: str = page.evaluate("new URLSearchParams(location.hash.slice(1)).get('trace')")
    return found


def show(page: Any, view: str) -> None:
    """Open a view and wait until it is drawn."""
    page.click(f".tab[data-view={view}]")
    page.wait_for_selector(f".panel-body[data-view={view}][data-ready]")


def until(page: Any, expression: str, *, timeout_s: float = 20) -> None:
    """Wait until an expression holds; Playwright's own waiting needs an eval the page forbids."""
    end = time.monotonic() + timeout_s
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"still not so after {timeout_s} s: {expression}"
        page.wait_for_timeout(40)
