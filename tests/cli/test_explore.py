"""``deltamoe explore``: serves a run or a trace on this machine, and leaves on Ctrl-C."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from deltamoe.cli import main
from deltamoe.explorer import read_trace, trace, views
from deltamoe.testing import tiny_model
from deltamoe.tokenizer import ByteTokenizer
from tests.saved_run import save_run


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "a.safetensors"
    trace(tiny_model(), ByteTokenizer(), "to be").save(path)
    return path


def test_a_trace_file_is_served_without_torch(trace_file: Path) -> None:
    """From start to Ctrl-C: the address, an answer, no torch in the process."""
    code = (
        "import sys; from deltamoe.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 7 * ('torch' in sys.modules))"
    )
    words = ["explore", str(trace_file), "--port", "0", "--no-browser"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+/", said)
            assert found, said
            with urllib.request.urlopen(f"{found[0]}api/status", timeout=20) as answer:
                assert json.load(answer)["mode"] == "file"
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0


def test_json_is_what_the_page_would_show(
    trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explore", str(trace_file), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["trace"]["prompt"] == "to be"
    assert shown["model"]["parameters"]["total"] > 0
    run = save_run(tmp_path)
    (run / "metrics.jsonl").write_text('{"format": 1, "step": 1, "loss": 5.0}\n')
    assert main(["explore", str(run), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["trace"] is None
    assert [item["name"] for item in shown["runs"]] == ["run"]


def test_the_numbers_of_a_view(
    trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = {"layer": 1, "head": 3, "token": -1}
    words = [f"--{key}={value}" for key, value in place.items()]
    assert main(["explore", str(trace_file), "--json", "--view", "memory", *words]) == 0
    expected = views.show(read_trace(trace_file), "memory", **place)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(expected))

    run = save_run(tmp_path)
    (run / "metrics.jsonl").write_text('{"format": 1, "step": 1, "loss": 5.0}\n')
    assert main(["explore", str(run), "--json", "--view", "runs"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["opened"]["records"][0]["loss"] == 5.0
    assert [one["name"] for one in shown["runs"]] == [run.name]

    for words, sentence in (
        ([str(run), "--json", "--view", "memory"], "deltamoe trace"),
        ([str(trace_file), "--view", "memory"], "--json"),
        ([str(trace_file), "--json", "--view", "dreams"], "the views are tokens"),
    ):
        assert main(["explore", *words]) == 2
        assert sentence in capsys.readouterr().err


def test_a_port_that_is_taken(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["explore", str(trace_file), "--no-browser", "--port", str(port)]) == 2
    assert f"port {port} is taken" in capsys.readouterr().err


def test_what_is_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"<script>" * 10)
    for wrong, sentence in ((path, "header"), (tmp_path / "nothing", "there is nothing there")):
        assert main(["explore", str(wrong), "--json"]) == 3
        said = capsys.readouterr()
        assert said.err.startswith("error: ")
        assert sentence in said.err
        assert not said.out


def test_a_run_without_a_checkpoint_shows_its_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path)
    (run / "metrics.jsonl").write_text('{"format": 1, "step": 1, "loss": 5.0}\n')
    shutil.rmtree(run / "checkpoints")
    assert main(["explore", str(run), "--json"]) == 0
    said = capsys.readouterr()
    assert "only the training is shown" in said.err
    shown = json.loads(said.out)
    assert shown["model"] is None
    assert [found["name"] for found in shown["runs"]] == [run.name]
