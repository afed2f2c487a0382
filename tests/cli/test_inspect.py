"""``deltamoe inspect``: what is there is shown, what is wrong is the exit code."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from deltamoe.checkpoint import step_folder, write_checkpoint, write_run_config, write_tensors
from deltamoe.cli.inspect import command
from deltamoe.config.parse import to_json
from deltamoe.config.run import RunConfig
from deltamoe.errors import CheckpointError
from deltamoe.testing import tiny_config, tiny_model
from tests.published_folder import save_published_folder

CONFIG = RunConfig(model=tiny_config())


def inspect(*arguments: object) -> tuple[str, BaseException | None]:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    return result.output, result.exception


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    write_run_config(folder, CONFIG)
    for step in (10, 20):
        files = {
            "model.safetensors": lambda path: write_tensors(path, tiny_model().state_dict()),
            "config.json": lambda path: path.write_text(to_json(CONFIG)),
        }
        write_checkpoint(folder, step, files, expected_bytes=0)
    return folder


def test_a_run(run: Path) -> None:
    output, fault = inspect(run)
    assert fault is None
    for text in ("step-10", "step-20", "4 layers (kkkm)", "257", "blocks.0.mixer.A_log", "F32"):
        assert text in output


def test_a_step_as_json(run: Path) -> None:
    output, fault = inspect(step_folder(run, 10), "--json")
    assert fault is None
    report = json.loads(output)
    tensors = tiny_model().state_dict()
    assert report["step"] == 10
    assert report["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert {tensor["name"]: tensor["shape"] for tensor in report["tensors"]} == {
        name: list(tensor.shape) for name, tensor in tensors.items()
    }
    assert report["config"]["dim"] == CONFIG.model.dim
    assert [file["name"] for file in report["files"]] == ["config.json", "model.safetensors"]


def test_a_bad_checkpoint_is_shown_and_is_an_error(run: Path) -> None:
    (step_folder(run, 20) / "model.safetensors").write_bytes(b"short")
    output, fault = inspect(run)
    assert isinstance(fault, CheckpointError)
    assert "step-20" in str(fault)
    assert "blocks.0.mixer.A_log" in output  # of step-10
    output, fault = inspect(step_folder(run, 20))
    assert isinstance(fault, CheckpointError)
    assert "4 layers (kkkm)" in output


def test_deep_finds_what_headers_cannot_show(run: Path, tmp_path: Path) -> None:
    assert inspect(run, "--deep")[1] is None
    path = step_folder(run, 20) / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert inspect(run)[1] is None
    assert "SHA-256 differs" in str(inspect(run, "--deep")[1])

    write_tensors(tmp_path / "x.safetensors", {"bad": torch.tensor([1.0, torch.nan])})
    assert inspect(tmp_path / "x.safetensors")[1] is None
    assert "'bad': 1 of 2" in str(inspect(tmp_path / "x.safetensors", "--deep")[1])


def test_a_config_that_disagrees_with_the_tensors_is_an_error(run: Path) -> None:
    config = RunConfig(model=tiny_config(dim=32))
    files = {
        "model.safetensors": lambda path: write_tensors(path, tiny_model().state_dict()),
        "config.json": lambda path: path.write_text(to_json(config)),
    }
    write_checkpoint(run, 30, files, expected_bytes=0)
    assert "expected [257, 32]" in str(inspect(step_folder(run, 30))[1])


def test_text_from_the_file_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.zeros(2, 3)}, {"title": "\x1b[2J\x07 gone", "long": "x" * 999})
    output, fault = inspect(path)
    assert fault is None
    assert "\x1b" not in output
    assert "\\x1b[2J" in output
    assert "x" * 300 not in output


@pytest.mark.parametrize("name", ["nowhere", "empty.safetensors", "published", "empty-run"])
def test_what_cannot_be_inspected(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "config.json").write_text('{"model_type": "kimi_linear"}')
    (tmp_path / "empty-run" / "checkpoints").mkdir(parents=True)
    fault = inspect(tmp_path / name)[1]
    assert isinstance(fault, CheckpointError)
    assert name in str(fault)


def test_torch_is_not_imported_without_deep(run: Path) -> None:
    program = (
        "import sys; from deltamoe.cli.inspect import command; "
        "command(sys.argv[1:], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(run)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {n: save_published_folder(tmp_path_factory.mktemp("hf"), files=n) for n in (1, 3)}


@pytest.mark.parametrize("files", [1, 3])
def test_a_published_folder(published: dict[int, Path], files: int) -> None:
    output, fault = inspect(published[files], "--json")
    assert fault is None
    report = json.loads(output)
    assert report["kind"] == "published"
    assert len(report["headers"]) == files
    assert sum(header["tensors"] for header in report["headers"]) == len(report["tensors"])
    assert report["parameters"] == sum(report["parameters_by_dtype"].values())
    assert report["tensors"][0]["name"] == "model.embed_tokens.weight"
    output, fault = inspect(published[files], "--deep")
    assert fault is None
    for text in ("2 layers (km)", "lm_head.weight", ".safetensors", "finite       True"):
        assert text in output


def test_a_faulty_published_folder_is_shown_as_far_as_it_goes(
    published: dict[int, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(published[3], tmp_path / "faulty"))
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"short")
    output, fault = inspect(folder)
    assert isinstance(fault, CheckpointError)
    assert "00002" in str(fault)
    assert "2 layers (km)" in output
    assert "model.embed_tokens.weight" in output
    (folder / "config.json").write_text('{"model_type": "llama"}')
    output, fault = inspect(folder, "--json")
    assert "llama" in str(fault)
    report = json.loads(output[: output.rindex("}") + 1])
    assert "llama" in report["model"]
    assert len(report["headers"]) == 2


def test_torch_is_not_imported_for_a_published_folder(published: dict[int, Path]) -> None:
    program = (
        "import sys; from deltamoe.cli.inspect import command; "
        "command(sys.argv[1:], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(published[3])], check=True, capture_output=True
    )
