"""The API, asked as the page asks it, on a live model and on a trace alone."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from starlette.testclient import TestClient

from deltamoe.explorer import Trace, derive, read_trace, views
from deltamoe.explorer.app import create_app
from deltamoe.explorer.live import Live
from deltamoe.explorer.runs import runs_folder
from deltamoe.inference import OpenedModel, open_model
from tests.explorer.test_wire import decode
from tests.saved_run import save_run

HERE = "http://127.0.0.1:8100"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    run = save_run(tmp_path_factory.mktemp("runs"))
    (run / "metrics.jsonl").write_text('{"format": 1, "step": 1, "loss": 5.0}\n')
    return open_model(run)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("static")
    (folder / "index.html").write_text("<!doctype html><title>explorer</title>")
    (folder / "app.js").write_text("export {};\n")
    return folder


@pytest.fixture(scope="module")
def live(opened: OpenedModel, page: Path) -> Iterator[TestClient]:
    run = opened.checkpoint.path.parents[1]
    model = Live(opened, name="tiny", prompt_tokens=64)
    app = create_app(
        model=model,
        runs_folder=runs_folder(run),
        opened=run.resolve(),
        static=page,
    )
    with TestClient(app, base_url=HERE) as client:
        yield client
    model.close()


@pytest.fixture(scope="module")
def file(recorded: Trace, page: Path) -> Iterator[TestClient]:
    with TestClient(create_app(first=recorded, static=page), base_url=HERE) as client:
        yield client


def events(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def record(client: TestClient, **request: Any) -> str:
    asked = {"prompt": "to be", "max_new_tokens": 4, **request}
    name, data = events(client.post("/api/trace", json=asked))[-1]
    assert name == "done", data
    return str(data["id"])


def sentence(response: httpx.Response) -> str:
    return str(response.json()["error"]["message"])


def test_a_trace_is_streamed_and_kept(live: TestClient, tmp_path: Path) -> None:
    found = events(live.post("/api/trace", json={"prompt": "to be", "max_new_tokens": 4}))
    kinds = [name for name, _ in found]
    assert kinds[0] == "start"
    assert kinds[-1] == "done"
    assert kinds.count("layer_summary") == 2
    done = found[-1][1]
    summary = live.get(f"/api/trace/{done['id']}").json()
    assert summary["id"] == done["id"]
    assert summary["num_tokens"] == done["num_tokens"] == 6 + kinds.count("token")
    path = tmp_path / "a.safetensors"
    path.write_bytes(live.get(f"/api/trace/{done['id']}/file").content)
    kept = read_trace(path)
    assert kept.summary == {key: value for key, value in summary.items() if key != "id"}
    _, values = decode(live.get(f"/api/trace/{done['id']}/kda.beta?layer=0").content)
    np.testing.assert_array_equal(values, kept.array("kda.beta", 0))
    assert live.get("/api/traces").json()["traces"][0]["id"] == done["id"]


def test_a_branch_goes_on_from_another_token(live: TestClient) -> None:
    origin = record(live)
    found = events(
        live.post(
            "/api/branch",
            json={"trace": origin, "token": 3, "id": 65, "max_new_tokens": 2},
        )
    )
    assert found[-1][0] == "done"
    summary = live.get(f"/api/trace/{found[-1][1]['id']}").json()
    ids = [token["id"] for token in summary["tokens"]]
    old = [token["id"] for token in live.get(f"/api/trace/{origin}").json()["tokens"]]
    assert ids[:5] == [*old[:4], 65]
    assert summary["num_prompt_tokens"] == 5
    assert summary["source"]["branched_from"] == {"trace": origin, "token": 3, "id": 65}
    for bad in ({"token": 99, "id": 65}, {"token": 0, "id": 300}):
        name, data = events(live.post("/api/branch", json={"trace": origin, **bad}))[-1]
        assert name == "error"
        assert "counted from 0" in data["message"] or "vocabulary" in data["message"]


def test_ablation(live: TestClient) -> None:
    origin = record(live)
    found = live.post("/api/ablate", json={"trace": origin, "heads": [[0, 1]]}).json()
    assert found["divergence"] > 0
    assert found["switched_off"]["heads"] == [[0, 1]]
    surprise = decode(live.get(f"/api/trace/{origin}/tokens.surprise").content)[1]
    np.testing.assert_allclose(found["by_token"]["surprise_before"], surprise, rtol=1e-4, atol=1e-6)
    response = live.post("/api/ablate", json={"trace": origin, "layers": [7]})
    assert response.status_code == 400
    assert "layer 7" in sentence(response)


def test_chat_streams_text(live: TestClient) -> None:
    assert live.get("/api/status").json()["chat"] == "text"
    said = "to be or not to be " * 12  # long enough that its state is worth keeping
    asked = {"text": said, "max_tokens": 5, "temperature": 0}
    found = events(live.post("/api/chat", json=asked))
    assert found[0][0] == "start"
    name, done = found[-1]
    assert name == "done"
    assert found[0][1]["num_prompt_tokens"] == 1 + len(said)
    assert done["num_tokens"] <= 5
    text = "".join(data["text"] for kind, data in found if kind == "piece")
    again = events(live.post("/api/chat", json=asked))
    assert "".join(data["text"] for kind, data in again if kind == "piece") == text
    longer = events(live.post("/api/chat", json={**asked, "text": f"{said}{text} or"}))
    assert longer[-1][1]["num_cached_tokens"] > 0
    for route, wrong in (
        ("chat", {"messages": []}),
        ("chat", {}),
        ("trace", {}),
        ("trace", {"prompt": "", "messages": []}),
        ("trace", {"messages": [{"role": "user", "content": "hi"}]}),
    ):
        [(name, data)] = events(live.post(f"/api/{route}", json=wrong))
        assert name == "error"
        assert "text" in data["message"] or "one of the two" in data["message"]


def test_the_model_and_the_runs(live: TestClient, opened: OpenedModel) -> None:
    found = live.get("/api/model").json()
    assert found["parameters"]["total"] == opened.num_parameters
    assert [layer["mixer"] for layer in found["layers"]] == ["kda", "mla"]
    runs = live.get("/api/runs").json()["runs"]
    assert [run["name"] for run in runs] == ["run"]
    assert runs[0]["is_open"]
    assert live.get("/api/runs/run").json()["records"][0]["loss"] == 5.0
    assert live.get("/api/runs/other").status_code == 404


def test_the_views_as_numbers(file: TestClient, recorded: Trace) -> None:
    trace = file.get("/api/status").json()["trace"]
    found = file.get(f"/api/trace/{trace}/view/memory?layer=1&head=2&token=-1").json()
    shown = views.show(recorded, "memory", layer=1, head=2, token=-1)
    assert found == json.loads(json.dumps(shown))
    for query, status in (
        ("memory?layer=3", 404),
        ("memory?head=9", 404),
        ("memory?token=99", 404),
        ("memory?dtype=f16", 400),
        ("nothing", 400),
    ):
        assert file.get(f"/api/trace/{trace}/view/{query}").status_code == status, query


def test_a_file_alone_answers_the_same(file: TestClient, recorded: Trace) -> None:
    status = file.get("/api/status").json()
    assert status["mode"] == "file"
    summary = file.get(f"/api/trace/{status['trace']}").json()
    assert summary["tokens"] == recorded.summary["tokens"]
    _, values = decode(file.get(f"/api/trace/{status['trace']}/memory?layer=1&token=3").content)
    np.testing.assert_array_equal(values, derive.memory(recorded, 1, 3))
    assert file.get("/api/model").json()["config"] == recorded.summary["model"]["config"]
    assert file.get("/api/runs").json() == {"runs": []}
    for route in ("trace", "branch", "ablate", "chat"):
        response = file.post(f"/api/{route}", json={})
        assert response.status_code == 409
        assert "deltamoe explore RUN" in sentence(response)


def test_the_page_and_its_files(live: TestClient) -> None:
    assert "<title>explorer" in live.get("/").text
    script = live.get("/static/app.js")
    assert script.headers["content-type"].split(";")[0] == "text/javascript"
    for path in ("/static/../format.py", "/static/%2e%2e/format.py", "/etc/passwd", "/app.py"):
        assert live.get(path).status_code == 404


@pytest.mark.parametrize("path", ["/", "/static/app.js", "/api/status", "/api/nothing", "/nothing"])
def test_every_answer_carries_the_headers(live: TestClient, path: str) -> None:
    headers = live.get(path).headers
    assert headers["content-security-policy"].startswith("default-src 'self';")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:8100"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": HERE}, 200),
        ({"host": "localhost:8100"}, 200),
        ({"host": "[::1]:8100"}, 200),
    ],
)
def test_only_this_machine_and_this_page(
    live: TestClient, headers: dict[str, str], status: int
) -> None:
    assert live.get("/api/status", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (("GET", "/api/nothing"), 404),
        (("POST", "/api/status"), 405),
        (("GET", "/api/trace/none"), 404),
        (("GET", "/api/trace/none/kda.beta"), 404),
        (("GET", "/api/runs/..%2f..%2fetc"), 404),
        (("GET", "/api/runs/run?points=1"), 400),
        (("GET", "/api/runs/run?from=x"), 400),
        (("GET", "/api/runs/run?until=1"), 400),
    ],
)
def test_errors_are_sentences(live: TestClient, request_: tuple[str, str], status: int) -> None:
    response = live.request(*request_)
    assert response.status_code == status
    assert sentence(response)


def test_bodies_are_checked(live: TestClient) -> None:
    assert live.post("/api/trace", content=b"{}").status_code == 415
    json_type = {"content-type": "application/json"}
    assert live.post("/api/trace", content=b"{", headers=json_type).status_code == 400
    big = b'{"prompt": "' + b"x" * (1 << 20) + b'"}'
    assert live.post("/api/trace", content=big, headers=json_type).status_code == 413
    assert live.post("/api/trace", json={"prompt": "x", "more": 1}).status_code == 400


def test_a_prompt_that_is_too_long_is_said(live: TestClient) -> None:
    [(name, data)] = events(live.post("/api/trace", json={"prompt": "x" * 100}))
    assert name == "error"
    assert "at most 64 together" in data["message"]


def test_arrays_are_asked_for_strictly(live: TestClient) -> None:
    origin = record(live)
    for query, status in (
        ("kda.beta?layer=x", 400),
        ("kda.beta?lay=1", 400),
        ("kda.beta?layer=1", 404),  # an MLA layer
        ("nothing", 404),
        ("kda.beta?dtype=f64", 404),
    ):
        assert live.get(f"/api/trace/{origin}/{query}").status_code == status, query


def test_a_fault_of_ours_is_an_event_and_the_next_request_works(
    live: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Trace:
        raise RuntimeError("broken")

    monkeypatch.setattr(Live, "trace", broken)
    [(name, data)] = events(live.post("/api/trace", json={"prompt": "x"}))
    assert (name, data["message"]) == ("error", "unexpected RuntimeError: broken")
    monkeypatch.undo()
    record(live)


def test_torch_stays_out() -> None:
    code = "import sys, deltamoe.explorer.app, deltamoe.explorer.wire, deltamoe.cli.explore; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Slow:
    """A model that speaks until nobody listens."""

    prompt_tokens = context = 10
    chat_form = "text"

    def __init__(self) -> None:
        self.source: dict[str, Any] = {}
        self.said = 0
        self.is_left = threading.Event()

    def chat(self, request: Any, tell: Any) -> dict[str, Any]:
        try:
            for _ in range(2_000):
                tell({"event": "piece", "text": "x"})
                self.said += 1
                time.sleep(0.005)
        except Exception:
            self.is_left.set()
            raise
        return {}

    def model(self) -> dict[str, Any]:
        return {}

    trace = branch = ablate = chat


@pytest.fixture
def slow(page: Path) -> Iterator[tuple[Slow, str]]:
    model = Slow()
    config = uvicorn.Config(
        create_app(model=model, static=page), port=0, log_level="warning", lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield model, f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_work_stops_when_the_browser_leaves(slow: tuple[Slow, str]) -> None:
    model, address = slow
    with httpx.stream("POST", f"{address}/api/chat", json={"text": "x"}) as response:
        pieces = response.iter_raw()  # held: dropping it would close the connection
        next(pieces)
        assert httpx.get(f"{address}/api/status").json()["is_busy"]
    assert model.is_left.wait(5.0)
    assert model.said < 1_000
    time.sleep(0.1)
    assert not httpx.get(f"{address}/api/status").json()["is_busy"]


def test_only_so_many_wait(slow: tuple[Slow, str]) -> None:
    _, address = slow
    streams = [
        httpx.stream("POST", f"{address}/api/chat", json={"text": "x"}, timeout=10)
        for _ in range(8)
    ]
    for stream in streams:
        assert stream.__enter__().status_code == 200
    refused = httpx.post(f"{address}/api/chat", json={"text": "x"})
    assert refused.status_code == 503
    assert "wait for the model" in sentence(refused)
    for stream in streams:
        stream.__exit__(None, None, None)
