import builtins

import pytest

from deltamoe.data.parquet import parquet
from deltamoe.errors import ConfigError, DataError

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")


def write(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def read(source):
    return ["".join(document.pieces) for document in source.documents(0.3)]


def test_the_texts_of_a_column(tmp_path):
    path = write(tmp_path / "a.parquet", text=["a", "é", None, "c"], n=[1, 2, 3, 4])
    source = parquet(path, "text")
    assert read(source) == ["a", "é", "c"]
    assert [name for name, _ in source.skipped] == [f"{path} row 2"]


def test_a_wrong_column_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", text=["a"], n=[1])
    with pytest.raises(DataError, match=r"no column 'body', but \['text', 'n'\]"):
        read(parquet(path, "body"))
    with pytest.raises(DataError, match="'n' holds int64"):
        read(parquet(path, "n"))


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match="not a readable parquet file"):
        read(parquet(path, "text"))


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *rest, **others):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real_import(name, *rest, **others)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'deltamoe\[parquet\]'"):
        parquet(tmp_path / "a.parquet", "text")
