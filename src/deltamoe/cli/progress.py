"""How far long work on bytes is: a bar on a terminal, a line now and then elsewhere.

Always on standard error, so that what a verb prints can be piped.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from deltamoe.cli.format import size

__all__ = ["Progress", "byte_progress"]

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how many bytes are done, and of how many if that is known."""

_SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def byte_progress() -> Iterator[Progress]:
    """A bar on a terminal, a line every few seconds elsewhere; both on stderr."""
    if sys.stderr.isatty():
        with _bars() as update:
            yield update
    else:
        yield _lines()


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield update


def _lines() -> Progress:
    last_line = time.monotonic()

    def update(what: str, done: int, total: int | None) -> None:
        nonlocal last_line
        now = time.monotonic()
        if now - last_line >= _SECONDS_BETWEEN_LINES:
            last_line = now
            of = "" if total is None else f" of {size(total)}"
            click.echo(f"{what}: {size(done)}{of}", err=True)

    return update
