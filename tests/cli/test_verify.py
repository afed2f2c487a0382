"""``deltamoe verify``: every check is shown, and the first that failed is the exit code."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from deltamoe.checkpoint import read_tensors, step_folder, write_tensors
from deltamoe.checkpoint.manifest import MANIFEST
from deltamoe.cli import main
from deltamoe.conversion.verify import verify
from tests.published_folder import save_published_folder
from tests.saved_run import save_run

ALL = ["files", "config", "shapes", "values", "tokenizer", "forward"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    return save_run(folder), save_published_folder(tmp_path_factory.mktemp("hf"), files=3)


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made[0], tmp_path / "run"))


@pytest.fixture
def published(made, tmp_path):
    """As other programs leave it: without a manifest of ours."""
    folder = Path(shutil.copytree(made[1], tmp_path / "published"))
    (folder / MANIFEST).unlink()
    return folder


@pytest.fixture
def report(capsys):
    def report(path, *options):
        code = main(["verify", str(path), "--json", *options])
        captured = capsys.readouterr()
        data = json.loads(captured.out)
        assert data["is_good"] == (code == 0)
        assert ("error:" in captured.err) == (code != 0)
        return code, {check["name"]: (check["status"], check["note"]) for check in data["checks"]}

    return report


def statuses(checks):
    return {name: status for name, (status, _) in checks.items()}


def test_a_good_run(run, report):
    code, checks = report(run)
    assert code == 0
    assert list(checks) == ALL
    assert set(statuses(checks).values()) == {"good"}
    assert "SHA-256 agree" in checks["files"][1]
    assert report(step_folder(run, 3))[0] == 0


def test_a_good_published_folder_with_and_without_a_manifest(published, made, report):
    code, checks = report(published)
    assert code == 0
    assert set(statuses(checks).values()) == {"good"}
    assert "no hashes" in checks["files"][1]
    assert "in 3 files" in checks["shapes"][1]
    assert "tiktoken:" in checks["tokenizer"][1]
    assert "SHA-256 agree" in report(made[1])[1]["files"][1]


def test_the_table(published, capsys):
    assert main(["verify", str(published)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{published}  (published)"
    assert [line.split()[:2] for line in lines[1:]] == [[name, "good"] for name in ALL]


def test_without_a_forward_pass_no_model_is_built(run, report, monkeypatch):
    monkeypatch.setattr("deltamoe.conversion.verify.load", None)
    code, checks = report(run, "--no-forward")
    assert code == 0
    assert checks["forward"][0] == "skipped"


def test_a_flipped_bit_is_found_by_its_hash_alone(run, report):
    path = step_folder(run, 3) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, checks = report(run)
    assert code == 3
    assert statuses(checks) == dict.fromkeys(ALL, "good") | {"files": "bad", "forward": "skipped"}


def rewrite(path, change):
    tensors = {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    change(tensors)
    path.unlink()
    write_tensors(path, tensors)


def nan(tensors):
    next(iter(tensors.values())).view(-1)[0] = torch.nan


def misshapen(tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name].unsqueeze(0)


def unknown(tensors):
    tensors["surplus"] = torch.zeros(2)


def missing(tensors):
    del tensors[next(iter(tensors))]


@pytest.mark.parametrize(
    ("change", "check"),
    [(nan, "values"), (misshapen, "shapes"), (unknown, "shapes"), (missing, "shapes")],
)
@pytest.mark.parametrize("file", ["model-00001-of-00003.safetensors"])
def test_bad_weights_are_named(published, report, change, check, file):
    rewrite(published / file, change)
    code, checks = report(published)
    assert code == 3
    assert checks[check][0] == "bad"
    assert "tensor" in checks[check][1]
    assert checks["forward"][0] == "skipped"
    assert checks["tokenizer"][0] == "good"  # what does not stand on it is still looked at


def test_a_missing_file_of_weights(published, report):
    (published / "model-00002-of-00003.safetensors").unlink()
    code, checks = report(published)
    assert code == 3
    assert "00002" in checks["shapes"][1]


def test_a_config_that_cannot_be(published, report):
    settings = json.loads((published / "config.json").read_text())
    settings["num_hidden_layers"] = 10**9
    (published / "config.json").write_text(json.dumps(settings))
    code, checks = report(published)
    assert code in (2, 3)
    assert statuses(checks) == {
        "files": "good",
        "config": "bad",
        "shapes": "skipped",
        "values": "skipped",
        "tokenizer": "good",
        "forward": "skipped",
    }


def test_a_tokenizer_with_ids_beyond_the_embedding(tmp_path, report):
    folder = save_published_folder(tmp_path, vocab_size=380)
    code, checks = report(folder)
    assert code == 2
    assert checks["tokenizer"] == ("bad", checks["tokenizer"][1])
    assert "386 ids" in checks["tokenizer"][1]
    assert "380" in checks["tokenizer"][1]


def test_a_broken_tokenizer(published, report):
    (published / "tiktoken.model").write_bytes(b"\xff\n")
    code, checks = report(published)
    assert code == 3
    assert "tiktoken.model, line 1" in checks["tokenizer"][1]


def test_a_folder_without_a_tokenizer_runs_on_ids(published, report):
    for name in ("tiktoken.model", "tokenizer.json", "tokenizer_config.json"):
        (published / name).unlink()
    code, checks = report(published)
    assert code == 0
    assert statuses(checks) == dict.fromkeys(ALL, "good") | {"tokenizer": "skipped"}


def test_a_safetensors_file(run, tmp_path, report):
    assert report(step_folder(run, 3) / "model.safetensors") == (
        0,
        verified(step_folder(run, 3) / "model.safetensors"),
    )
    write_tensors(tmp_path / "nan.safetensors", {"x": torch.tensor([torch.inf])})
    assert report(tmp_path / "nan.safetensors")[0] == 3
    (tmp_path / "short.safetensors").write_bytes(b"short")
    code, checks = report(tmp_path / "short.safetensors")
    assert (code, statuses(checks)) == (3, {"files": "bad", "values": "skipped"})


def verified(path):
    return {check.name: (check.status, check.note) for check in verify(path).checks}


@pytest.mark.parametrize("name", ["nowhere", "empty-run"])
def test_nothing_to_verify(tmp_path, name, capsys):
    (tmp_path / "empty-run" / "checkpoints").mkdir(parents=True)
    assert main(["verify", str(tmp_path / name)]) == 3
    assert name in capsys.readouterr().err


def test_nothing_in_the_folder_is_run_or_written(published):
    for name in ("tokenization_kimi.py", "modeling_kimi.py", "configuration_kimi.py"):
        (published / name).write_text("raise SystemExit('was run')")
    before = sorted(path.name for path in published.iterdir())
    assert verify(published).is_good
    assert sorted(path.name for path in published.iterdir()) == before


@pytest.fixture
def short_text(monkeypatch):
    monkeypatch.setattr("deltamoe.cli.verify._PROMPT_TOKENS", 60)


@pytest.mark.usefixtures("short_text")
def test_an_engine_is_proved(run, capsys):
    assert main(["verify", str(run), "--engine", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["is_right"]
    assert {way["diverges_at"] for way in report["ways"]} == {None}
    assert main(["verify", str(run), "--engine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(report["ways"])
    assert any("forked" in line and "equal to the last bit" in line for line in lines)


@pytest.mark.usefixtures("short_text")
def test_a_wrong_engine_is_told(run, capsys, monkeypatch):
    from deltamoe.engine.state_pool import StatePool

    snapshot = StatePool.snapshot

    def forgetful(pool, handle):
        taken = snapshot(pool, handle)
        taken.memory.mul_(1.01)
        return taken

    monkeypatch.setattr(StatePool, "snapshot", forgetful)
    assert main(["verify", str(run), "--engine"]) == 1
    captured = capsys.readouterr()
    assert "WRONG" in captured.out
    assert "did not answer alike" in captured.err


@pytest.mark.usefixtures("short_text")
@pytest.mark.parametrize("how", [("--dtype", "bf16"), ("--quantize", "8")])
def test_an_engine_is_proved_as_it_will_run(run, capsys, how):
    assert main(["verify", str(run), "--engine", "--json", "--device", "cpu", *how]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dtype"] == ("bfloat16" if "bf16" in how else "float32")
    assert all(way["is_right"] for way in report["ways"])


def test_a_file_is_checked_as_it_is(run, capsys):
    assert main(["verify", str(run), "--dtype", "bf16"]) == 2
    assert "--dtype goes with --engine" in capsys.readouterr().err


def test_an_engine_needs_the_model(run, capsys):
    assert main(["verify", str(run), "--engine", "--no-forward"]) == 2
