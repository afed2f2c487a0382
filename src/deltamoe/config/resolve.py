"""From what a person names to a configuration, remembering where each value came from.

A configuration starts from a preset, a TOML file (which may start from a preset itself), or the
config.json of a run or step folder; dotted overrides are laid over it. Later wins.
"""

import difflib
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltamoe.config.parse import (
    default_of,
    from_dict,
    from_text,
    leaves,
    read_config,
    schema,
    section_type,
    to_dict,
    unknown_key,
)
from deltamoe.config.presets import PRESETS, preset
from deltamoe.config.run import RunConfig
from deltamoe.config.strict_json import open_regular
from deltamoe.errors import ConfigError

__all__ = ["overridden", "resolve"]

# Written by hand; also a bound on what the TOML reader may be made to work.
_MOST_TOML_BYTES = 64 << 10


Reader = Callable[[Path], RunConfig]


def resolve(
    name: str, overrides: Sequence[str] = (), *, read: Reader = read_config
) -> tuple[RunConfig, dict[str, str]]:
    """Build the configuration that a command line names.

    Args:
        name: a preset ("nano"), a .toml or .json file, or a folder that holds a config.json (a
            run, or one step of it). A preset wins over a folder of the same name: say "./nano".
        overrides: texts such as "train.steps=2k"; a later one wins over an earlier one.
        read: reads a .json file; another reader may know more kinds of them.

    Returns:
        the configuration, and for each of its dotted keys where the value came from: "default",
        "preset NAME", the path of a file, or "command line".

    Raises:
        ConfigError: no such thing, or a key or value in it that cannot work.
    """
    config, origins = _named(name, read)
    data = to_dict(config)
    for override in overrides:
        origins[_apply(data, override)] = "command line"
    config = from_dict(data, RunConfig)
    return config, {key: origins.get(key, "default") for key in leaves(to_dict(config))}


def overridden(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Lay overrides such as "model.mla.latent_norm_eps=1e-6" over a configuration.

    Raises:
        ConfigError: a key or value that cannot work.
    """
    data = to_dict(config)
    for override in overrides:
        _apply(data, override)
    return from_dict(data, RunConfig)


def _named(name: str, read: Reader) -> tuple[RunConfig, dict[str, str]]:
    if name in PRESETS:
        return _from_preset(name)
    path = Path(name)
    if os.path.isdir(name):
        if not os.path.exists(path / "config.json"):
            raise ConfigError(
                f"{name}: no config.json in this folder; "
                "expected a run folder (runs/NAME) or a step folder (runs/NAME/checkpoints/step-N)"
            )
        path = path / "config.json"
    if path.suffix == ".json":
        config = read(path)
        return config, dict.fromkeys(leaves(to_dict(config)), str(path))
    if path.suffix == ".toml":
        return _from_toml(path)
    if os.path.exists(name):
        raise ConfigError(f"{name}: expected a file that ends in .toml or .json, or a folder")
    if "=" in name:
        hint = "settings follow one of these, as in: nano train.steps=250"
    elif close := difflib.get_close_matches(name[:80], PRESETS, n=1):
        hint = f"did you mean the preset {close[0]}?"
    else:
        hint = f"the presets are {', '.join(PRESETS)}"
    raise ConfigError(f"{name[:200]!r} is neither a preset nor a file nor a folder; {hint}")


def _from_preset(name: str) -> tuple[RunConfig, dict[str, str]]:
    config = preset(name)
    origins = {
        key: f"preset {name}"
        for key, value in leaves(to_dict(config)).items()
        if value != default_of(key)
    }
    return config, origins


def _from_toml(path: Path) -> tuple[RunConfig, dict[str, str]]:
    given = _read_toml(path)
    data: dict[str, Any] = {}
    origins: dict[str, str] = {}
    try:
        if "preset" in given:
            config, origins = _from_preset(_preset_name(given.pop("preset")))
            data = to_dict(config)
        config = from_dict(_merged(data, given), RunConfig)
    except ConfigError as fault:
        raise ConfigError(f"{path}: {fault}") from None
    return config, origins | dict.fromkeys(leaves(given), str(path))


def _preset_name(value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"preset is {type(value).__name__}: expected the name of a preset")
    preset(value)
    return value


def _read_toml(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        text = file.read(_MOST_TOML_BYTES + 1)
    if len(text) > _MOST_TOML_BYTES:
        raise ConfigError(f"{path}: longer than {_MOST_TOML_BYTES:,} bytes; no configuration is")
    try:
        return tomllib.loads(text.decode("utf-8"))
    except UnicodeDecodeError as fault:
        raise ConfigError(f"{path}: not UTF-8 text (byte {fault.start})") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deep") from None
    except ValueError as fault:
        raise ConfigError(f"{path}: not TOML: {fault}") from None


def _merged(base: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``given`` laid over ``base``, section by section; a table that is a value replaces."""
    result = dict(base)
    for name, value in given.items():
        key, below = prefix + name, base.get(name)
        is_section = section_type(schema().get(key)) is not None
        if is_section and isinstance(value, Mapping) and isinstance(below, Mapping):
            value = _merged(below, value, f"{key}.")
        result[name] = value
    return result


def _apply(data: dict[str, Any], override: str) -> str:
    """Write one override into ``data`` and return its key."""
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator:
        raise ConfigError(f"{override[:200]!r}: expected section.key=value, such as train.steps=2k")
    if key not in schema():
        raise unknown_key(key)
    value = from_text(text, key)
    if section_type(schema()[key]) is not None and value is not None:
        example = next(k for k in schema() if k.startswith(f"{key}."))
        raise ConfigError(f"{key} is a section: set its keys one by one, such as {example}=…")
    *path, name = key.split(".")
    table: Any = data
    for depth, part in enumerate(path, start=1):
        table = table[part]
        if table is None:
            section = ".".join(path[:depth])
            raise ConfigError(
                f"{key}: this configuration has no {section}; "
                "start from a preset that has one, or give all its keys in a file"
            )
    table[name] = value
    return key
