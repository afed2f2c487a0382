import json
from dataclasses import replace

import pytest
import torch

import deltamoe
from deltamoe.cli import main
from deltamoe.config import preset
from tests.saved_model import drawn_model, publishable_config, save_model


@pytest.fixture
def run(tmp_path):
    config = publishable_config()
    model = drawn_model(replace(config, mla=replace(config.mla, num_heads=2)))  # gguf's wish
    save_model(tmp_path, model)
    return tmp_path / "run"


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


def test_there_and_back(run, tmp_path, capsys):
    assert convert(run, tmp_path / "hf", "--to", "hf") == 0
    assert "model.safetensors, 124 tensors" in capsys.readouterr().out
    assert convert(tmp_path / "hf", tmp_path / "back", "--to", "deltamoe") == 0
    ids = torch.arange(9)[None]
    assert torch.equal(deltamoe.load(run)(ids)[0], deltamoe.load(tmp_path / "back")(ids)[0])


def test_every_verb_takes_the_folder(run, tmp_path, capsys):
    convert(run, tmp_path / "hf", "--to", "hf")
    capsys.readouterr()
    assert main(["plan", str(tmp_path / "hf"), "model.moe.num_experts=9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["by_part"]["router"] == 3 * 9 * 25
    assert main(["config", "show", str(tmp_path / "hf")]) == 0
    assert "decay" in capsys.readouterr().out
    arguments = ["--prompt", "a", "--max-tokens", "5", "--temperature", "0", "--json"]
    assert main(["generate", str(run), *arguments]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert main(["generate", str(tmp_path / "hf"), *arguments]) == 0
    assert json.loads(capsys.readouterr().out) == expected


def test_a_dry_run_writes_nothing(run, tmp_path, capsys):
    for to in ("hf", "gguf"):
        assert convert(run, tmp_path / "out", "--to", to, "--dry-run", "--json") == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["written"] is False
        assert plan["to"] == to
        assert plan["num_bytes"] == sum(file["num_bytes"] for file in plan["files"]) > 90_000
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert convert(run, tmp_path / "out", "--to", "hf", "--dtype", "bf16", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "Nothing was written" in text
    assert "from F32 to BF16" in text


def test_choices_are_made_by_key(run, tmp_path):
    assert convert(run, tmp_path / "hf", "--to", "hf") == 0
    out = tmp_path / "out"
    assert convert(tmp_path / "hf", out, "model.mla.latent_norm_eps=1e-6", "--to", "deltamoe") == 0
    assert deltamoe.load_config(out).mla.latent_norm_eps == 1e-6


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--to"),
        (["--to", "onnx"], 2, "onnx"),
        (["--to", "hf", "--quant", "f16"], 2, "--quant is for gguf"),
        (["--to", "gguf", "--dtype", "bf16"], 2, "takes --quant"),
        (["--to", "hf", "model.norm_epsilon=1"], 2, "norm_eps"),
        (["--to", "hf", "data.context=1"], 2, "only the model's own keys"),
        (["--to", "hf", "model.dim=25"], 3, "tensor"),
    ],
)
def test_errors_have_their_exit_codes(run, tmp_path, capsys, arguments, code, message):
    assert convert(run, tmp_path / "out", *arguments) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_reasons_of_a_refusal_are_named(tmp_path, capsys):
    from deltamoe.model import HybridLM

    config = preset("moe-2-of-4").model
    model = HybridLM(config)
    model.initialize(0)
    save_model(tmp_path, model)
    assert convert(tmp_path / "run", tmp_path / "out", "--to", "hf") == 2
    message = capsys.readouterr().err
    for key in ("expert", "scoring", "has_balance_bias", "num_shared_experts"):
        assert f"model.moe.{key} = " in message


def test_nothing_to_convert(tmp_path, capsys):
    assert convert(tmp_path, tmp_path / "out", "--to", "hf") == 3
    assert convert(tmp_path / "none", tmp_path / "out", "--to", "hf") == 3
    assert convert(tmp_path / "none.gguf", tmp_path / "out", "--to", "hf") == 3
