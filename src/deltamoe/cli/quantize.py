"""``deltamoe quantize``: a model in 8 or 4 bits, for answering with less memory.

What is written appears whole or not at all, under a name that was free.
"""

import json
from pathlib import Path

import click

from deltamoe.cli.format import size, table
from deltamoe.cli.progress import byte_progress
from deltamoe.cli.sampling import BITS
from deltamoe.conversion import ConversionPlan, open_source, plan_quantized, write_quantized
from deltamoe.plan import Bits

__all__ = ["command"]

_EXAMPLES = """\b
Examples:
  deltamoe quantize runs/demo demo-8 --bits 8
  deltamoe quantize Kimi-Linear-48B-A3B-Instruct kimi-4 --bits 4 --dry-run
  deltamoe generate kimi-4 --memory 12Gi --prompt "Once"
"""


@click.command("quantize", epilog=_EXAMPLES)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--bits", required=True, type=BITS, help="Of the matrices.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16"]),
    help="Of what stays as it is: embedding, norms [default: the source's].",
)
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    source: Path,
    out: Path,
    bits: Bits,
    dtype: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the model in SOURCE, with its tokenizer, to OUT in 8 or 4 bits.

    SOURCE is a run folder, a step folder or a published folder; OUT must not exist. The result is
    a step folder that generate, chat and eval take, and train does not.
    """
    opened = open_source(source)
    planned = plan_quantized(opened, out, bits=bits, dtype=dtype)
    if not dry_run:
        with byte_progress() as progress:
            write_quantized(opened, out, bits=bits, dtype=dtype, progress=progress)
    if as_json:
        click.echo(json.dumps(planned.to_dict() | {"written": not dry_run}, indent=2))
    else:
        click.echo(_text(planned, dry_run))


def _text(planned: ConversionPlan, dry_run: bool) -> str:
    bits_each = 8 * planned.num_bytes / planned.num_parameters
    rows = [
        ("source", f"{planned.source} ({planned.kind})"),
        ("out", f"{planned.out} ({planned.dtype})"),
        ("tensors", f"{planned.num_tensors:,}, {planned.num_parameters:,} parameters"),
        ("bytes", f"{planned.num_bytes:,} ({size(planned.num_bytes)})"),
        ("a parameter", f"{bits_each:.2f} bits, all in all"),
        ("tokenizer", planned.tokenizer or "none"),
    ]
    rows += [("note", note) for note in planned.notes]
    verdict = "Nothing was written." if dry_run else f"Written: {planned.out}"
    return table(rows) + f"\n\n{verdict}"
