"""`make demo` calls, and tells to type, only commands that exist and are understood."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from deltamoe.cli import VERBS, group
from tests.docs.pages import ROOT

RUN = "runs/demo"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script prints (``said``), and calls a program that does nothing with (``calls``)."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / RUN).mkdir(parents=True)
    program = folder / "deltamoe"
    program.write_text(
        f'#!/bin/sh\nprintf "%s\\0" "$@" >> {folder}/calls; echo >> {folder}/calls\n'
    )
    program.chmod(0o755)
    words = ["sh", str(ROOT / "demo.sh"), str(program), RUN]
    run = subprocess.run(
        words, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL, cwd=folder
    )
    (folder / "said").write_text(run.stdout.replace(str(program), "deltamoe"))
    return folder


def printed(folder: Path) -> list[list[str]]:
    """The commands of the farewell; words far behind one explain it."""
    lines = re.findall(r"^  deltamoe (.+)$", (folder / "said").read_text(), re.MULTILINE)
    return [shlex.split(re.split(r"\s{2,}", line)[0]) for line in lines]


def understood(words: list[str]) -> dict[str, object]:
    """The values a verb would be called with.

    Raises:
        click.ClickException: it would not be.
    """
    command = group.get_command(click.Context(group), words[0])
    assert command is not None, words
    return command.make_context(words[0], words[1:]).params


def test_the_explorer_stands_first_in_the_farewell(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    assert printed(folder)[0] == ["explore", RUN]
    assert understood(printed(folder)[0])["path"] == Path(RUN)


def test_every_command_is_understood(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    called = [line.split("\0")[:-1] for line in (folder / "calls").read_text().splitlines()]
    assert [words[0] for words in called] == ["train", "generate", "chat"]
    assert {words[0] for words in printed(folder)} <= set(VERBS)
    for words in [*called, *printed(folder)]:
        assert understood(words)


def test_a_wrong_command_would_be_noticed() -> None:
    for words in (["explore", "--prot", "1"], ["generate", RUN, "--temperature", "warm"]):
        with pytest.raises(click.ClickException):
            understood(words)
