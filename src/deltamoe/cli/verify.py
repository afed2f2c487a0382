"""``deltamoe verify``: is a checkpoint whole, and does it run?

Reads every byte; ``inspect`` is the quick look.
"""

import json
from pathlib import Path

import click

from deltamoe.cli.format import table

__all__ = ["command"]


@click.command("verify")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--no-forward", is_flag=True, help="Do not load the model; needs little memory.")
def command(path: Path, as_json: bool, no_forward: bool) -> None:
    """Check PATH: a run's newest checkpoint, a step folder, a published folder, a safetensors file.

    Compares hashes, configuration, names and shapes; looks for NaN and infinity; reads the
    tokenizer; runs one forward pass. Nothing in it is executed. All checks are shown; if one
    failed, the exit code is that of the first: 3 for a file that is not what it should be, 2 for
    parts that do not belong together, 4 if the model does not fit into memory.
    """
    from deltamoe.conversion.verify import verify

    verdict = verify(path, is_run=not no_forward)
    if as_json:
        report = {
            "path": str(verdict.path),
            "kind": verdict.kind,
            "is_good": verdict.is_good,
            "checks": [check._asdict() for check in verdict.checks],
        }
        click.echo(json.dumps(report, indent=2))
    else:
        click.echo(f"{verdict.path}  ({verdict.kind})")
        click.echo(
            table([(check.name, check.status, check.note) for check in verdict.checks], indent=2)
        )
    if verdict.faults:
        raise verdict.faults[0]
