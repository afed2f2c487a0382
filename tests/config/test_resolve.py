import os
import time

import pytest

from deltamoe.config import PRESETS, preset, resolve, to_json
from deltamoe.errors import ConfigError


def refusal(*arguments):
    with pytest.raises(ConfigError) as caught:
        resolve(*arguments)
    return str(caught.value)


def test_a_preset_with_overrides_and_where_each_value_came_from():
    config, origins = resolve(
        "nano", ["train.steps=2k", "model.moe.num_experts=8", "train.compile=on"]
    )
    assert (config.train.steps, config.model.moe.num_experts, config.train.compile) == (
        2000,
        8,
        True,
    )
    assert origins["train.steps"] == "command line"
    assert origins["model.dim"] == "preset nano"
    assert origins["model.kda.conv_size"] == "default"
    assert origins["model.mla.query_rank"] == "default"
    assert "model.moe" not in origins


def test_the_last_override_wins_and_all_are_judged_together():
    config, _ = resolve("nano", ["train.steps=5", "train.steps=6"])
    assert config.train.steps == 6
    config, _ = resolve("nano", ["model.mixers=kda,mla", "model.num_layers=2"])
    assert config.model.schedule == "km"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "'steps': expected section.key=value, such as train.steps=2k"),
        ("train.stesp=3", "unknown key train.stesp; did you mean train.steps?"),
        ("train.steps=ten", "train.steps = 'ten': expected a whole number, such as 250, 2k, 1M or "
         "64Ki"),
        ("train.steps=1.5", "train.steps = '1.5': expected a whole number, such as 250, 2k, 1M or "
         "64Ki"),
        ("optimizer.lr=fast", "optimizer.lr = 'fast': expected a number, such as 3e-3"),
        ("optimizer.lr=inf", "optimizer.lr = inf: expected a finite number"),
        ("train.compile=maybe", "train.compile = 'maybe': expected true or false (yes, no, on, "
         "off)"),
        ("model.moe=8", "model.moe is a section: set its keys one by one, such as "
         "model.moe.num_experts=…"),
        ("model=none", "model is a section: set its keys one by one, such as model.vocab_size=…"),
        ("model.moe=none", "model.moe is missing, but the schedule has moe layers"),
        ("data.mixture.stdlib=1", "data.mixture.stdlib: data.mixture is set whole, "
         "data.mixture=name:weight,name:weight"),
    ],
)  # fmt: skip
def test_what_is_said_about_an_override(override, message):
    assert refusal("nano", [override]) == message


def test_a_part_can_be_left_out_and_is_then_missed():
    dense = ["model.moe=none", "model.first_dense_layers=4"]
    assert resolve("nano", dense)[0].model.moe is None
    assert resolve("nano", dense)[1]["model.moe"] == "command line"
    assert refusal("nano", [*dense, "model.moe.num_experts=8"]) == (
        "model.moe.num_experts: this configuration has no model.moe; "
        "start from a preset that has one, or give all its keys in a file"
    )


def test_a_file_may_start_from_a_preset(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'preset = "nano"\n[model.moe]\nnum_experts = 8\n[data.mixture]\nstdlib = 1\n'
        '[train]\nsteps = 2_000\nstop_at = "none"\n'
    )
    config, origins = resolve(str(path), ["train.steps=7"])
    assert config.model.moe.num_experts == 8
    assert config.model.moe.expert_dim == preset("nano").model.moe.expert_dim
    assert config.data.mixture == {"stdlib": 1.0}
    assert origins["model.moe.num_experts"] == origins["data.mixture"] == str(path)
    assert origins["model.moe.expert_dim"] == "preset nano"
    assert origins["train.steps"] == "command line"
    assert origins["train.seed"] == "default"


def test_a_file_may_stand_alone(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        "[model]\nvocab_size=9\ndim=8\nnum_layers=1\nmlp_dim=4\nmla_every=0\n"
        "[model.kda]\nnum_heads=2\n"
    )
    config, origins = resolve(str(path))
    assert config.model.kda.num_heads == 2
    assert origins["model.dim"] == str(path)
    assert origins["model.mla"] == "default"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[train]\nsteps = 3\nsteps = 4\n", "not TOML: Cannot overwrite a value (at line 3"),
        (b"[train\n", "not TOML: "),
        (b"\xff", "not UTF-8 text (byte 0)"),
        (b"x = " + b"[" * 40_000, "nested too deep"),
        (b"# " + b"x" * 70_000, "longer than 65,536 bytes; no configuration is"),
        (b"preset = 3", "preset is int: expected the name of a preset"),
        (b'preset = "nanno"', "no preset 'nanno'; did you mean nano?"),
        (b"[trian]\nsteps = 3", "unknown key trian; did you mean train?"),
        (b'preset = "nano"\n[train]\nsteps = "2k"', "train.steps = '2k': expected a whole number"),
        (b'preset = "nano"\n[optimizer]\nlr = inf', "optimizer.lr = inf: expected a finite number"),
        (b'preset = "nano"\n[train]\nsteps = 1979-05-27', "expected a whole number"),
        (b'preset = "nano"\n[train]\nsteps = 0x' + b"f" * 9000, "at most 64 bits"),
        (b'preset = "nano"\n[train]\nsteps = [0x' + b"f" * 9000 + b"]", "expected a whole number"),
        (b"steps = " + b"9" * 9000, "not TOML: "),
        (b'preset = "nano"\n' + b"a." * 9000 + b"a = 1", "unknown key a"),
        (b"[train]\nsteps = 3", "model is missing: expected a table of keys"),
    ],
)
def test_a_broken_file_is_refused_by_its_name(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_bytes(text)
    said = refusal(str(path))
    assert said.startswith(f"{path}: ")
    assert message in said
    assert len(said) < 500


def test_a_folder_is_read_by_its_config(tmp_path):
    (tmp_path / "config.json").write_text(to_json(preset("mini")))
    config, origins = resolve(str(tmp_path), ["train.seed=3"])
    assert config.model == preset("mini").model
    assert origins["model.dim"] == str(tmp_path / "config.json")
    assert origins["train.seed"] == "command line"
    assert resolve(str(tmp_path / "config.json"))[0] == preset("mini")


def test_names_that_lead_nowhere(tmp_path):
    assert "did you mean the preset nano?" in refusal("nanno")
    assert "the presets are nano, " in refusal("qqqq/wwww")
    assert "no config.json in this folder" in refusal(str(tmp_path))
    assert "no such file" in refusal(str(tmp_path / "a.toml"))
    assert "neither a preset nor a file" in refusal("x" * 10_000)
    assert "neither a preset nor a file" in refusal("a\0b")
    assert "settings follow one of these" in refusal("train.steps=250")
    (tmp_path / "notes.txt").write_text("")
    assert "ends in .toml or .json" in refusal(str(tmp_path / "notes.txt"))


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    start = time.monotonic()
    assert "a pipe" in refusal(str(tmp_path / "pipe.toml"))
    assert time.monotonic() - start < 1.0  # it would wait for a writer for ever


@pytest.mark.parametrize("name", PRESETS)
def test_every_key_has_an_origin(name):
    config, origins = resolve(name)
    assert config == preset(name)
    assert set(origins.values()) == {"default", f"preset {name}"}
