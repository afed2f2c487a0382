import json
import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltamoe.config import (
    PRESETS,
    DataConfig,
    KdaConfig,
    ModelConfig,
    RunConfig,
    fingerprint,
    from_dict,
    from_json,
    preset,
    read_config,
    to_dict,
    to_json,
    whole_number,
)
from deltamoe.config.parse import default_of, from_text, leaves, schema, section_type
from deltamoe.errors import ConfigError

VALUES = [key for key, hint in schema().items() if section_type(hint) is None]


def changed(key, value):
    """The nano preset as plain data with one dotted key set to a value."""
    data = to_dict(preset("nano"))
    *path, name = key.split(".")
    section = data
    for part in path:
        section = section[part]
    section[name] = value
    return data


@pytest.mark.parametrize("name", PRESETS)
def test_there_and_back(name):
    config = preset(name)
    assert from_dict(to_dict(config), RunConfig) == config
    assert from_json(to_json(config), RunConfig, source="text") == config
    assert from_json(to_json(config.model), ModelConfig, source="text") == config.model


def test_optional_parts_and_tables_survive_the_way():
    model = ModelConfig(
        vocab_size=5, dim=4, num_layers=2, mlp_dim=3, mla_every=0, first_dense_layers=2,
        kda=KdaConfig(num_heads=1, num_value_heads=2), channels=("mlp", "mlp"),
    )  # fmt: skip
    run = RunConfig(model=model, data=DataConfig(mixture={"a:b": 0.5, "ü": 2.0}, cache="x"))
    assert from_json(to_json(run), RunConfig, source="text") == run
    assert to_dict(run)["model"]["mla"] is None


def test_a_config_file_is_read_from_disk(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(to_json(preset("nano")))
    assert read_config(path) == preset("nano")


def test_fingerprint_is_of_the_values():
    config = preset("nano")
    as_float = replace(config, optimizer=replace(config.optimizer, lr=1.0))
    as_int = replace(config, optimizer=replace(config.optimizer, lr=1.0))
    object.__setattr__(as_int.optimizer, "lr", 1)  # as untyped code may write it
    assert fingerprint(as_int) == fingerprint(as_float) != fingerprint(config)
    a_b = replace(config, data=DataConfig(mixture={"a": 1.0, "b": 2.0}))
    b_a = replace(config, data=DataConfig(mixture={"b": 2.0, "a": 1.0}))
    assert fingerprint(a_b) == fingerprint(b_a)
    assert fingerprint(config) != fingerprint(config.model)


def test_fingerprints_of_all_presets_differ():
    assert len({fingerprint(preset(name)) for name in PRESETS}) == len(PRESETS)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("model.moe.topk", "model.moe.experts_per_token"),
        ("model.moe.num_expert", "model.moe.num_experts"),
        ("model.hidden_size", "model.dim"),
        ("train.stesp", "train.steps"),
        ("train.lr", "optimizer.lr"),
        ("steps", "train.steps"),
        ("optimiser", "optimizer"),
        ("modle.moe.num_experts", "model.moe.num_experts"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key, nearest):
    data = to_dict(preset("nano"))
    section = data
    *path, name = key.split(".")
    for part in path:
        section = section.setdefault(part, {})
    section[name] = 1
    with pytest.raises(ConfigError, match=r"^unknown key ") as caught:
        from_dict(data, RunConfig)
    top = key.split(".")[0]
    if top in to_dict(preset("nano")) or len(path) == 0:
        assert str(caught.value) == f"unknown key {key}; did you mean {nearest}?"
    else:  # the whole section is unknown
        assert str(caught.value) == f"unknown key {top}; did you mean model?"


def test_an_unknown_key_like_nothing_lists_what_there_is():
    data = to_dict(preset("nano")) | {"zzzzqq": 1}
    with pytest.raises(ConfigError) as caught:
        from_dict(data, RunConfig)
    assert str(caught.value) == (
        "unknown key zzzzqq; the sections are model, data, optimizer, balance, train"
    )


@pytest.mark.parametrize("key", VALUES)
def test_a_value_of_another_type_is_refused_by_its_dotted_key(key):
    with pytest.raises(ConfigError) as caught:
        from_dict(changed(key, {"a": ["table"]}), RunConfig)
    assert str(caught.value).startswith(f"{key}")
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.steps", "ten", "train.steps = 'ten': expected a whole number"),
        ("train.steps", True, "train.steps = true: expected a whole number"),
        ("train.steps", 1.0, "train.steps = 1.0: expected a whole number"),
        ("train.steps", None, "train.steps = none: expected a whole number"),
        ("train.stop_at", "soon", "train.stop_at = 'soon': expected a whole number or none"),
        ("train.seed", 1 << 63, "train.seed = 9223372036854775808: expected a whole number of "
         "at most 64 bits"),
        ("train.compile", 1, "train.compile = 1: expected true or false"),
        ("train.device", 3, "train.device = 3: expected a text"),
        ("optimizer.lr", True, "optimizer.lr = true: expected a number"),
        ("optimizer.lr", math.inf, "optimizer.lr = inf: expected a finite number"),
        ("optimizer.lr", math.nan, "optimizer.lr = nan: expected a finite number"),
        ("data.mixture", {"a": "x"}, "data.mixture.a = 'x': expected a number"),
        ("data.path", "a\0b", r"data.path = 'a\x00b': expected a text without NUL and without "
         "half a surrogate pair"),
        ("optimizer.name", "muom", "optimizer.name = 'muom': expected one of muon, adamw; "
         "did you mean muon?"),
        ("model.mixers", ["kda", "mia", "kda", "mla"], "model.mixers[1] = 'mia': expected one of "
         "kda, mla; did you mean mla?"),
        ("model.moe.experts_per_token", 17, "model.moe.experts_per_token = 17: expected 1 to "
         "model.moe.num_experts = 16"),
        ("model.kda", [1], "model.kda = [1]: expected a table of keys"),
    ],
)  # fmt: skip
def test_what_is_said_about_a_wrong_value(key, value, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(changed(key, value), RunConfig)
    assert str(caught.value) == message


def test_a_missing_key_is_named():
    data = to_dict(preset("nano"))
    del data["model"]["moe"]["num_experts"]
    with pytest.raises(ConfigError, match=r"^model\.moe\.num_experts is missing: .*whole number"):
        from_dict(data, RunConfig)
    with pytest.raises(ConfigError, match=r"^model is missing: expected a table"):
        from_dict({}, RunConfig)


def test_a_models_keys_are_named_as_in_a_run():
    data = to_dict(preset("nano").model)
    with pytest.raises(ConfigError, match=r"^unknown key model\.dmi; did you mean model\.dim\?$"):
        from_dict(data | {"dmi": 3}, ModelConfig)


def test_an_int_is_a_float_and_none_is_absent():
    built = from_dict(changed("optimizer.lr", 1), RunConfig)
    assert type(built.optimizer.lr) is float
    assert from_dict(changed("data.cache", "none"), RunConfig).data.cache is None
    assert from_dict(changed("model.kda.output_gate", "none"), RunConfig).model.kda is not None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("250", 250), ("-3", -3), ("2k", 2000), ("2K", 2000), ("1M", 10**6), ("25.6k", 25_600),
        ("1.5G", 1_500_000_000), ("64Ki", 65_536), ("1Mi", 1 << 20), ("24Gi", 24 << 30),
        ("1_000", 1000), (" 7 ", 7), ("2T", 2 * 10**12),
    ],
)  # fmt: skip
def test_whole_numbers_people_type(text, number):
    assert whole_number(text) == number


