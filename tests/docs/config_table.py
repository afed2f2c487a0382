"""The tables of docs/training.md that are written from the code.

``python -m tests.docs.config_table`` writes them anew; test_config_table.py holds them to it.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from deltamoe.cli.format import count
from deltamoe.config import (
    PRESETS,
    BalanceConfig,
    DataConfig,
    KdaConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    TrainConfig,
)
from deltamoe.config.parse import section_type
from deltamoe.plan import parameters
from tests.docs.pages import ROOT, table

__all__ = ["PAGE", "TABLES", "described"]

PAGE = ROOT / "docs" / "training.md"

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "model.kda": KdaConfig,
    "model.mla": MlaConfig,
    "model.moe": MoeConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "balance": BalanceConfig,
    "train": TrainConfig,
}


def described(kind: type) -> dict[str, str]:
    """Field -> what the class's docstring says of it, under ``Attributes:``."""
    lines = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2].splitlines()
    entries: list[str] = []
    for line in lines:
        if re.match(r" {4}\S", line):
            entries.append(line.strip())
        elif line.strip():
            entries[-1] += " " + line.strip()
    found = {}
    for entry in entries:
        names, _, text = entry.partition(": ")
        found |= {name.strip(): text for name in names.split(",")}
    return found


def keys() -> Iterator[str]:
    for section, kind in SECTIONS.items():
        yield f"**`{section}`**\n\n| key | default | meaning |\n|---|---|---|"
        hints, texts = get_type_hints(kind), described(kind)
        for item in fields(kind):
            if section_type(hints[item.name]) is None:
                text = texts[item.name].replace("``", "`").replace("|", "\\|")
                choices = get_args(hints[item.name])
                if get_origin(hints[item.name]) is Literal and f'"{choices[0]}"' not in text:
                    text += f" One of {', '.join(choices)}."
                yield f"| `{item.name}` | {_default(item)} | {text} |"
        yield ""


def presets() -> Iterator[str]:
    yield "| preset | parameters | active | |\n|---|---|---|---|"
    for name, preset in PRESETS.items():
        size = parameters(preset.config.model)
        yield f"| `{name}` | {count(size.total)} | {count(size.active)} | {preset.summary} |"


TABLES = {"config keys": keys, "presets": presets}


def _default(item: "Field[Any]") -> str:
    if item.default is MISSING and item.default_factory is MISSING:
        return "required"
    value = item.default if item.default is not MISSING else item.default_factory()
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"`{value!r}`".replace("'", '"')


def main() -> None:
    for name, write in TABLES.items():
        begin = f"<!-- {name}: begin -->\n\n"
        written = "\n".join(write()).strip()
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(text.replace(begin + table(PAGE, name), begin + written), "utf-8")


if __name__ == "__main__":
    main()
