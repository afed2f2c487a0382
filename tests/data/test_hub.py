import sys
import types

import pytest

from deltamoe.data import open_source
from deltamoe.errors import ConfigError, DataError


class FakeDataset:
    """As much of a Hugging Face dataset as is used."""

    column_names = ("text", "n")
    _fingerprint = "abc"

    def __len__(self):
        return 3

    def __getitem__(self, column):
        return {"text": ["one", "two", "three"], "n": [1, 2, 3]}[column]


@pytest.fixture
def asked(monkeypatch):
    """What was asked of the ``datasets`` package."""
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        if name == "no/where":
            raise ConnectionError("offline")
        return FakeDataset()

    package = types.ModuleType("datasets")
    package.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", package)
    return asked


def test_the_rows_of_a_dataset(asked):
    source = open_source("hf:some/name:config")
    assert asked == [("some/name", "config", "train")]
    assert ["".join(d.pieces) for d in source.documents(0.3)] == ["one", "two", "three"]
    assert source.sha256 != open_source("hf:some/name:other").sha256


def test_a_wrong_column_is_named(asked):
    with pytest.raises(DataError, match="no column 'body'"):
        open_source("hf:some/name", "body")
    with pytest.raises(DataError, match="row 0: 1 is no text"):
        list(open_source("hf:some/name", "n").documents(0.3))


def test_what_cannot_be_had_is_a_sentence(asked):
    with pytest.raises(DataError, match=r"hf:no/where could not be loaded \(ConnectionError"):
        open_source("hf:no/where")


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'deltamoe\[hub\]'"):
        open_source("hf:some/name")
