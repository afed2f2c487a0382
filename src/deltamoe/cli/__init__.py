"""The command line: one module a verb, imported when that verb is called.

Lives here: the group, its verbs, and the turning of errors into sentences and exit codes. A verb's
module defines a click command named ``command``; what needs torch is imported inside it, so that
``--help`` and ``plan`` answer at once.
May import: everything, one verb at a time.
Read first: this file, then ``plan.py`` as the pattern of a verb.
"""

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import click

from deltamoe.cli.process import settle
from deltamoe.errors import DeltamoeError, Interrupted
from deltamoe.version import __version__

__all__ = ["VERBS", "group", "main"]

# In the order of a first hour with the program; ``--help`` prints it without importing a verb.
VERBS = {
    "plan": "Work out what a configuration costs: parameters, FLOPs, memory.",
    "config": "Show a configuration value by value, or list the presets.",
    "data": "Prepare a data set, or describe one.",
    "train": "Train a model, or go on training one.",
    "generate": "Continue a text.",
    "chat": "Talk to a model.",
    "serve": "Answer OpenAI's clients with a model.",
    "bench": "Measure a server under load.",
    "explore": "Watch a model think, on a page in the browser.",
    "trace": "Record how a model reads and continues a text.",
    "eval": "Measure a model.",
    "convert": "Write a model for other programs, or read theirs.",
    "quantize": "Write a model in 8 or 4 bits.",
    "inspect": "Look into a checkpoint without loading it.",
    "verify": "Check that a checkpoint is whole, and that it runs.",
    "doctor": "Report what this machine and this installation can do.",
    "backends": "List each operator's implementations and which can run here.",
}

_EPILOG = """\
\b
Exit codes:
  0    done
  1    failed
  2    wrong usage, or a configuration that cannot work
  3    a file from outside is missing, broken or too new
  4    memory or disk is too small
  75   stopped by a signal after writing a checkpoint; the run can be resumed
  130  interrupted at once (143: by SIGTERM)
"""


class _Verbs(click.Group):
    """A group that knows its verbs' names and imports their modules only when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"deltamoe.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in VERBS and not name.startswith("-"):
            close = difflib.get_close_matches(name, VERBS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the verbs are {', '.join(VERBS)}"
            raise click.UsageError(f"no verb {name!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=_Verbs,
    epilog=_EPILOG,
    subcommand_metavar="VERB [ARGS]...",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="deltamoe", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def group(ctx: click.Context, debug: bool) -> None:
    """Train, run and see inside Kimi Linear models: KDA, MLA and sparse experts."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    A verb ends in another code than 0 by raising a ``DeltamoeError`` or by ``ctx.exit(code)``.

    Args:
        arguments: without the program's name; None takes the process's own.
    """
    settle()
    given = list(sys.argv[1:] if arguments is None else arguments)
    color = False if "NO_COLOR" in os.environ else None
    debug = False
    try:
        with group.make_context("deltamoe", given, color=color) as ctx:
            debug = ctx.params["debug"]
            group.invoke(ctx)
        sys.stdout.flush()
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.exceptions.NoArgsIsHelpError as asked:
        asked.show()
        return asked.exit_code
    except (KeyboardInterrupt, click.Abort):
        if sys.stderr.isatty():
            click.echo(err=True)  # the terminal has just printed ^C
        return 130
    except BrokenPipeError:
        return _leave_a_broken_pipe()
    except Exception as error:
        if debug:
            traceback.print_exc()
        click.echo(_sentence(error, debug), err=True, color=color)
        return _exit_code(error)
    return 0


def _sentence(error: Exception, debug: bool) -> str:
    prefix = click.style("error:", fg="red", bold=True)
    if isinstance(error, Interrupted):
        return str(error)
    if isinstance(error, DeltamoeError):
        return f"{prefix} {error}"
    if isinstance(error, click.ClickException):
        where = getattr(error, "ctx", None)
        see = f"\nsee `{where.command_path} --help`" if where is not None else ""
        return f"{prefix} {error.format_message()}{see}"
    hint = "" if debug else "\nrun it again as `deltamoe --debug VERB …` for the traceback"
    return f"{prefix} unexpected {type(error).__name__}: {error}{hint}"


def _exit_code(error: Exception) -> int:
    return error.exit_code if isinstance(error, DeltamoeError | click.ClickException) else 1


def _leave_a_broken_pipe() -> int:
    """The reader of our output is gone: end without a word, also when Python flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
