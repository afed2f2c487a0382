"""``deltamoe convert``: a model into another program's files, or theirs into ours.

What is written appears whole or not at all, under a name that was free.
"""

import json
from pathlib import Path

import click

from deltamoe.cli.format import size, table
from deltamoe.cli.progress import byte_progress
from deltamoe.conversion import ConversionPlan, convert, plan_conversion
from deltamoe.conversion.convert import Target

__all__ = ["command"]

_EXAMPLES = """\b
Examples:
  deltamoe convert runs/demo demo-hf --to hf --dtype bf16
  deltamoe convert runs/demo demo.gguf --to gguf --quant q8_0
  deltamoe convert Kimi-Linear-48B-A3B-Base base --to deltamoe --dry-run
"""
_MOST_FILES = 8


@click.command("convert", epilog=_EXAMPLES)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--to",
    required=True,
    type=click.Choice(["hf", "gguf", "deltamoe"]),
    help="hf: a folder for transformers, vLLM and others; gguf: a file for llama.cpp; "
    "deltamoe: a checkpoint of ours.",
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    help="Of the weights, for hf and deltamoe [default: the source's].",
)
@click.option(
    "--quant",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    help="Of the matrices, for gguf [default: f16].",
)
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    source: Path,
    out: Path,
    overrides: tuple[str, ...],
    to: Target,
    dtype: str | None,
    quant: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the model in SOURCE, with its tokenizer, to OUT, which must not exist.

    SOURCE is a run folder, a step folder, a published folder or a .gguf file. KEY=VALUE reads the
    same tensors in another way, such as model.mla.latent_norm_eps=1e-6.
    """
    if to == "gguf" and dtype is not None:
        raise click.UsageError("--dtype is for hf and deltamoe; --to gguf takes --quant")
    if to != "gguf" and quant is not None:
        raise click.UsageError(f"--quant is for gguf; --to {to} takes --dtype")
    chosen = quant if to == "gguf" else dtype
    planned = plan_conversion(source, out, to=to, dtype=chosen, overrides=overrides)
    if not dry_run:
        with byte_progress() as progress:
            convert(source, out, to=to, dtype=chosen, overrides=overrides, progress=progress)
    if as_json:
        click.echo(json.dumps(planned.to_dict() | {"written": not dry_run}, indent=2))
    else:
        click.echo(_text(planned, dry_run))


def _text(planned: ConversionPlan, dry_run: bool) -> str:
    rows = [
        ("source", f"{planned.source} ({planned.kind})"),
        ("out", f"{planned.out} ({planned.to}, {planned.dtype})"),
        ("tensors", f"{planned.num_tensors:,}, {planned.num_parameters:,} parameters"),
        ("bytes", f"{planned.num_bytes:,} ({size(planned.num_bytes)})"),
        ("tokenizer", planned.tokenizer or "none"),
    ]
    shown = planned.files[:_MOST_FILES]
    rows += [("file", f"{f.name}, {f.num_tensors:,} tensors, {size(f.num_bytes)}") for f in shown]
    if more := len(planned.files) - len(shown):
        rows.append(("", f"and {more} more files"))
    rows += [("note", note) for note in planned.notes]
    verdict = "Nothing was written." if dry_run else f"Written: {planned.out}"
    return table(rows) + f"\n\n{verdict}"
