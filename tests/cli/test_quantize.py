"""``deltamoe quantize``, and the verbs that read what it wrote."""

import json
from pathlib import Path

import pytest

from deltamoe.checkpoint import read_header
from deltamoe.cli import main
from tests.saved_run import save_run


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    return save_run(tmp_path)


@pytest.fixture
def quantized(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["quantize", str(run), str(tmp_path / "q4"), "--bits", "4"]) == 0
    capsys.readouterr()
    return tmp_path / "q4"


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("bits", ["8", "4"])
def test_it_writes_what_it_says(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: str
) -> None:
    out = tmp_path / "out"
    words = ["quantize", str(run), str(out), "--bits", bits]
    assert main([*words, "--dry-run"]) == 0
    assert "Nothing was written." in capsys.readouterr().out
    assert not out.exists()
    planned = told(capsys, *words, "--dry-run")
    written = told(capsys, *words)
    assert planned == written | {"written": False}
    assert (out / "model.safetensors").stat().st_size == written["num_bytes"]
    assert read_header(out / "model.safetensors").metadata["bits"] == bits
    assert main(words) == 3
    assert "exists already" in capsys.readouterr().err


def test_other_bits_are_wrong_usage(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(run), str(tmp_path / "out"), "--bits", "5"]) == 2
    assert main(["quantize", str(run), str(tmp_path / "out")]) == 2
    assert "--bits" in capsys.readouterr().err


def test_a_quantised_model_is_not_quantised_again(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(quantized), str(tmp_path / "again"), "--bits", "8"]) == 3
    assert "the model that it was made from" in capsys.readouterr().err


def test_generate_reads_it_and_quantises_on_load(
    run: Path, quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--prompt", "def", "--max-tokens", "12", "--temperature", "0"]
    ahead = told(capsys, "generate", str(quantized), *asked)
    on_load = told(capsys, "generate", str(run), "--quantize", "4", *asked)
    assert ahead["ids"] == on_load["ids"]
    assert len(ahead["ids"]) == 12


def test_generate_within_a_budget(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(quantized), "--max-tokens", "3", "--json"]
    assert main([*words, "--memory", "2Gi"]) == 0
    report = capsys.readouterr().err
    assert "experts: 5 of 5" in report
    assert "read from the disk" in report
    assert main([*words, "--memory", "1Mi"]) == 4
    assert "give that or more" in capsys.readouterr().err


def test_a_budget_needs_a_quantised_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(run), "--memory", "1Gi"]) == 2
    assert "deltamoe quantize" in capsys.readouterr().err


def test_eval_compares_two(run: Path, quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = told(capsys, "eval", str(quantized), "--against", str(run), "--max-tokens", "300")
    alone = told(capsys, "eval", str(run), "--max-tokens", "300")
    against = report["against"]
    assert against["bits_per_byte"] == alone["bits_per_byte"]
    assert against["perplexity_change"] == pytest.approx(
        2.718281828459045 ** (report["loss"] - alone["loss"]) - 1
    )
    assert report["bits_per_byte"] != alone["bits_per_byte"]
    assert main(["eval", str(quantized), "--against", str(run), "--max-tokens", "300"]) == 0
    shown = capsys.readouterr().out
    assert f"perplexity {against['perplexity_change']:+.3%} against" in shown
    same = told(capsys, "eval", str(run), "--against", str(run), "--max-tokens", "300")
    assert same["against"]["perplexity_change"] == 0


def test_it_cannot_be_trained(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in quantized.iterdir())
    assert main(["train", "--resume", str(quantized)]) == 2
    assert "cannot be trained on" in capsys.readouterr().err
    assert sorted(path.name for path in quantized.iterdir()) == before


def test_it_is_not_converted(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(quantized), str(tmp_path / "hf"), "--to", "hf"]) == 3
    assert "quantised to 4 bits" in capsys.readouterr().err


def test_inspect_and_verify(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = told(capsys, "inspect", str(quantized), "--deep")
    assert report["bits"] == 4
    assert report["finite"]
    assert told(capsys, "verify", str(quantized))["is_good"]
    assert main(["inspect", str(quantized)]) == 0
    assert "to 4 bits" in capsys.readouterr().out
    assert main(["verify", str(quantized)]) == 0
    assert "quantised to 4 bits" in capsys.readouterr().out


def test_plan(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = told(capsys, "plan", "kimi-linear-48b-a3b", "--dtype", "bf16")["generation"]
    four = told(capsys, "plan", "kimi-linear-48b-a3b", "--dtype", "bf16", "--quantize", "4")
    assert plain["bits"] is None
    # 4.5 bits for most of 49.1 billion parameters, 2 bytes for the embedding
    assert 27e9 < four["generation"]["weight_bytes"] < 29e9 < plain["weight_bytes"]
    assert told(capsys, "plan", str(quantized))["generation"]["bits"] == 4
    words = ["plan", "kimi-linear-48b-a3b", "--quantize", "4", "--memory", "12Gi"]
    assert main(words) == 0
    assert "of 6,656 stay in memory" in capsys.readouterr().out
