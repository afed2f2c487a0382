import json
from dataclasses import replace

import pytest

from deltamoe.cli import main
from deltamoe.config import PRESETS, DataConfig, RunConfig, from_dict, preset, resolve, to_json


def answer(capsys, *arguments):
    assert main(["config", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_shown_can_be_read_back(capsys, tmp_path, name):
    path = tmp_path / "shown.toml"
    path.write_text(answer(capsys, "show", name, "train.steps=7"))
    assert resolve(str(path))[0] == resolve(name, ["train.steps=7"])[0]


def test_awkward_values_can_be_read_back(capsys, tmp_path):
    strange = replace(
        preset("nano"), data=DataConfig(path='a"b\\c\n😀\x7f', mixture={'q"= ü': 1e-7, "hf:x": 2.0})
    )
    (tmp_path / "config.json").write_text(to_json(strange))
    (tmp_path / "shown.toml").write_text(answer(capsys, "show", str(tmp_path)), encoding="utf-8")
    assert resolve(str(tmp_path / "shown.toml"))[0] == strange


def test_each_value_says_where_it_came_from(capsys):
    lines = answer(capsys, "show", "nano", "train.steps=2k").splitlines()
    shown = {line.split("#")[0].strip(): line.split("# ")[-1] for line in lines if " # " in line}
    assert shown["steps = 2000"] == "command line"
    assert shown["dim = 256"] == "preset nano"
    assert shown["conv_size = 4"] == "default"


def test_json_holds_the_configuration_and_the_origins(capsys):
    shown = json.loads(answer(capsys, "show", "nano", "--json"))
    assert shown["config"].pop("format") == 1
    assert from_dict(shown["config"], RunConfig) == preset("nano")
    assert shown["origins"]["model.dim"] == "preset nano"


def test_the_list_of_presets(capsys):
    text = answer(capsys, "list")
    for name, entry in PRESETS.items():
        assert f"{name} " in text
        assert entry.summary in text
    assert "49.1B" in text
    assert "3.48B" in text
    presets = json.loads(answer(capsys, "list", "--json"))["presets"]
    assert [row["name"] for row in presets] == list(PRESETS)
    assert presets[-1]["total"] == 49_122_681_728
