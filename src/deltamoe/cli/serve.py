"""``deltamoe serve``: answer OpenAI's clients with a model."""

import os
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from deltamoe.cli.format import COUNT, size
from deltamoe.cli.sampling import model_options
from deltamoe.errors import BackendUnavailableError, BadFileError, ConfigError
from deltamoe.plan import Bits

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from deltamoe.engine import Engine
    from deltamoe.inference.opened import OpenedModel
    from deltamoe.server import Settings

__all__ = ["command", "read_keys"]

KEY_VARIABLE = "DELTAMOE_API_KEY"
_MAX_KEY_FILE = 1 << 16
_BACKLOG = 1024  # connections that wait to be accepted


@click.command("serve")
@model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=int, default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    metavar="KEY",
    help=f"Answer only who sends this key; may be repeated. Others on this machine can read a "
    f"command line: prefer the variable {KEY_VARIABLE} or --api-key-file.",
)
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), help="A file with a key in each line."
)
@click.option("--allow-strangers", is_flag=True, help="Listen beyond this machine without any key.")
@click.option(
    "--allow-host", "hosts", multiple=True, metavar="NAME", help="A name this server goes by."
)
@click.option(
    "--allow-origin", "origins", multiple=True, metavar="URL", help="A web page that may call."
)
@click.option("--name", default="", help="The model's name in requests; the folder's by default.")
@click.option("--context", type=COUNT, help="Tokens a conversation may reach.")
@click.option(
    "--max-sequences", type=COUNT, default=64, show_default=True, help="Texts written at once."
)
@click.option(
    "--max-waiting", type=COUNT, default=64, show_default=True, help="Requests that may wait."
)
@click.option(
    "--max-tokens", type=COUNT, default=4096, show_default=True, help="Most tokens of an answer."
)
@click.option("--states", "state_bytes", type=COUNT, help="Bytes for running texts (2Gi).")
@click.option(
    "--cache", "cache_bytes", type=COUNT, help="Bytes for beginnings that may come again; 0: none."
)
@click.option(
    "--audit-every",
    type=COUNT,
    default=0,
    help="Compute one answer in so many again, without reuse, and compare; 0 audits none.",
)
@click.option(
    "--share-prefixes",
    is_flag=True,
    help="Let keys save each other reading; the time to a first token then tells one what another "
    "has sent.",
)
@click.option(
    "--exact-reuse",
    is_flag=True,
    help="Reuse only what changes no bit of an answer; otherwise reuse is right to rounding.",
)
@click.option(
    "--load-state",
    "state_files",
    multiple=True,
    metavar="[NAME=]FILE",
    help="Offer a text that `deltamoe generate --save-state` has kept, under its name or the "
    "file's; may be repeated.",
)
@click.option(
    "--explorer",
    "has_explorer",
    is_flag=True,
    help="The page of `deltamoe explore` beside, at /explore; it reads the model a second time.",
)
def command(
    path: Path,
    device: str,
    dtype: Literal["fp32", "bf16"] | None,
    quantize: Bits | None,
    memory: int | None,
    host: str,
    port: int,
    api_keys: tuple[str, ...],
    api_key_file: Path | None,
    allow_strangers: bool,
    hosts: tuple[str, ...],
    origins: tuple[str, ...],
    name: str,
    context: int | None,
    max_sequences: int,
    max_waiting: int,
    max_tokens: int,
    state_bytes: int | None,
    cache_bytes: int | None,
    audit_every: int,
    share_prefixes: bool,
    exact_reuse: bool,
    state_files: tuple[str, ...],
    has_explorer: bool,
) -> None:
    """Serve the model in RUN at http://HOST:PORT/v1, as OpenAI's clients expect it.

    RUN is a run folder, a step folder or a published one. SIGTERM and Ctrl-C let running answers
    finish for ten seconds.
    """
    keys = [*api_keys, *read_keys(api_key_file, os.environ.get(KEY_VARIABLE, ""))]
    try:
        from deltamoe.server import Settings, create_app, is_loopback, serve
    except ModuleNotFoundError as missing:
        raise BackendUnavailableError(
            f"the package {missing.name!r} is not installed (pip install 'deltamoe[serve]')"
        ) from None
    settings = Settings(
        model_id=name or path.resolve().name,
        host=host,
        port=port,
        api_keys=tuple(dict.fromkeys(keys)),
        allows_strangers=allow_strangers,
        shares_prefixes=share_prefixes,
        allowed_hosts=hosts,
        allowed_origins=origins,
        max_tokens=max_tokens,
    )
    if has_explorer and (keys or not is_loopback(host)):
        raise ConfigError(
            "--explorer: the page sends no API key and answers this machine alone; leave out keys "
            "and --host, or start `deltamoe explore` beside"
        )
    from deltamoe.engine import Engine, EngineOptions
    from deltamoe.inference import load_text_state
    from deltamoe.inference.opened import open_model

    options = EngineOptions(
        max_sequences=max_sequences,
        max_waiting=max_waiting,
        context=context,
        state_bytes=state_bytes,
        cache_bytes=cache_bytes,
        audit_every=audit_every,
        exact_reuse=exact_reuse,
    )
    with _bound(host, port) as bound:
        read = partial(
            open_model, path, device=device, dtype=dtype, quantize=quantize, memory=memory
        )
        opened = read()
        weights = opened.checkpoint.weights_sha256
        offered = {
            name: load_text_state(file, opened.model, weights_sha256=weights)
            for name, file in map(_named, state_files)
        }
        with Engine(opened.model, opened.tokenizer, options, weights_sha256=weights) as engine:
            app = create_app(
                engine,
                opened.tokenizer,
                settings,
                chat_template=opened.chat_template,
                offered=offered,
            )
            if has_explorer:
                app.mount("/explore", _explorer(read(), path))
            bound.listen(_BACKLOG)
            for line in _report(engine, settings, _url(bound)):
                click.echo(line, err=True)
            if has_explorer:
                click.echo(f"{_url(bound)}/explore/ shows the model at work", err=True)
            exit_code = serve(app, sockets=[bound])
    click.get_current_context().exit(exit_code)


