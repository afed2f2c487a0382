"""What the page's sources may not contain, so that nothing on the page is made up or fetched."""

import re
from pathlib import Path

import pytest

import deltamoe.explorer

STATIC = Path(deltamoe.explorer.__file__).parent / "static"
MODULES = sorted(STATIC.rglob("*.js"))


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(STATIC)))
def test_a_module(module: Path) -> None:
    source = module.read_text()
    for forbidden in ("Math.random", "innerHTML", "insertAdjacentHTML", "eval(", "document.write"):
        assert forbidden not in source, f"{module.name} has {forbidden}"
    assert source.startswith("/**"), "a module begins by saying what it is"
    assert len(source.splitlines()) < 300, "a module tells one story"
    for where in re.findall(r"""^import\b[^;"']*["']([^"']+)["']""", source, re.MULTILINE):
        assert (module.parent / where).resolve() in MODULES, f"{module.name} imports {where}"


def test_no_other_host_is_named() -> None:
    for file in STATIC.rglob("*"):
        if file.suffix not in (".js", ".html", ".css", ".svg"):
            continue
        hosts = set(re.findall(r"""(?:https?:)?//([\w.-]+\.[a-z]{2,})""", file.read_text()))
        assert hosts <= {"www.w3.org"}, f"{file.name} names {hosts}"  # the name of SVG's namespace


def test_nothing_is_vendored() -> None:
    """No library lies here; one that comes brings its name, version, licence and hash."""
    assert {path.suffix for path in STATIC.rglob("*") if path.is_file()} <= {
        *(".js", ".html", ".css", ".svg")
    }
