"""Configurations as plain data, there and back, with nothing let through.

``from_dict`` follows the annotations of the configuration classes, which are the only schema: an
unknown key, a value of another type, a number that is not finite is a ``ConfigError`` that names
the dotted key, the value and what was expected. The same annotations turn the text of a command
line override (``train.steps=2k``) into a value.

Knows nothing of presets, of files other than one JSON text, or of torch.
"""

import difflib
import hashlib
import json
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from deltamoe.config.model import ModelConfig
from deltamoe.config.run import RunConfig
from deltamoe.config.strict_json import check_format, parse_json, read_json
from deltamoe.errors import ConfigError

__all__ = [
    "FORMAT",
    "default_of",
    "fingerprint",
    "from_dict",
    "from_json",
    "from_text",
    "leaves",
    "read_config",
    "schema",
    "section_type",
    "to_dict",
    "to_json",
    "unknown_key",
    "whole_number",
]

FORMAT = 1

Config = TypeVar("Config", bound=RunConfig | ModelConfig)

_LARGEST = 1 << 63
_MULTIPLES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_MULTIPLES |= {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}

# Words other programs use, where the letters alone would not lead to ours.
_ALIASES = {
    "batch_size": "rows",
    "d_model": "dim",
    "head_dim": "key_dim",
    "hidden_size": "dim",
    "intermediate_size": "mlp_dim",
    "kv_lora_rank": "latent_dim",
    "learning_rate": "lr",
    "max_steps": "steps",
    "moe_intermediate_size": "expert_dim",
    "n_layer": "num_layers",
    "seq_len": "context",
    "top_k": "experts_per_token",
    "topk": "experts_per_token",
}

_EXPECTED: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
}


def from_dict(data: object, kind: type[Config]) -> Config:
    """Build a configuration from nested plain data.

    Args:
        data: what a TOML or JSON reader returns. Lists may stand for tuples, a whole number for a
            float, null or the text "none" for an optional value that is absent.
        kind: the class to build. Messages name a key as it stands in a ``RunConfig``.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, a value out of range.
    """
    built = _section(data, kind, "model" if kind is ModelConfig else "")
    assert isinstance(built, kind)
    return built


def to_dict(config: RunConfig | ModelConfig) -> dict[str, Any]:
    """Nested plain data with every key spelled out; ``from_dict`` undoes it exactly."""
    plain = _plain(config)
    assert isinstance(plain, dict)
    return plain


def to_json(config: RunConfig | ModelConfig) -> str:
    """The text of a config.json: ``to_dict`` and the number of its format."""
    return json.dumps({"format": FORMAT, **to_dict(config)}, indent=2) + "\n"


def from_json(text: str | bytes, kind: type[Config], *, source: str) -> Config:
    """Read what ``to_json`` wrote; ``source`` is what messages call the text."""
    data = parse_json(text, source=source)
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected a JSON object that holds a configuration")
    return _from_json_object(data, kind, source)


def read_config(path: Path | str) -> RunConfig:
    """Read a config.json file."""
    return _from_json_object(read_json(path), RunConfig, str(path))


def fingerprint(config: RunConfig | ModelConfig) -> str:
    """SHA-256 of the configuration's values, in hexadecimal; equal for equal configurations."""
    canonical = to_dict(from_dict(to_dict(config), type(config)))  # an int may stand for a float
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def whole_number(text: str) -> int:
    """Read "250", "2k", "1.5M", "64Ki": k, M, G, T count by 1000, Ki, Mi, Gi, Ti by 1024.

    Raises:
        ValueError: anything else, or a number that is not whole.
    """
    match = re.fullmatch(
        r"([+-]?[0-9][0-9_]{0,20}(?:\.[0-9]{1,20})?)([KMGT]i|[kKMGT]?)", text.strip()
    )
    if match is None:
        raise ValueError(f"{text!r} is not a whole number such as 250, 2k, 1M or 64Ki")
    number = Fraction(match[1].replace("_", "")) * _MULTIPLES[match[2]]
    if number.denominator != 1:
        raise ValueError(f"{text!r} is not whole")
    return int(number)


