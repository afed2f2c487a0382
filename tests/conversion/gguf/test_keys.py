"""What the format cannot express is refused by name; what a file says must agree."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.conversion.gguf.exported import GEOMETRIES, MIXED, save, tiny

from deltamoe.config import to_json
from deltamoe.conversion import open_source
from deltamoe.conversion.gguf import refusals, write_gguf
from deltamoe.conversion.gguf.keys import ARCHITECTURE, CONFIG_KEY, config_of, geometry
from deltamoe.errors import CheckpointError, ConfigError
from deltamoe.tokenizer import BpeTokenizer

CANNOT = {
    "model.moe.scoring": {"moe": {"scoring": "softmax"}},
    "model.moe.renormalize": {"moe": {"renormalize": False}},
    "model.moe.experts_per_token": {"moe": {"experts_per_token": 1}},
    "model.moe.num_shared_experts": {"moe": {"num_shared_experts": 0}},
    "model.moe.has_biased_weights": {"moe": {"has_biased_weights": True}},
    "model.moe.expert": {"moe": {"expert": "ffn"}},
    "model.moe.has_noisy_topk": {"moe": {"has_noisy_topk": True}},
    "model.moe.has_balance_bias": {"moe": {"has_balance_bias": False}},
    "model.kda.value_dim": {"kda": {"value_dim": 64}},
    "model.kda.num_value_heads": {"kda": {"num_value_heads": 6}},
    "model.kda.decay": {"kda": {"decay": "bounded"}},
    "model.kda.decay_rank": {"kda": {"decay_rank": 5}},
    "model.kda.output_gate": {"kda": {"output_gate": "none"}},
    "model.kda.max_beta": {"kda": {"max_beta": 2.0}},
    "model.kda.conv_size": {"kda": {"conv_size": 0}},
    "model.mla.num_heads": {"mla": {"num_heads": 4}},
    "model.mla.query_rank": {"mla": {"query_rank": 9}},
    "model.mla.has_rope": {"mla": {"has_rope": True}},
    "model.mla.latent_norm_eps": {"mla": {"latent_norm_eps": 1e-3}},
    "model.mixers": {"mixers": ("kda",) * 5},
    "model.channels": {"channels": ("moe", "mlp", "moe", "moe", "moe")},
}


def changed(changes: dict[str, Any]) -> Any:
    parts = {
        key: replace(getattr(MIXED, key), **value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    return replace(MIXED, **parts)


@pytest.mark.parametrize("key", CANNOT)
def test_what_cannot_be_said_is_refused_by_name(key: str) -> None:
    reasons = refusals(changed(CANNOT[key]))
    assert any(reason.startswith(f"{key} = ") for reason in reasons), reasons


def test_refusal_comes_before_the_file(tmp_path: Path) -> None:
    source = open_source(save(tmp_path / "run", tiny(changed({"moe": {"scoring": "softmax"}}))))
    with pytest.raises(ConfigError, match=r"model\.moe\.scoring = softmax"):
        write_gguf(source, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_tokenizer_with_another_rule_is_refused(tmp_path: Path) -> None:
    definition = dict(BpeTokenizer.train(["some words"], 270).definition)
    digits = {"type": "Digits", "individual_digits": True}
    splits = [digits, *definition["pre_tokenizer"]["pretokenizers"]]
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": splits}
    config = replace(MIXED, vocab_size=300)
    source = open_source(save(tmp_path / "run", tiny(config), BpeTokenizer(definition)))
    with pytest.raises(ConfigError, match=r"no name in llama\.cpp"):
        write_gguf(source, tmp_path / "m.gguf")


@pytest.mark.parametrize("geometry_name", GEOMETRIES)
def test_the_keys_alone_give_the_geometry_back(geometry_name: str) -> None:
    config = GEOMETRIES[geometry_name]
    fields = fields_of(config)
    back = config_of(fields, vocab_size=config.vocab_size, source="file")
    assert geometry(back) == geometry(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kda.head_dim", 64),
        ("expert_used_count", 2),
        ("attention.layer_norm_rms_epsilon", 1e-6),
        ("attention.head_count_kv", [1, 0, 0, 1, 1]),
        ("attention.head_count_kv", 1),
        ("expert_gating_func", 1),
        ("block_count", None),
    ],
)
def test_keys_that_disagree_with_the_configuration_are_refused(key: str, value: object) -> None:
    fields = fields_of(MIXED) | {CONFIG_KEY: to_json(MIXED)}
    assert config_of(fields, vocab_size=MIXED.vocab_size, source="file") == MIXED
    fields[f"{ARCHITECTURE}.{key}"] = value
    if value is None:
        del fields[f"{ARCHITECTURE}.{key}"]
    with pytest.raises(CheckpointError, match=key):
        config_of(fields, vocab_size=MIXED.vocab_size, source="file")


def fields_of(config: Any) -> dict[str, Any]:
    keys = {f"{ARCHITECTURE}.{key}": value for key, value in geometry(config).items()}
    return {"general.architecture": ARCHITECTURE, **keys}
