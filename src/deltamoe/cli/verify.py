"""``deltamoe verify``: is a checkpoint whole, does it run, and does it run alike in every way?

Reads every byte; ``inspect`` is the quick look.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from deltamoe.cli.format import table
from deltamoe.cli.sampling import model_options
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
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--no-forward", is_flag=True, help="Do not load the model; needs little memory.")
@click.option(
    "--engine",
    "of_engine",
    is_flag=True,
    help="Continue a text in every way the engine knows, and compare.",
)
def command(
    path: Path,
    as_json: bool,
    no_forward: bool,
    of_engine: bool,
    **how: Any,
) -> None:
    """Check RUN: a run's newest checkpoint, a step folder, a published folder, a safetensors file.

    Compares hashes, configuration, names and shapes; looks for NaN and infinity; reads the
    tokenizer; runs one forward pass. Nothing in it is executed. All checks are shown; if one
    failed, the exit code is that of the first: 3 for a file that is not what it should be, 2 for
    parts that do not belong together, 4 if the model does not fit into memory.

    With --engine it shows instead, for each way of running one text (among neighbours, from a kept
    prefix, interrupted, forked, from a state file and so on), the largest difference of a logit
    from the plainest way, and from a cold run that cuts the text alike; the first token that
    differs; and that the way took place at all. The exit code is 1 if a way is wrong. --device,
    --dtype, --quantize and --memory say how the model is to run.
    """
    if of_engine and no_forward:
        raise click.UsageError("--engine runs the model; it cannot be had with --no-forward")
    if of_engine:
        _prove(path, as_json=as_json, **how)
        return
    context = click.get_current_context()
    for name in how:
        if context.get_parameter_source(name) != ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name} goes with --engine; the file is checked as it is")
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


def _prove(path: Path, *, as_json: bool, **how: Any) -> None:
    from deltamoe.engine.proof import prove
    from deltamoe.inference import open_model

    opened = open_model(path, **how)
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
            "ways": [{**way._asdict(), "is_right": way.is_right} for way in proof.ways],
        }
        click.echo(json.dumps(report, indent=2))
    else:
        click.echo(_heading(path, proof))
        rows = [("way", "difference", "cut alike", "first token that differs", "it took place", "")]
        click.echo(table([*rows, *map(_row, proof.ways)], indent=2))
    if not proof.is_right:
        wrong = ", ".join(way.name for way in proof.ways if not way.is_right)
        raise DeltamoeError(f"the engine did not answer alike in every way: {wrong}")


def _heading(path: Path, proof: "Proof") -> str:
    return (
        f"{path}  ({proof.num_prompt_tokens} tokens read, {proof.num_tokens} drawn, {proof.dtype}; "
        f"rounding may change a logit by {proof.rounding:.1g})"
    )


def _row(way: "Way") -> tuple[str, ...]:
    differs = "none" if way.diverges_at is None else f"{way.diverges_at}"
    if way.margin is not None:
        differs += f" (apart by {way.margin:.1g})"
    verdict = "equal to the last bit" if way.must_be_equal else "equal to rounding"
    return (
        way.name,
        _shown(way.difference),
        _shown(way.difference_alike),
        differs,
        "" if way.number is None else f"{way.number} {way.counted}",
        verdict if way.fault is None else f"WRONG: {way.fault}",
    )


def _shown(difference: float | None) -> str:
    if difference is None:
        return "-"
    return "0" if difference == 0 else f"{difference:.1e}"
