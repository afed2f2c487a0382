"""``deltamoe trace``: let a model read and continue a prompt, and keep what went on inside it."""

import json
from pathlib import Path
from typing import Any, Literal

import click

from deltamoe.cli.format import COUNT, size, table
from deltamoe.cli.sampling import model_options, sampling_rules
from deltamoe.plan import Bits

__all__ = ["command"]


@click.command("trace")
@model_options
@click.option("--prompt", default="", help="The text to read; empty begins a new document.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The file to write, by custom ending in .safetensors.",
)
@click.option(
    "--max-tokens", type=COUNT, default=20, show_default=True, help="Most tokens written."
)
@click.option(
    "--capture",
    default="all",
    show_default=True,
    metavar="LAYERS",
    help="Layers recorded in full: all (as many as fit), none, or numbers such as 0,3.",
)
@click.option(
    "--longest",
    type=COUNT,
    default=512,
    show_default=True,
    help="Longest text recorded, in tokens; at most 2,048.",
)
@sampling_rules
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: all but the arrays.")
def command(
    path: Path,
    prompt: str,
    out: Path,
    max_tokens: int,
    capture: str,
    longest: int,
    device: str,
    dtype: Literal["fp32", "bf16"] | None,
    quantize: Bits | None,
    memory: int | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Record how the model in RUN reads and continues a text.

    The file holds router scores, memories, attention, and what could have come next; `deltamoe
    explore FILE` shows it, also where there is no model. docs/explorer.md describes it.
    """
    layers = _layers(capture)

    from deltamoe.explorer.record import Capture, trace
    from deltamoe.inference.opened import open_model

    opened = open_model(path, device=device, dtype=dtype, quantize=quantize, memory=memory)
    recorded = trace(
        opened.model,
        opened.tokenizer,
        prompt,
        max_new_tokens=max_tokens,
        capture=Capture(layers=layers, most_tokens=longest),
        source={"name": path.resolve().name, "label": opened.label},
        **sampling,
    )
    recorded.save(out)
    if as_json:
        click.echo(json.dumps(recorded.summary, indent=2))
        return
    summary = recorded.summary
    click.echo(summary["prompt"] + summary["text"])
    click.echo(table(_rows(summary)), err=True)
    held = sum(check["holds"] for check in summary["checks"])
    click.echo(f"{held} of {len(summary['checks'])} checks hold", err=True)
    click.echo(
        f"{summary['num_tokens']} tokens, {size(recorded.nbytes)} in {out}; "
        f"see it with: deltamoe explore {out}",
        err=True,
    )


def _layers(text: str) -> tuple[int, ...] | None:
    if text == "all":
        return None
    if text == "none":
        return ()
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 10 for part in parts):
        raise click.UsageError(f"--capture {text!r}: expected all, none, or numbers such as 0,3")
    return tuple(int(part) for part in parts)


def _rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("LAYER", "MIXER", "CHANNEL", "HALF-LIFE", "BETA", "MAXVIO")]
    for layer in summary["layers"]:
        rows.append(
            (
                str(layer["layer"]),
                layer["mixer"],
                layer["channel"],
                f"{layer['half_life']:.1f} tokens" if "half_life" in layer else "",
                f"{layer['beta']:.2f}" if "beta" in layer else "",
                f"{layer['max_vio']:.2f}" if "max_vio" in layer else "",
            )
        )
    return rows
