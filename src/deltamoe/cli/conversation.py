"""The loop behind ``deltamoe chat``: lines in, answers out, and a few commands.

Answers go to standard output and everything else to standard error, so that a conversation can be
piped in and its answers piped out.
"""

import contextlib
import difflib
import io
import sys
from collections.abc import Callable
from typing import Any

import click

from deltamoe.cli.format import count, size
from deltamoe.cli.sampling import DEFAULTS, cache_report
from deltamoe.errors import ConfigError, DeltamoeError
from deltamoe.inference.opened import OpenedModel
from deltamoe.inference.sampler import Sampler
from deltamoe.inference.session import Session

__all__ = ["Conversation"]

_HELP = """\
Type a line and the model writes on; an empty line lets it go on.
  /reset           forget the text and start anew
  /save FILE       keep the text's state       /load FILE   go on from a kept state
  /temperature N   0 is the likeliest text     /seed N      another course of chance
  /stats           length, memory, speed       /help        this list
  /quit            leave, as Ctrl-D does       Ctrl-C       stop an answer"""


class Conversation:
    """A session at a terminal or behind a pipe.

    Args:
        opened: the model to talk to.
        options: keyword arguments of ``Session.stream``.
        system: what the system says first; for models with turns.

    Raises:
        ConfigError: an option out of range, or a system's turn for a base model.
    """

    def __init__(self, opened: OpenedModel, options: dict[str, Any], *, system: str = "") -> None:
        if system and opened.chat_template is None:
            raise ConfigError(
                "--system is for models with a chat template; this one continues text: "
                "begin with what it should continue"
            )
        self._opened = opened
        self._session = Session(
            opened.model,
            opened.tokenizer,
            weights_sha256=opened.checkpoint.weights_sha256,
            chat_template=opened.chat_template,
            system=system,
        )
        self._options = options
        Sampler(**self._chance())
        self._turn = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: _say(_HELP),
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
            "/seed": lambda value: self._set("seed", int, value),
            "/temperature": lambda value: self._set("temperature", float, value),
        }

    def run(self) -> None:
        """Answer line after line until the input ends or asks to quit."""
        self._banner()
        is_terminal = sys.stdin.isatty()
        if isinstance(sys.stdin, io.TextIOWrapper):  # a line that is not UTF-8 ends no conversation
            sys.stdin.reconfigure(errors="surrogateescape")
        if is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (line editing and history for input())
        while True:
            try:
                line = input("> " if is_terminal else "")
                if line.strip() == "/quit":
                    return
                self._take(line)
            except KeyboardInterrupt:
                _say("\n(stopped; /quit or Ctrl-D leaves)")
            except EOFError:
                return
            except DeltamoeError as error:
                _say(f"{click.style('error:', fg='red', bold=True)} {error}")

    def _take(self, line: str) -> None:
        if not line.startswith("/"):
            return self._answer(line)
        name, _, argument = line.strip().partition(" ")
        if name in self._commands:
            return self._commands[name](argument.strip())
        close = difflib.get_close_matches(name, [*self._commands, "/quit"], n=1)
        raise ConfigError(
            f"no command {name}; " + (f"did you mean {close[0]}?" if close else "/help lists them")
        )

    def _answer(self, line: str) -> None:
        session, before = self._session, self._session.answer
        is_text = session.chat_template is None
        if (
            is_text
            and line
            and session.text.num_tokens > 1
            and not (before and before.text.endswith("\n"))
        ):
            line = "\n" + line
        # A new course of chance each turn, or empty lines in a row would repeat themselves.
        options = {**self._options, "seed": self._options["seed"] + self._turn}
        self._turn += 1
        try:
            with contextlib.closing(session.stream(line, **options)) as pieces:
                for piece in pieces:
                    click.echo(piece, nl=False)
        finally:
            click.echo()

    def _banner(self) -> None:
        opened, model = self._opened, self._opened.config.model
        validation, is_base = opened.validation_bits_per_byte, opened.chat_template is None
        _say(
            f"{opened.label}: {count(opened.num_parameters)} parameters, "
            f"{model.num_layers} layers ({model.schedule}), tokenizer {opened.tokenizer.name}"
            + ("" if validation is None else f", {validation:.3f} bits/byte on held-out text")
            + ("\nA base model: it continues what you type." if is_base else "\nIt answers turns.")
            + " /help lists the commands."
        )

    def _reset(self, _: str) -> None:
        self._turn = 0
        self._session.reset()

    def _save(self, path: str) -> None:
        self._session.save(_required(path, "/save"))
        _say(f"{self._session.text.num_tokens:,} tokens kept in {path}")

    def _load(self, path: str) -> None:
        self._session.load(_required(path, "/load"))
        _say(f"going on after {self._session.text.num_tokens:,} tokens")

    def _stats(self, _: str) -> None:
        session = self._session
        _say(
            f"{session.text.num_tokens:,} tokens of text in {size(session.text.nbytes)} of state; "
            f"the last answer came at {session.tokens_per_second:.0f} tokens/s"
        )
        if report := cache_report(self._opened):
            _say(report)

    def _chance(self) -> dict[str, Any]:
        return {name: self._options[name] for name in DEFAULTS}

    def _set(self, name: str, kind: type[int] | type[float], value: str) -> None:
        try:
            changed = kind(value)
        except ValueError:
            raise ConfigError(f"/{name} {value}: expected a number") from None
        Sampler(**{**self._chance(), name: changed})  # refuses what is out of range
        self._options[name] = changed
        self._turn = 0


def _required(path: str, command: str) -> str:
    if not path:
        raise ConfigError(f"{command} needs a file name")
    return path


def _say(text: str) -> None:
    click.echo(text, err=True)
