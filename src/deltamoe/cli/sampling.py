"""The options that say which model runs, where, and how its tokens are chosen.

Shared by the verbs that write text; the names and defaults of the sampling options are those of
``deltamoe.inference.sampler.Sampler``. No torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from deltamoe.cli.format import COUNT

__all__ = ["DEFAULTS", "model_options", "sampling_options"]

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULTS: dict[str, float] = {
    "temperature": 0.8,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": 0,
}

_SAMPLING = {
    "temperature": (float, "0 takes the likeliest token each time; above 1 is wilder."),
    "top_k": (COUNT, "Choose among this many likeliest tokens; 0 is all."),
    "top_p": (float, "Choose among the likeliest tokens that reach this probability together."),
    "min_p": (float, "Least probability, relative to the likeliest token's."),
    "repetition_penalty": (float, "Above 1 makes tokens of the text so far less likely."),
    "seed": (COUNT, "The same seed and prompt give the same text."),
}


def model_options(command: Command) -> Command:
    """Add RUN, --device and --dtype."""
    command = click.option(
        "--dtype", type=click.Choice(["fp32", "bf16"]), help="Precision; the file's by default."
    )(command)
    command = click.option(
        "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
    )(command)
    return click.argument("path", metavar="RUN", type=click.Path(path_type=Path))(command)


def sampling_options(command: Command) -> Command:
    """Add --max-tokens, --stop and one option for each field of ``Sampler``."""
    for name, (kind, text) in reversed(_SAMPLING.items()):
        command = click.option(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=DEFAULTS[name],
            show_default=True,
            help=text,
        )(command)
    command = click.option(
        "--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."
    )(command)
    return click.option(
        "--max-tokens", type=COUNT, default=200, show_default=True, help="Most tokens written."
    )(command)
