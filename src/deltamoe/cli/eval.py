"""``deltamoe eval``: measure a model on held-out text, and on grammar."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import click

from deltamoe.cli.format import COUNT, table
from deltamoe.cli.sampling import cache_report, model_options
from deltamoe.plan import Bits

__all__ = ["command"]

_RECALL = {
    "first": "rare, for the first time",
    "repeated": "rare, seen before",
    "common": "common",
}


@click.command("eval")
@model_options
@click.option(
    "--data", "name", help="A text file, a folder or a built-in source; else what the run held out."
)
@click.option(
    "--against", type=click.Path(path_type=Path), help="Also score this model on the same tokens."
)
@click.option("--context", type=COUNT, help="Tokens of a window; else the run's.")
@click.option("--max-tokens", type=COUNT, help="Score only the first so many.")
@click.option("--streamed", is_flag=True, help="Also carry the state through whole documents.")
@click.option("--baselines", is_flag=True, help="Also say what xz and a 5-gram make of the text.")
@click.option("--blimp", type=click.Path(path_type=Path), help="BLiMP's files: a zip or a folder.")
@click.option(
    "--blimp-pairs",
    type=click.IntRange(min=1),
    help="Score only the first so many pairs of each set.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    path: Path,
    device: str,
    dtype: Literal["fp32", "bf16"] | None,
    quantize: Bits | None,
    memory: int | None,
    against: Path | None,
    name: str | None,
    context: int | None,
    max_tokens: int | None,
    streamed: bool,
    baselines: bool,
    blimp: Path | None,
    blimp_pairs: int | None,
    as_json: bool,
) -> None:
    """Measure the model in RUN: a run folder, a step folder or a published one.

    Of a text the run was trained on, only the held-out part is scored; of any other, all of it.
    """
    from deltamoe.evaluation.blimp import blimp_accuracy, read_blimp
    from deltamoe.evaluation.report import compare, measure
    from deltamoe.inference.opened import open_model

    sets = None if blimp is None else read_blimp(blimp)
    opened = open_model(path, device=device, dtype=dtype, quantize=quantize, memory=memory)
    report: dict[str, Any] = {"path": str(opened.checkpoint.path), "step": opened.checkpoint.step}
    with _progress("tokens scored") as progress:
        report |= measure(
            opened,
            name,
            context=context,
            max_tokens=max_tokens,
            streamed=streamed,
            baselines=baselines,
            progress=progress,
        )
    if against is not None:
        with _progress("tokens scored again") as progress:
            report["against"] = compare(
                report,
                open_model(against, device=device, dtype=dtype),
                name,
                max_tokens=max_tokens,
                progress=progress,
            )
    if sets is not None:
        accuracies = {}
        with _progress("BLiMP sets scored") as progress:
            for set_name, pairs in sets.items():
                accuracies[set_name] = blimp_accuracy(
                    opened.model, opened.tokenizer, pairs[:blimp_pairs]
                )
                progress(len(accuracies))
        average = sum(accuracies.values()) / len(accuracies)
        report["blimp"] = {"average": average, "sets": accuracies}
    click.echo(json.dumps(report) if as_json else "\n\n".join(_sections(report)))
    if done := cache_report(opened):
        click.echo(done, err=True)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int], None]]:
    """A count that is redrawn in place on a terminal, and nothing elsewhere."""
    is_terminal = sys.stderr.isatty()

    def show(count: int) -> None:
        if is_terminal:
            click.echo(f"\r{count:,} {what}", nl=False, err=True)

    yield show
    if is_terminal:
        click.echo("\r\033[K", nl=False, err=True)


def _sections(report: dict[str, Any]) -> Iterator[str]:
    """The report as tables."""
    yield (
        f"step {report['step']:,} on {report['data']}: {report['num_tokens']:,} tokens in windows "
        f"of {report['context']:,}"
    )
    rows: list[tuple[str, ...]] = [
        ("", "bits/byte"),
        ("this model", f"{report['bits_per_byte']:.4f}"),
    ]
    if "streamed_bits_per_byte" in report:
        rows.append(("  state carried on", f"{report['streamed_bits_per_byte']:.4f}"))
    if "against" in report:
        rows.append((report["against"]["path"], f"{report['against']['bits_per_byte']:.4f}"))
    rows += [(name, f"{value:.4f}") for name, value in report.get("baselines", {}).items()]
    yield table(rows, right=(1,))
    if "against" in report:
        change = report["against"]["perplexity_change"]
        yield f"perplexity {change:+.3%} against {report['against']['path']}"

    rows = [("tokens visible", "tokens", "nats/token")]
    for row in report["loss_by_position"]:
        first, last = f"{row['first']:,}", f"{row['last']:,}"
        visible = first if first == last else f"{first} to {last}"
        rows.append((visible, f"{row['num_tokens']:,}", f"{row['loss']:.4f}"))
    yield table(rows, right=(1, 2))

    if report["recall"] is None:
        yield "no recall: the text the run was trained on is not there any more"
    else:
        rows = [("pairs of tokens", "tokens", "nats/token")]
        for key, title in _RECALL.items():
            kind = report["recall"][key]
            loss = "" if kind["loss"] is None else f"{kind['loss']:.4f}"
            rows.append((title, f"{kind['num_tokens']:,}", loss))
        yield table(rows, right=(1, 2))

    if "blimp" in report:
        rows = [("BLiMP", "accuracy"), ("average", f"{report['blimp']['average']:.3f}")]
        rows += [(name, f"{value:.3f}") for name, value in report["blimp"]["sets"].items()]
        yield table(rows, right=(1,))