@pytest.mark.parametrize(
    "text", ["", "k", "1.0005k", "ten", "1e3", "0x10", "2ki", "2kk", "9" * 40, "1.2.3", "٣", "nan"]
)
def test_what_is_no_whole_number(text):
    with pytest.raises(ValueError, match="whole"):
        whole_number(text)


def test_text_of_overrides():
    assert from_text("yes", "train.compile") is True
    assert from_text("OFF", "train.compile") is False
    assert from_text("none", "train.stop_at") is None
    assert from_text("2k", "train.stop_at") == 2000
    assert from_text("3e-3", "optimizer.lr") == 3e-3
    assert from_text("kda, mla", "model.mixers") == ["kda", "mla"]
    assert from_text("hf:org/name:2,stdlib:0.5", "data.mixture") == {
        "hf:org/name": 2,
        "stdlib": 0.5,
    }
    assert from_text("", "data.mixture") == {}
    assert from_text("none", "data.path") == "none"  # a required text may well be this one
    for text in ("a", "a:", ":1", "a:1,a:2", "a:x"):
        with pytest.raises(ConfigError, match=r"expected name:weight,name:weight"):
            from_text(text, "data.mixture")


def test_leaves_keep_a_table_that_is_a_value_whole():
    flat = leaves(to_dict(replace(preset("nano"), data=DataConfig(mixture={"a": 1.0}))))
    assert flat["data.mixture"] == {"a": 1.0}
    assert flat["model.moe.num_experts"] == 16
    assert default_of("train.steps") == 1000
    assert default_of("data.mixture") == {}


HOSTILE = {
    "not JSON": b"{",
    "an array": b"[1]",
    "a key twice": b'{"format": 1, "model": {}, "model": {}}',
    "not UTF-8": b'{"format": 1, "\xff": 1}',
    "NaN": b'{"format": 1, "model": NaN}',
    "infinite": b'{"format": 1, "model": 1e999}',
    "deep": b'{"format": 1, "model": ' + b"[" * 100_000,
    "deep and closed": b'{"format": 1, "model": ' + b"[" * 30 + b"]" * 30 + b"}",
    "many digits": b'{"format": 1, "model": ' + b"9" * 5000 + b"}",
    "long": b'{"format": 1, "model": "' + b"x" * (1 << 20) + b'"}',
    "no format": b'{"model": {}}',
    "format true": b'{"format": true}',
    "format 0": b'{"format": 0}',
    "half a pair": b'{"format": 1, "\\ud800": 1}',
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_are_refused_in_one_sentence(text):
    with pytest.raises(ConfigError, match=r"^made-up\.json: ") as caught:
        from_json(text, RunConfig, source="made-up.json")
    assert len(str(caught.value)) < 400


def test_a_newer_format_asks_for_an_upgrade():
    text = json.dumps({"format": 3, "model": {"unheard": "of"}})
    with pytest.raises(
        ConfigError, match="newer deltamoe: format 3, this program knows 1; upgrade"
    ):
        from_json(text, RunConfig, source="made-up.json")


def test_a_hostile_size_is_refused_before_anything_loops_over_it():
    for key in ("model.num_layers", "model.dim", "model.vocab_size", "model.moe.num_experts"):
        with pytest.raises(ConfigError, match=rf"^{key} = 4611686018427387904: expected"):
            from_dict(changed(key, 1 << 62), RunConfig)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside),
    max_leaves=8,
)


@given(key=st.sampled_from(sorted(schema())), value=anything)
@settings(
    max_examples=300, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
def test_whatever_stands_at_a_key_the_answer_is_a_config_or_our_error(key, value):
    try:
        config = from_dict(changed(key, value), RunConfig)
    except ConfigError:
        return
    assert from_json(to_json(config), RunConfig, source="text") == config
