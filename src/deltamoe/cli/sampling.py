"""The options that say which model runs, where, and how its tokens are chosen.

Shared by the verbs that write text; the names and defaults of the sampling options are those of
``deltamoe.inference.sampler.Sampler``. No torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from deltamoe.cli.format import COUNT, size

if TYPE_CHECKING:
    from deltamoe.inference.opened import OpenedModel

__all__ = [
    "BITS",
    "DEFAULTS",
    "cache_report",
    "model_options",
    "sampling_options",
    "sampling_rules",
]

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


class _Bits(click.Choice[str]):
    """8 or 4, as a number."""

    def __init__(self) -> None:
        super().__init__(["8", "4"])

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        return int(super().convert(str(value), param, ctx))


BITS = _Bits()


def model_options(command: Command) -> Command:
    """Add RUN, --device, --dtype, --quantize and --memory."""
    command = click.option(
        "--memory",
        type=COUNT,
        help="Bytes to stay within (12Gi): the experts of a quantised model stay on the disk, and "
        "those used most are kept.",
    )(command)
    command = click.option("--quantize", type=BITS, help="Round the matrices to so many bits.")(
        command
    )
    command = click.option(
        "--dtype", type=click.Choice(["fp32", "bf16"]), help="Precision; the file's by default."
    )(command)
    command = click.option(
        "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
    )(command)
    return click.argument("path", metavar="RUN", type=click.Path(path_type=Path))(command)


def cache_report(opened: "OpenedModel") -> str:
    """What an expert cache did, as a sentence; "" where there is none."""
    cache = opened.expert_cache
    if cache is None:
        return ""
    asked = cache.num_hits + cache.num_misses
    return (
        f"experts: {cache.num_slots:,} of {cache.num_experts:,} in {size(cache.nbytes)} of memory; "
        f"{cache.num_hits:,} of {asked:,} found there ({cache.num_hits / max(asked, 1):.0%}), "
        f"{size(cache.bytes_read)} read from the disk"
    )


def sampling_rules(command: Command) -> Command:
    """Add one option for each field of ``Sampler``."""
    for name, (kind, text) in reversed(_SAMPLING.items()):
        command = click.option(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=DEFAULTS[name],
            show_default=True,
            help=text,
        )(command)
    return command


def sampling_options(command: Command) -> Command:
    """Add --max-tokens, --stop and the sampling rules."""
    command = sampling_rules(command)
    command = click.option(
        "--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."
    )(command)
    return click.option(
        "--max-tokens", type=COUNT, default=200, show_default=True, help="Most tokens written."
    )(command)
