"""Parquet files as rows. The only file that knows pyarrow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltamoe.data.rows import Rows, sha256_of_file
from deltamoe.errors import ConfigError, DataError

__all__ = ["parquet"]


def parquet(path: Path, text_field: str) -> Rows:
    """The texts of one column.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: not a parquet file, or one without that column of texts.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            f"{path}: parquet needs pyarrow: pip install 'deltamoe[parquet]'"
        ) from None

    def texts() -> Iterator[tuple[str, str]]:
        try:
            file = pyarrow.parquet.ParquetFile(path)
            _require_texts(file.schema_arrow, path, text_field)
            row = 0
            for batch in file.iter_batches(columns=[text_field], batch_size=1024):
                for text in batch.column(0).to_pylist():
                    yield f"{path} row {row:,}", text or ""
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable parquet file: {error}") from None

    description = f"the column {text_field!r} of {path}"
    return Rows(str(path), description, sha256_of_file(path), texts)


def _require_texts(schema: Any, path: Path, text_field: str) -> None:
    if text_field not in schema.names:
        raise DataError(
            f"{path}: has no column {text_field!r}, but {schema.names!r:.200}; set data.text_field"
        )
    kind = str(schema.field(text_field).type)
    if kind not in ("string", "large_string", "string_view"):
        raise DataError(f"{path}: column {text_field!r} holds {kind}: expected string")
