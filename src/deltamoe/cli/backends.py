"""``deltamoe backends``: which implementation of each operator runs here, and why not another."""

import json
from dataclasses import asdict

import click

from deltamoe.cli.format import table

__all__ = ["command"]


@click.command("backends")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """List the implementations of each operator and why some cannot run here."""
    from deltamoe.ops import backend

    rows = backend.table()
    if as_json:
        click.echo(json.dumps({"backends": [asdict(row) for row in rows]}, indent=2))
        return
    lines = [("OPERATOR", "BACKEND", "HERE")]
    for row in rows:
        here = "taken by default" if row.is_default else row.why_not or "can run"
        lines.append((row.operator, row.name, here))
    click.echo(table(lines))
