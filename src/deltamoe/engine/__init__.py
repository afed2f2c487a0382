"""Many requests at once, on states that are shared, put aside and taken up again.

Lives here: the engine, its scheduler, its pool of states, prefix reuse, structured output, and the
proof that none of it changes an answer.
May import: errors, config, plan, model, checkpoint, tokenizer, inference; knows no HTTP.
Read first: ``request.py``, then ``core.py``.
"""

from deltamoe.engine.engine import Engine, EngineStats
from deltamoe.engine.errors import (
    ContextTooLongError,
    EngineDeadError,
    QueueFullError,
    ShuttingDownError,
)
from deltamoe.engine.options import EngineOptions
from deltamoe.engine.request import Choice, Piece, Request, Result, Timings, TokenLogprob
from deltamoe.engine.ticket import Ticket

__all__ = [
    "Choice",
    "ContextTooLongError",
    "Engine",
    "EngineDeadError",
    "EngineOptions",
    "EngineStats",
    "Piece",
    "QueueFullError",
    "Request",
    "Result",
    "ShuttingDownError",
    "Ticket",
    "Timings",
    "TokenLogprob",
]
