import json

import pytest

from deltamoe.cli import main
from deltamoe.config import PRESETS, preset, to_json
from deltamoe.plan import parameters


def answer(capsys, *arguments):
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_json_of_the_released_model(capsys):
    costs = json.loads(answer(capsys, "kimi-linear-48b-a3b", "--json", "--context", "1Mi"))
    assert costs["parameters"]["total"] == 49_122_681_728
    assert costs["parameters"]["active"] == 3_484_459_904
    assert costs["parameters"]["by_part"]["experts"] == 26 * 256 * 3 * 1024 * 2304
    assert costs["state_bytes_per_sequence"] == 43_417_600
    assert costs["cache_bytes_per_token"] == 8_064
    assert costs["context"] == 1 << 20
    assert costs["flops_per_token"] > 2 * costs["parameters"]["active_without_embeddings"]
    assert costs["training"]["total_bytes"] > 700 * 10**9
    assert costs["generation"]["weight_bytes"] == 98_245_528_576 + 2 * 6_656  # biases in fp32
    assert costs["assumptions"] == list(PRESETS["kimi-linear-48b-a3b"].assumptions)


@pytest.mark.parametrize("name", PRESETS)
def test_the_text_names_the_sizes_and_a_verdict(capsys, name):
    text = answer(capsys, name, "--memory", "1G")
    counted = parameters(preset(name).model)
    assert f"{counted.total:,}" in text
    assert f"{counted.active:,}" in text
    assert "954 MiB" in text  # 1G in binary units
    assert ("fits in" in text) or ("does not fit in" in text)
    assert max(map(len, text.splitlines())) <= 100


def test_the_ladder_prints_what_it_assumes(capsys):
    text = answer(capsys, "scaling-653m")
    assert "published: 653M active without embedding and head (here +0.29%)" in text
    assert "assumptions" in text
    assert "nearest to the table's" in " ".join(text.split())
    assert "assumed" not in answer(capsys, "nano")


def test_the_verdict_turns_with_the_memory(capsys):
    small = answer(capsys, "nano", "--memory", "1M")
    assert "too much" in small
    assert "does not fit" not in answer(capsys, "nano", "--memory", "100G")


def test_overrides_files_and_folders_are_counted(capsys, tmp_path):
    more = json.loads(answer(capsys, "nano", "model.moe.num_experts=32", "--json"))
    assert more["parameters"]["total"] > parameters(preset("nano").model).total
    (tmp_path / "config.json").write_text(to_json(preset("mini")))
    costs = json.loads(answer(capsys, str(tmp_path), "--json", "--dtype", "bf16"))
    assert costs["parameters"]["total"] == parameters(preset("mini").model).total
    assert costs["generation"]["dtype"] == "bf16"
    (tmp_path / "a.toml").write_text('preset = "nano"\n[model]\ntie_embeddings = true\n')
    tied = json.loads(answer(capsys, str(tmp_path / "a.toml"), "--json"))
    assert "head" not in tied["parameters"]["by_part"]


def test_a_stack_of_one_kind_has_no_empty_rows(capsys):
    text = answer(capsys, "nano", "model.mla_every=0", "model.mla_last=no")
    assert "cache outgrows" not in text
    assert "  mla " not in text