def _named(state_file: str) -> tuple[str, Path]:
    """What ``[NAME=]FILE`` says."""
    name, is_given, file = state_file.rpartition("=")
    return name if is_given else Path(file).stem, Path(file)


def _explorer(opened: "OpenedModel", path: Path) -> "ASGIApp":
    """The explorer's page, on a model that the server does not use."""
    from deltamoe.explorer.app import create_app
    from deltamoe.explorer.live import Live
    from deltamoe.explorer.runs import runs_folder

    live = Live(opened, name=path.resolve().name)
    return create_app(model=live, runs_folder=runs_folder(path), opened=path.resolve())


def read_keys(file: Path | None, variable: str) -> list[str]:
    """The API keys of a file, one a line, and of an environment variable, blanks between them.

    Raises:
        BadFileError: no such file, one of more than 64 KiB, or one without a key.
    """
    keys = variable.split()
    if file is None:
        return keys
    try:
        with file.open("rb") as opened:
            content = opened.read(_MAX_KEY_FILE + 1)
        lines = content.decode("ascii").split()
    except (OSError, UnicodeDecodeError) as fault:
        raise BadFileError(f"{file}: expected a file of API keys: {fault}") from None
    if not lines or len(content) > _MAX_KEY_FILE:
        raise BadFileError(f"{file}: expected an API key in each line, in at most 64 KiB")
    return keys + lines


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has its address, so that one in use is told before a model is read.

    Raises:
        ConfigError: the address is in use or not this machine's.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as fault:
        bound.close()
        raise ConfigError(f"cannot listen on {host}, port {port}: {fault}") from None
    return bound


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _report(engine: "Engine", settings: "Settings", address: str) -> Iterator[str]:
    """What the server holds and where it is, line by line."""
    held = engine.stats().size
    pages_a_context = -(-held.context // held.page_tokens)
    most = held.num_pages // pages_a_context if held.page_bytes else held.num_slots
    yield (
        f"{settings.model_id}: a conversation takes {size(held.slot_bytes)}"
        f" and {size(held.page_bytes / held.page_tokens)} a token"
    )
    yield (
        f"context {held.context:,} tokens; {held.num_slots} texts at once, "
        f"{min(most, held.num_slots)} of them at full length; "
        f"{size(held.num_slots * held.slot_bytes + held.num_pages * held.page_bytes)} for running "
        f"texts, "
        f"{size(held.cached_slot_bytes + held.num_cached_pages * held.page_bytes)} for reuse"
    )
    who = f"{len(settings.api_keys)} API keys" if settings.api_keys else "no API key"
    yield f"{address}/v1 ({who}); Ctrl-C ends it"
