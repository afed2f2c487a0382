"""The registry: which source a name in a configuration stands for."""

import difflib
from collections.abc import Callable
from pathlib import Path

from deltamoe.data.builtin import BUILT_IN
from deltamoe.data.document import Source
from deltamoe.data.hub import hub
from deltamoe.data.parquet import parquet
from deltamoe.data.rows import json_lines
from deltamoe.data.text_files import TextFile, folder
from deltamoe.errors import ConfigError

__all__ = ["open_source"]

_BY_ENDING: dict[str, Callable[[Path, str], Source]] = {
    ".jsonl": json_lines,
    ".jsonl.gz": json_lines,
    ".ndjson": json_lines,
    ".parquet": parquet,
}


def open_source(name: str, text_field: str = "text") -> Source:
    """Open what a configuration names: a built-in corpus, ``hf:NAME``, a folder or a file.

    A file is JSON lines or parquet if its name ends so, and one text otherwise. A folder called
    like a built-in corpus is reached as ``./stdlib``.

    Raises:
        ConfigError: nothing has this name, or what reads it is not installed.
        DataError: it is there and holds no usable text.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if name.startswith("hf:"):
        return hub(name.removeprefix("hf:"), text_field)
    path = Path(name).expanduser()
    if path.is_dir():
        return folder(path)
    if not path.exists():
        close = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"built in are {', '.join(BUILT_IN)}"
        raise ConfigError(f"data: no file or folder {name!r}; {hint}")
    for ending, read in _BY_ENDING.items():
        if path.name.lower().endswith(ending):
            return read(path, text_field)
    return TextFile(path)
