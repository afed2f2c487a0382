"""``deltamoe bench``: how fast something is, as its user feels it."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deltamoe.cli.format import COUNT, table
from deltamoe.errors import DeltamoeError

if TYPE_CHECKING:
    from deltamoe.cli.load import LoadReport, Percentiles, ServerAddress

__all__ = ["command"]


@click.group("bench")
def command() -> None:
    """Measure."""


@command.command("serve")
@click.argument("target", metavar="URL|RUN")
@click.option("--requests", "num_requests", type=COUNT, default=64, show_default=True)
@click.option(
    "--concurrency",
    type=COUNT,
    multiple=True,
    help="Clients that never pause; may be repeated. 1, 8 and 64 by default.",
)
@click.option(
    "--rate", type=float, multiple=True, help="Requests a second at random times; may be repeated."
)
@click.option("--prompt-tokens", type=COUNT, default=128, show_default=True, help="Median.")
@click.option("--answer-tokens", type=COUNT, default=64, show_default=True, help="Median.")
@click.option(
    "--spread", type=float, default=1.0, show_default=True, help="Of lengths; 0 makes all equal."
)
@click.option("--shared-prefix", type=COUNT, default=0, help="Tokens that all prompts begin with.")
@click.option("--seed", type=COUNT, default=0, help="Decides lengths, texts and times.")
@click.option(
    "--api-key",
    default="",
    envvar="DELTAMOE_API_KEY",
    help="Sent with each request; DELTAMOE_API_KEY's if it is not given.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def serve(
    target: str,
    num_requests: int,
    concurrency: tuple[int, ...],
    rate: tuple[float, ...],
    prompt_tokens: int,
    answer_tokens: int,
    spread: float,
    shared_prefix: int,
    seed: int,
    api_key: str,
    as_json: bool,
) -> None:
    """Put load on the server at URL, or on one that is started for the model in RUN.

    Lengths are log-normal around the medians, as in people's conversations. Times are in
    milliseconds, as the client felt them.
    """
    from deltamoe.cli.load import LoadPlan, measure

    loads: list[tuple[str, float | None, int]] = [(f"{r:g} a second", r, 1) for r in rate]
    if concurrency or not rate:
        loads += [(f"{c} at once", None, c) for c in concurrency or (1, 8, 64)]
    plans = [
        LoadPlan(
            num_requests=num_requests,
            rate=per_second,
            concurrency=clients,
            prompt_tokens=prompt_tokens,
            answer_tokens=answer_tokens,
            spread=spread,
            shared_prefix=shared_prefix,
            seed=seed,
        )
        for _, per_second, clients in loads
    ]
    with _server(target, api_key) as address:
        reports = [asyncio.run(measure(address, plan)) for plan in plans]
    if not any(report.num_finished for report in reports):
        why = next((error for report in reports for error in report.errors), "all were refused")
        raise DeltamoeError(f"no request was answered: {why}")
    named = list(zip([name for name, *_ in loads], reports, strict=True))
    if as_json:
        click.echo(json.dumps([{"load": name} | report.to_dict() for name, report in named]))
        return
    click.echo(table(_rows(named), right=range(1, 10)))
    for name, report in named:
        for error, times in report.errors.items():
            click.echo(f"{name}: {times} × {error}", err=True)


def _rows(named: "list[tuple[str, LoadReport]]") -> list[list[str]]:
    head = ["load", "done", "refused", "failed", "tokens/s"]
    for what in ("first token", "next token"):
        head += [f"{what} p50", "p95", "p99"]

    def times(percentiles: "Percentiles") -> list[str]:
        return [f"{value:.1f}" for value in (percentiles.p50, percentiles.p95, percentiles.p99)]

    return [head] + [
        [
            name,
            f"{report.num_finished}",
            f"{report.num_refused}",
            f"{report.num_failed}",
            f"{report.tokens_per_second:.0f}",
            *times(report.time_to_first_token_ms),
            *times(report.inter_token_ms),
        ]
        for name, report in named
    ]


@contextmanager
def _server(target: str, api_key: str) -> "Iterator[ServerAddress]":
    """The server at a URL, or one of our own for a folder, ended afterwards."""
    from deltamoe.cli.load import ServerAddress

    if target.startswith("http://"):
        yield ServerAddress.parse(target, api_key)
        return
    if not Path(target).exists():
        raise DeltamoeError(f"{target}: expected http://host:port, or a folder with a model")
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "deltamoe", "serve", target, "--port", "0"],
            stderr=log,
            env=os.environ | ({"DELTAMOE_API_KEY": api_key} if api_key else {}),
        )
        try:
            yield ServerAddress.parse(_announced(process, log.fileno()), api_key)
        finally:
            process.terminate()
            process.wait(timeout=30)


def _announced(process: "subprocess.Popen[bytes]", log: int) -> str:
    """The address a server that was just started says it has."""
    while process.poll() is None:
        for word in os.pread(log, 1 << 16, 0).decode(errors="replace").split():
            if word.startswith("http://"):
                return word
        time.sleep(0.05)
    raise DeltamoeError(
        "the server did not start:\n" + os.pread(log, 1 << 16, 0).decode(errors="replace")
    )
