"""Seeing a model think: a recorder, the file it writes, and the program that shows it.

Lives here: the trace file (``format.py``), hooks and recorder, what follows from a trace
(``derive.py``), each view in numbers (``views.py``), ablations, the web application and its page in
``static/``.
May import: everything but training, evaluation and the server. What needs torch is imported when it
is first used: a trace file is read and shown without it.
Read first: ``format.py``, then ``record.py``; docs/explorer.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deltamoe.explorer.format import Trace, read_trace

if TYPE_CHECKING:
    from deltamoe.explorer.record import Capture, trace

__all__ = ["Capture", "Trace", "read_trace", "trace"]


def __getattr__(name: str) -> Any:
    if name not in ("Capture", "trace"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.record"), name)
