"""Every command line and every Python block of README.md and docs/*.md works.

The commands of one page run in one temporary folder, from top to bottom, in this process; its
```python blocks follow, as one program. ``small.py`` says how commands are made small. A ```toml
block that begins with ``# NAME.toml`` is written to that file first.

    ```sh          lines that begin with ``deltamoe`` are run and must end with exit code 0;
                   lines that begin with ``make`` must name a target and variables of the Makefile.
                   ``&&``, ``> FILE``, ``< FILE``, comments and continued lines are understood
    <!-- not run: REASON -->    on the line above a block leaves it out; the reason is printed
"""

import io
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.docs.pages import GUIDES, ROOT, Block, blocks, make_targets
from tests.docs.small import CHAT, Workbench

RUN = {"sh", "python"}
LEFT_OUT = [b for page in GUIDES for b in blocks(page) if b.language in RUN and b.why_not_run]
PAGES = [
    page
    for page in GUIDES
    if any(b.language in RUN | {"toml"} and not b.why_not_run for b in blocks(page))
]


@dataclass
class Step:
    """One program call of a command line."""

    words: list[str]
    output: str | None = None
    input: str | None = None


@pytest.fixture
def workbench(tmp_path, monkeypatch) -> Iterator[Workbench]:
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield Workbench(tmp_path)
    torch.set_num_threads(threads)  # train.threads set it for the process


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_works(page, workbench, monkeypatch, capsys) -> None:
    shown = [block for block in blocks(page) if not block.why_not_run]
    for block in shown:
        if block.language == "toml" and (name := re.match(r"# ([\w.-]+\.toml)\n", block.text)):
            Path(name[1]).write_text(block.text, encoding="utf-8")
    for block in shown:
        if block.language == "sh":
            for where, line in command_lines(block):
                run_line(where, line, workbench, monkeypatch, capsys)
    variables: dict[str, object] = {"__name__": page.stem}
    for block in shown:
        if block.language == "python":
            code = re.sub(
                r"(['\"])(runs/[^'\"]+)\1", lambda m: repr(workbench.trained(m[2])), block.text
            )
            exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), variables)


@pytest.mark.parametrize("block", LEFT_OUT, ids=lambda block: block.where)
def test_what_is_not_run(block: Block) -> None:
    pytest.skip(f"{block.where} is not run: {block.why_not_run}")


def command_lines(block: Block) -> Iterator[tuple[str, str]]:
    """Yield (page:line, command line) with continued lines joined."""
    line, first = "", block.line
    for number, part in enumerate(block.text.splitlines(), start=block.line):
        first = first if line else number
        line += part.removesuffix("\\")
        if part.endswith("\\"):
            continue
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"{block.page.relative_to(ROOT)}:{first}", line
        line = ""


def steps_of(line: str) -> list[Step]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    steps = [Step([])]
    words = iter(lexer)
    for word in words:
        if word in ("&&", ";"):
            steps.append(Step([]))
        elif word == ">":
            steps[-1].output = next(words)
        elif word == "<":
            steps[-1].input = next(words)
        elif set(word) <= set("|&<>();"):
            pytest.fail(f"{line!r}: {word!r} is not understood; mark the block as not run")
        else:
            steps[-1].words.append(word)
    return steps


def run_line(where: str, line: str, workbench: Workbench, monkeypatch, capsys) -> None:
    for step in steps_of(line):
        match step.words:
            case ["make", *words]:
                check_make(where, words)
            case ["deltamoe", *words]:
                text = Path(step.input).read_text() if step.input else CHAT
                monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
                capsys.readouterr()
                code = workbench.run(words)
                captured = capsys.readouterr()
                if step.output:
                    Path(step.output).write_text(captured.out, encoding="utf-8")
                assert code == 0, f"{where}: {line}: exit code {code}\n{captured.err}"
            case _:
                pytest.fail(
                    f"{where}: {line}: expected deltamoe or make; "
                    "put <!-- not run: reason --> above the block"
                )


def check_make(where: str, words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_variable, _ = word.partition("=")
        if is_variable:
            known = re.search(rf"^{name}\b\s*\?=|\$\({name}\)", makefile, re.MULTILINE)
            assert known, f"{where}: the Makefile has no variable {name}"
        else:
            assert word in make_targets(), f"{where}: the Makefile has no target {word}"


def test_a_line_is_read_as_a_shell_would() -> None:
    one, other = steps_of('deltamoe generate runs/a --prompt "b # c" > out.txt && make x  # note')
    assert one == Step(["deltamoe", "generate", "runs/a", "--prompt", "b # c"], output="out.txt")
    assert other == Step(["make", "x"])


@pytest.mark.parametrize("line", ["deltamoe plan nano | head", "pip install torch", "make coffee"])
def test_what_cannot_be_run_must_be_marked(line, workbench, monkeypatch, capsys) -> None:
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        run_line("README.md:1", line, workbench, monkeypatch, capsys)


def test_a_run_is_lent_to_who_reads_it_and_taken_back(workbench, monkeypatch, capsys) -> None:
    for line in (
        "deltamoe inspect runs/demo/checkpoints/step-4000/model.safetensors",
        "deltamoe train small --out runs/demo train.steps=10k model.num_layers=16",
        "deltamoe train --resume runs/demo train.steps=20k",
    ):
        run_line("README.md:1", line, workbench, monkeypatch, capsys)
    assert Path("runs/demo/checkpoints/step-6").is_dir()
