"""GGUF files of architecture "kimi-linear", both ways: what llama.cpp and its relatives run.

What lives here: the two tables (tensor names, metadata keys), the vocabulary, a writer that
streams and a reader that trusts nothing. Needs the package gguf: ``pip install 'deltamoe[gguf]'``.
May import: what ``conversion`` may. torch is imported when tensors move.
Read first: names.py, then keys.py; docs/gguf.md has the same for people.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deltamoe.conversion.gguf.header import GgufHeader, GgufTensor, read_gguf_header
from deltamoe.conversion.gguf.keys import refusals
from deltamoe.conversion.gguf.layout import DTYPES, plan_gguf

if TYPE_CHECKING:
    from deltamoe.conversion.gguf.read import Gguf, read_gguf
    from deltamoe.conversion.gguf.write import write_gguf

__all__ = [
    "DTYPES",
    "Gguf",
    "GgufHeader",
    "GgufTensor",
    "plan_gguf",
    "read_gguf",
    "read_gguf_header",
    "refusals",
    "write_gguf",
]

_NEEDS_TORCH = {"Gguf": "read", "read_gguf": "read", "write_gguf": "write"}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NEEDS_TORCH[name]}"), name)