@cache
def schema() -> dict[str, Any]:
    """Every dotted key of a ``RunConfig``, sections included, with its annotation."""
    found: dict[str, Any] = {}

    def walk(kind: type, prefix: str) -> None:
        for name, hint in get_type_hints(kind).items():
            found[prefix + name] = hint
            if (section := section_type(hint)) is not None:
                walk(section, f"{prefix}{name}.")

    walk(RunConfig, "")
    return found


def section_type(hint: Any) -> type | None:
    """The configuration class behind an annotation, seen through ``| None``; None for a value."""
    hint, _ = _required(hint)
    return hint if isinstance(hint, type) and is_dataclass(hint) else None


def default_of(key: str) -> Any:
    """The default of a dotted key's value; ``dataclasses.MISSING`` where it must be given."""
    section, _, name = key.rpartition(".")
    kind = section_type(schema()[section]) if section else RunConfig
    assert kind is not None
    (given,) = (f for f in fields(kind) if f.name == name)
    return given.default_factory() if given.default_factory is not MISSING else given.default


def leaves(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested plain data; a table that is a value stays whole."""
    found: dict[str, Any] = {}
    for name, value in data.items():
        key = prefix + name
        if isinstance(value, Mapping) and section_type(schema().get(key)) is not None:
            found |= leaves(value, f"{key}.")
        else:
            found[key] = value
    return found


def from_text(text: str, key: str) -> Any:
    """Plain data from the text of an override, as the key's annotation reads it.

    Raises:
        ConfigError: the text cannot be such a value.
    """
    return _from_text(text, schema()[key], key)


def unknown_key(key: str) -> ConfigError:
    """The error for a key that does not exist, with the nearest one that does."""
    if nearest := _nearest(key):
        return ConfigError(f"unknown key {_clip(key)}; did you mean {nearest}?")
    section = key.rpartition(".")[0]
    if get_origin(schema().get(section)) is dict:
        return ConfigError(
            f"{_clip(key)}: {section} is set whole, {section}=name:weight,name:weight"
        )
    section = section if section in schema() else ""
    names = [k.rpartition(".")[2] for k in schema() if k.rpartition(".")[0] == section]
    place = f"the keys of {section} are" if section else "the sections are"
    return ConfigError(f"unknown key {_clip(key)}; {place} {', '.join(names)}")


def _from_json_object(data: dict[str, Any], kind: type[Config], source: str) -> Config:
    check_format(data, source=source, known=FORMAT)
    try:
        return from_dict({name: data[name] for name in data if name != "format"}, kind)
    except ConfigError as fault:
        raise ConfigError(f"{source}: {fault}") from None


def _section(data: object, kind: type, key: str) -> Any:
    if not isinstance(data, Mapping):
        raise _wrong(key or "the configuration", data, "a table of keys")
    prefix = f"{key}." if key else ""
    hints = get_type_hints(kind)
    for name in data:
        if name not in hints:
            raise unknown_key(f"{prefix}{name}")
    for field in fields(kind):
        is_required = field.default is MISSING and field.default_factory is MISSING
        if is_required and field.name not in data:
            expected = _EXPECTED.get(hints[field.name], "a table of keys")
            raise ConfigError(f"{prefix}{field.name} is missing: expected {expected}")
    return kind(**{name: _value(item, hints[name], prefix + name) for name, item in data.items()})


def _value(value: object, hint: Any, key: str) -> Any:
    inner, is_optional = _required(hint)
    if is_optional and (value is None or value == "none"):
        return None
    or_none = " or none" if is_optional else ""
    if (section := section_type(inner)) is not None:
        return _section(value, section, key)
    origin, arguments = get_origin(inner), get_args(inner)
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
        raise _wrong_choice(key, value, arguments)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(key, value, "a list" + or_none)
        return tuple(_value(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(key, value, "a table of names and weights")
        return {name: _value(item, arguments[1], f"{key}.{name}") for name, item in value.items()}
    return _scalar(value, inner, key, or_none)


def _scalar(value: object, kind: type, key: str, or_none: str) -> Any:
    if kind is float and type(value) in (int, float):
        try:
            number = float(value)  # type: ignore[arg-type]
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise _wrong(key, value, "a finite number")
        return number
    if type(value) is not kind:
        raise _wrong(key, value, _EXPECTED[kind] + or_none)
    if isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
        raise _wrong(key, value, "a whole number of at most 64 bits")
    if isinstance(value, str) and ("\0" in value or not _is_unicode(value)):
        raise _wrong(key, value, "a text without NUL and without half a surrogate pair")
    return value


def _from_text(text: str, hint: Any, key: str) -> Any:
    inner, is_optional = _required(hint)
    if is_optional and text.strip().lower() == "none":
        return None
    origin, arguments = get_origin(inner), get_args(inner)
    if origin is tuple:
        return [_from_text(item.strip(), arguments[0], key) for item in text.split(",") if item]
    if origin is dict:
        return _weights_from_text(text, key)
    if inner is bool:
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        if text.strip().lower() not in words:
            raise _wrong(key, text, "true or false (yes, no, on, off)")
        return words[text.strip().lower()]
    if inner is int:
        try:
            return whole_number(text)
        except ValueError:
            raise _wrong(key, text, "a whole number, such as 250, 2k, 1M or 64Ki") from None
    if inner is float:
        try:
            return float(text)
        except ValueError:
            raise _wrong(key, text, "a number, such as 3e-3") from None
    return text


def _weights_from_text(text: str, key: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for item in text.split(","):
        if not item.strip():
            continue
        name, _, weight = item.rpartition(":")  # a name may hold a colon itself: hf:NAME
        name = name.strip()
        try:
            if not name or name in weights:
                raise ValueError
            weights[name] = float(weight)
        except ValueError:
            raise _wrong(key, item, "name:weight,name:weight with each name once") from None
    return weights


def _required(hint: Any) -> tuple[Any, bool]:
    """An annotation without ``| None``, and whether it had that."""
    if get_origin(hint) not in (UnionType, Union):
        return hint, False
    (inner,) = (a for a in get_args(hint) if a is not NoneType)
    return inner, True


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, dict) else value


def _nearest(key: str) -> str | None:
    section, _, name = key.rpartition(".")
    known = [k for k, hint in schema().items() if section_type(hint) is None]
    if section == "":
        known += [k for k in schema() if "." not in k]
    name = _ALIASES.get(name.lower(), name)
    same_name = [k for k in known if k.rpartition(".")[2] == name]
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    for candidate in same_name:
        if candidate in siblings:
            return candidate
    if same_name:
        return same_name[0]
    for names in (siblings, known):
        short = {k.rpartition(".")[2]: k for k in reversed(names)}
        if close := difflib.get_close_matches(name[:80], short, n=1):
            return short[close[0]]
    return None


def _wrong(key: str, value: object, expected: str) -> ConfigError:
    return ConfigError(f"{_clip(key)} = {_show(value)}: expected {expected}")


def _wrong_choice(key: str, value: object, choices: tuple[str, ...]) -> ConfigError:
    expected = "one of " + ", ".join(choices)
    close = difflib.get_close_matches(value[:80], choices, n=1) if isinstance(value, str) else []
    hint = f"; did you mean {close[0]}?" if close else ""
    return ConfigError(f"{_clip(key)} = {_show(value)}: expected {expected}{hint}")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def _show(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    try:
        return _SHORT.repr(value)
    except ValueError:  # a whole number of more digits than Python agrees to print
        return f"a very long {type(value).__name__}"


def _clip(key: str) -> str:
    key = key if len(key) <= 120 else key[:117] + "..."
    return key if key.isprintable() else ascii(key)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
