"""The documentation as what can be checked: code blocks, links, names in backticks."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "deltamoe"
# In reading order. The guides hold commands; all pages hold links.
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [
    *GUIDES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs" / "decisions").glob("*.md")),
]

_FENCE = re.compile(r"\s*```\s*(\w*)")
_COMMENT = re.compile(r"<!--\s*(.*?)\s*-->")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: where it stands.
        line: number of its first line of text.
        language: the word behind the fence; "" for none.
        text: what is between the fences.
        comment: the HTML comment on the line above the fence; "" for none.
    """

    page: Path
    line: int
    language: str
    text: str
    comment: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def why_not_run(self) -> str:
        """The reason in ``<!-- not run: reason -->``; "" for a block that is run."""
        found = re.fullmatch(r"not run:\s*(.+)", self.comment)
        return found[1] if found else ""


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        if fence := _FENCE.match(lines[at]):
            above = lines[at - 1] if at else ""
            comment = _COMMENT.fullmatch(above.strip())
            end = next(i for i in range(at + 1, len(lines)) if _FENCE.match(lines[i]))
            text = "\n".join(lines[at + 1 : end])
            yield Block(page, at + 2, fence[1], text, comment[1] if comment else "")
            at = end
        at += 1


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines outside of fenced blocks."""
    is_code = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if _FENCE.match(line):
            is_code = not is_code
        elif not is_code:
            yield number, line


def inline_code(page: Path) -> Iterator[tuple[int, str]]:
    """What stands in backticks, with the number of its line."""
    for number, line in prose(page):
        for code in re.findall(r"`([^`]+)`", line):
            yield number, code


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    found: set[str] = set()
    for _, line in prose(page):
        if heading := re.match(r"#{1,6}\s+(.*)", line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).strip().lower()
            slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            number = sum(
                name == slug or re.fullmatch(rf"{slug}-\d+", name) is not None for name in found
            )
            found.add(f"{slug}-{number}" if number else slug)
    return found


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, flags=re.MULTILINE))


def table(page: Path, name: str) -> str:
    """The text between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``."""
    text = page.read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name}: begin -->\n\n(.*?)\n\n<!-- {name}: end -->", text, re.DOTALL)
    assert found, (
        f"{page.relative_to(ROOT)}: expected <!-- {name}: begin --> … <!-- {name}: end -->"
    )
    return found[1]


def rows(page: Path, name: str) -> list[list[str]]:
    """The cells of such a table, header left out."""
    lines = [line for line in table(page, name).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]
