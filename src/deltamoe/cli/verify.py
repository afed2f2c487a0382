"""``deltamoe verify``: is a checkpoint whole, does it run, and does it run alike in every way?

Reads every byte; ``inspect`` is the quick look.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deltamoe.cli.format import table
from deltamoe.errors import DeltamoeError

if TYPE_CHECKING:
    from deltamoe.engine.proof import Proof, Way

__all__ = ["command"]

_PROMPT_TOKENS = 300
_TEXT = (
    "Whatever is read twice should be understood alike twice: alone or in company, in one piece "
    "or in many, after an interruption, from a note that was put aside, and by a second reader "
    "who begins where the first one stopped. "
)


@click.command("verify")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--no-forward", is_flag=True, help="Do not load the model; needs little memory.")
@click.option(
    "--engine",
    "of_engine",
    is_flag=True,
    help="Continue a text in every way the engine knows, and compare.",
)
def command(path: Path, as_json: bool, no_forward: bool, of_engine: bool) -> None:
    """Check PATH: a run's newest checkpoint, a step folder, a published folder, a safetensors file.

    Compares hashes, configuration, names and shapes; looks for NaN and infinity; reads the
    tokenizer; runs one forward pass. Nothing in it is executed. All checks are shown; if one
    failed, the exit code is that of the first: 3 for a file that is not what it should be, 2 for
    parts that do not belong together, 4 if the model does not fit into memory.

    With --engine it shows instead, for each way of running one text (among neighbours, from a kept
    prefix, interrupted, forked, from a state file and so on), the largest difference of a logit and
    the first token that differs; the exit code is 1 if a way is wrong.
    """
    if of_engine and no_forward:
        raise click.UsageError("--engine runs the model; it cannot be had with --no-forward")
    if of_engine:
        _prove(path, as_json=as_json)
        return
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


def _prove(path: Path, *, as_json: bool) -> None:
    from deltamoe.engine.proof import prove
    from deltamoe.inference import open_model

    opened = open_model(path)
    tokenizer = opened.tokenizer
    ids = tokenizer.encode(_TEXT)
    ids = [tokenizer.end_id, *(ids * (1 + _PROMPT_TOKENS // len(ids)))[:_PROMPT_TOKENS]]
    proof = prove(opened.model, tokenizer, ids)
    if as_json:
        report = {
            "path": str(path),
            "is_right": proof.is_right,
            **{key: getattr(proof, key) for key in ("num_prompt_tokens", "num_tokens", "dtype")},
            "has_decoder": proof.has_decoder,
            "rounding": proof.rounding,
            "ways": [way._asdict() for way in proof.ways],
        }
        click.echo(json.dumps(report, indent=2))
    else:
        click.echo(_heading(path, proof))
        rows = [("way", "largest difference", "first token that differs", "")]
        click.echo(table([*rows, *map(_row, proof.ways)], indent=2))
    if not proof.is_right:
        wrong = ", ".join(way.name for way in proof.ways if not way.is_right)
        raise DeltamoeError(f"the engine did not answer alike in every way: {wrong}")


def _heading(path: Path, proof: "Proof") -> str:
    return (
        f"{path}  ({proof.num_prompt_tokens} tokens read, {proof.num_tokens} drawn, {proof.dtype}; "
        f"rounding may change a logit by {proof.rounding:.1g})"
    )


def _row(way: "Way") -> tuple[str, str, str, str]:
    differs = "none" if way.diverges_at is None else f"{way.diverges_at}"
    if way.margin is not None:
        differs += f" (apart by {way.margin:.1g})"
    expected = "to the last bit" if way.must_be_equal else "to rounding"
    difference = "0" if way.difference == 0 else f"{way.difference:.1e}"
    return way.name, difference, differs, f"equal {expected}" if way.is_right else "WRONG"
