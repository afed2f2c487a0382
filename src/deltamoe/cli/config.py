"""``deltamoe config``: the configuration that a command would run, value by value."""

import json
from collections.abc import Mapping
from typing import Any

import click

from deltamoe.checkpoint.run_folder import read_any_config
from deltamoe.cli.format import count, table
from deltamoe.config import FORMAT, PRESETS, resolve, to_dict
from deltamoe.plan import parameters

__all__ = ["command"]


@click.group("config")
def command() -> None:
    """Show a configuration with the origin of each value, or list the presets."""


@command.command("show", epilog="Example: deltamoe config show nano train.steps=2k > longer.toml")
@click.argument("config", metavar="PRESET|FILE|FOLDER")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print a configuration as TOML that can be read back, each value with its origin."""
    run, origins = resolve(config, overrides, read=read_any_config)
    data = to_dict(run)
    if as_json:
        click.echo(json.dumps({"config": {"format": FORMAT, **data}, "origins": origins}, indent=2))
    else:
        click.echo("\n\n".join(_sections(data, origins)))


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_presets(as_json: bool) -> None:
    """List the presets with their sizes."""
    counted = {name: parameters(preset.config.model) for name, preset in PRESETS.items()}
    if as_json:
        presets = [
            {
                "name": name,
                "total": counted[name].total,
                "active": counted[name].active,
                "summary": preset.summary,
            }
            for name, preset in PRESETS.items()
        ]
        click.echo(json.dumps({"presets": presets}, indent=2))
        return
    rows = [("PRESET", "TOTAL", "ACTIVE", "")]
    for name, preset in PRESETS.items():
        size = counted[name]
        rows.append((name, count(size.total), count(size.active), preset.summary))
    click.echo(table(rows, right=(1, 2)))


def _sections(data: Mapping[str, Any], origins: Mapping[str, str], prefix: str = "") -> list[str]:
    """The TOML text of each section, parents first; what is none stands in a comment."""
    values = [
        (_assignment(name, value), f"# {origins[prefix + name]}")
        for name, value in data.items()
        if prefix + name in origins
    ]
    sections = [f"[{prefix[:-1]}]\n{table(values)}"] if values else []
    for name, value in data.items():
        if prefix + name not in origins:
            sections += _sections(value, origins, f"{prefix}{name}.")
    return sections


def _assignment(name: str, value: Any) -> str:
    return f"# {name} is none" if value is None else f"{name} = {_toml(value)}"


def _toml(value: Any) -> str:
    """A value in TOML; JSON's notation is TOML's, but for tables and the character DEL."""
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{_toml(name)} = {_toml(weight)}" for name, weight in value.items())
            + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
