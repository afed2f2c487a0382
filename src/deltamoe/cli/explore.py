"""``deltamoe explore``: the page that shows a model at work, served on this machine alone."""

import errno
import json
import socket
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from deltamoe.cli.format import COUNT
from deltamoe.cli.sampling import model_options
from deltamoe.errors import BackendUnavailableError, CheckpointError, ConfigError
from deltamoe.plan import Bits

if TYPE_CHECKING:
    from starlette.types import ASGIApp

__all__ = ["command"]

_HOST = "127.0.0.1"
_MOST_CONNECTIONS = 64
_MOST_HEADER_BYTES = 16 << 10


@click.command("explore")
@model_options
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=8100, show_default=True, help="0 is any."
)
@click.option("--no-browser", is_flag=True, help="Print the address and open no browser.")
@click.option(
    "--max-tokens",
    type=COUNT,
    default=512,
    show_default=True,
    help="Longest text that is recorded; at most 2,048.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what the page would show, and leave.")
@click.option("--view", help="With --json: print the numbers of this view instead.")
@click.option("--layer", type=click.IntRange(min=0), help="Of the view; by default the first.")
@click.option("--head", type=click.IntRange(min=0), default=0, help="Of the view.")
@click.option("--token", type=int, default=0, help="Of the view; -1 is the last.")
def command(
    path: Path,
    port: int,
    no_browser: bool,
    max_tokens: int,
    device: str,
    dtype: Literal["fp32", "bf16"] | None,
    quantize: Bits | None,
    memory: int | None,
    as_json: bool,
    view: str | None,
    layer: int | None,
    head: int,
    token: int,
) -> None:
    """Watch the model in RUN think: a run folder, a step folder, a published one, or a trace file.

    Opens a page on this machine that nobody else can reach. A trace file is shown without a model;
    of a run that has no checkpoint yet the training alone.
    Ctrl-C ends it.
    """
    if view is not None and not as_json:
        raise click.UsageError("--view goes with --json; on the page every view is a click away")
    from deltamoe.explorer import read_trace, views
    from deltamoe.explorer.runs import METRICS, runs_folder

    if not path.exists():
        raise CheckpointError(
            f"{path}: expected a run, a step folder, a published one or a trace file; "
            "there is nothing there"
        )
    folder = runs_folder(path)
    first = live = None
    if path.is_dir():
        from deltamoe.explorer.live import Live
        from deltamoe.inference.opened import open_model

        try:
            opened = open_model(path, device=device, dtype=dtype, quantize=quantize, memory=memory)
            live = Live(opened, name=path.resolve().name, prompt_tokens=max_tokens)
        except CheckpointError as fault:
            if not (path / METRICS).exists():
                raise
            click.echo(f"only the training is shown: {fault}", err=True)
    else:
        first = read_trace(path)
    if as_json:
        runs = _runs(folder, path) if folder else {"runs": []}
        if view == "runs":
            shown = runs
        elif view is None:
            model = live.model() if live else first and first.summary["model"]
            shown = {"model": model, "trace": first and first.summary, "runs": runs["runs"]}
        elif first is None:
            raise ConfigError(
                f"--view {view} shows a trace, and {path} is none: record one with "
                f"`deltamoe trace {path} --prompt TEXT --out FILE`"
            )
        else:
            shown = views.show(first, view, layer=layer, head=head, token=token)
        click.echo(json.dumps(shown, indent=2))
        return
    try:
        from deltamoe.explorer.app import create_app
    except ImportError as fault:
        raise BackendUnavailableError(
            f"the page is served with starlette and uvicorn ({fault.name} is not installed): "
            "pip install 'deltamoe[serve]'"
        ) from fault
    app = create_app(model=live, first=first, runs_folder=folder, opened=path.resolve())
    _serve(app, port, opens_browser=not no_browser)


def _runs(folder: Path, path: Path) -> dict[str, Any]:
    """What the view of training runs shows: all of them in short, and the open one's records."""
    from deltamoe.explorer.runs import list_runs, read_run

    found = list_runs(folder, path.resolve())
    opened = [run["name"] for run in found if run["is_open"]]
    return {"runs": found, "opened": read_run(folder, opened[0]) if opened else None}


def _serve(app: "ASGIApp", port: int, *, opens_browser: bool) -> None:
    import uvicorn

    with _listening(port) as listener:
        address = f"http://{_HOST}:{listener.getsockname()[1]}/"
        click.echo(f"explorer: {address}   (Ctrl-C ends it)")
        if opens_browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        config = uvicorn.Config(
            app,
            http="h11",
            log_level="warning",
            limit_concurrency=_MOST_CONNECTIONS,
            h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
            timeout_graceful_shutdown=1,
        )
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            click.echo("", err=True)


def _listening(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_HOST, port))
        listener.listen(128)
    except OSError as fault:
        listener.close()
        if fault.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "is taken" if fault.errno == errno.EADDRINUSE else "may not be used"
        raise ConfigError(f"port {port} {why}: choose another, such as --port {port + 1}") from None
    return listener
