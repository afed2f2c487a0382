"""A small corpus on disk, and a cache that is nobody's."""

from pathlib import Path

import pytest

from deltamoe.config import DataConfig


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of thirty texts of different lengths."""
    root = tmp_path / "corpus"
    root.mkdir()
    for number in range(30):
        text = f"Text {number} has its own words, and a line end.\n" * (1 + number % 7)
        (root / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(path=str(corpus), cache=str(tmp_path / "cache"))
