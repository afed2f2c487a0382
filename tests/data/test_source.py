import pytest

from deltamoe.data import open_source
from deltamoe.data.rows import Rows
from deltamoe.data.text_files import TextFile, TextFiles
from deltamoe.errors import ConfigError


def test_a_name_leads_to_its_source(tmp_path, corpus, monkeypatch):
    text = tmp_path / "book.txt"
    text.write_text("words")
    rows = tmp_path / "rows.JSONL"
    rows.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert isinstance(open_source(str(text)), TextFile)
    assert isinstance(open_source(str(rows)), Rows)
    assert isinstance(open_source(str(corpus)), TextFiles)
    monkeypatch.chdir(tmp_path)
    corpus.rename(tmp_path / "sotu")
    assert open_source("./sotu").sha256 == open_source(str(tmp_path / "sotu")).sha256


def test_a_name_that_leads_nowhere_gets_a_hint():
    with pytest.raises(ConfigError, match="did you mean 'stdlib'"):
        open_source("stdlb")
    with pytest.raises(ConfigError, match="built in are stdlib, sotu, site-packages"):
        open_source("/no/such/book.txt")
