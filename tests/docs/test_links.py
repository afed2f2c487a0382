"""What the documentation points to exists: pages, headings, files, functions, verbs, lines."""

import ast
import re
from pathlib import Path

import pytest

from deltamoe.cli import VERBS
from tests.docs.pages import PAGES, ROOT, SRC, anchors, blocks, inline_code, make_targets, prose

_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_FILE = re.compile(
    r"((?:[\w.-]+/)+[\w.-]+\.(?:py|md)|(?:src|tests|docs)/[\w./-]+)(?::\s*([\w.]+))?"
)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for number, line in prose(page):
        for link in _LINK.findall(line):
            if re.match(r"[a-z]+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            where = f"{page.relative_to(ROOT)}:{number}"
            assert target.exists(), f"{where}: {link}: nothing there"
            if anchor:
                assert anchor in anchors(target), f"{where}: {link}: no such heading"


@each_page
def test_files_and_functions_exist(page: Path) -> None:
    """`ops/mla.py: attend` names a file, from the root or from src/deltamoe, and its symbol."""
    for number, code in inline_code(page):
        if not (found := _FILE.fullmatch(code)):
            continue
        name, symbol = found.groups()
        where = f"{page.relative_to(ROOT)}:{number}: `{code}`"
        file = next((f for f in (ROOT / name, SRC / name) if f.exists()), None)
        assert file is not None, f"{where}: no such file"
        if symbol is not None:
            assert symbol in defined(file), f"{where}: {name} defines no {symbol}"


@each_page
def test_verbs_and_targets_exist(page: Path) -> None:
    for number, code in inline_code(page):
        words = code.split()
        where = f"{page.relative_to(ROOT)}:{number}: `{code}`"
        if len(words) > 1 and words[0] == "deltamoe" and not words[1].startswith("-"):
            assert words[1] in {*VERBS, "VERB"}, f"{where}: no such verb"
        if len(words) > 1 and words[0] == "make":
            assert words[1] in make_targets(), f"{where}: no such target"


@each_page
def test_quoted_lines_are_in_the_code(page: Path) -> None:
    """A block under ``<!-- from FILE -->`` holds lines of that file, some of them left out."""
    for block in blocks(page):
        if block.comment.startswith("from "):
            file = ROOT / block.comment.removeprefix("from ")
            lines = {line.strip() for line in file.read_text(encoding="utf-8").splitlines()}
            for line in filter(None, map(str.strip, block.text.splitlines())):
                assert line in lines, f"{block.where}: not a line of {file.name}: {line}"


def defined(file: Path) -> set[str]:
    """Dotted names of the functions, classes and constants that a file defines."""

    def names(body: list[ast.stmt], prefix: str = "") -> set[str]:
        found = set()
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    found |= names(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign):
                found |= {prefix + t.id for t in node.targets if isinstance(t, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(prefix + node.target.id)
        return found

    return names(ast.parse(file.read_text(encoding="utf-8")).body)
