"""``deltamoe trace``: a file to look at, a text to read, and sentences for what cannot be."""

import json
from pathlib import Path

import pytest

from deltamoe.cli import main
from deltamoe.explorer import read_trace
from tests.saved_run import save_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"))


def test_a_file_and_a_text(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.safetensors"
    assert main(["trace", str(run), "--prompt", "def f", "--out", str(out), "--seed", "1"]) == 0
    said = capsys.readouterr()
    recorded = read_trace(out)
    assert recorded.summary["prompt"] == "def f"
    assert said.out.startswith("def f" + recorded.summary["text"][:1])
    assert f"deltamoe explore {out}" in said.err
    num_checks = len(recorded.summary["checks"])
    assert f"{num_checks} of {num_checks} checks hold" in said.err


def test_it_writes_what_generate_writes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = [str(run), "--prompt", "def f", "--max-tokens", "8", "--temperature", "0", "--json"]
    assert main(["generate", *shared]) == 0
    ids = json.loads(capsys.readouterr().out)["ids"]
    assert main(["trace", *shared, "--out", str(tmp_path / "a.safetensors")]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert [token["id"] for token in tokens if not token["is_prompt"]] == ids


def test_layers_are_chosen(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    assert main(["trace", str(run), "--out", str(out), "--capture", "1"]) == 0
    assert read_trace(out).layers("mixer.output") == (1,)
    assert main(["trace", str(run), "--out", str(out), "--capture", "none"]) == 0
    assert "mixer.output" not in read_trace(out).arrays


def test_what_cannot_be(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "a.safetensors")
    assert main(["trace", str(run)]) == 2
    assert main(["trace", str(run), "--out", out, "--capture", "some"]) == 2
    assert main(["trace", str(run), "--out", out, "--capture", "7"]) == 2
    assert main(["trace", str(run), "--out", out, "--longest", "4000"]) == 2
    assert main(["trace", str(run), "--out", out, "--prompt", "x" * 600]) == 2
    assert main(["trace", str(tmp_path / "nothing"), "--out", out]) == 3
    assert not Path(out).exists()
    assert "Traceback" not in capsys.readouterr().err
