"""What may keep an engine from answering; ``deltamoe.errors`` has what all of them are.

DeltamoeError
├── QueueFullError            as many requests wait as may
├── ShuttingDownError         the engine is being closed
├── EngineDeadError           a step failed as a whole, and the engine with it
└── ConfigError
    └── ContextTooLongError   a prompt and its answer that no sequence has room for
"""

from deltamoe.errors import ConfigError, DeltamoeError

__all__ = ["ContextTooLongError", "EngineDeadError", "QueueFullError", "ShuttingDownError"]


class QueueFullError(DeltamoeError):
    """As many requests wait as may; the same request may be accepted a moment later."""


class ShuttingDownError(DeltamoeError):
    """The engine is being closed: it takes nothing new, and its time to finish is over."""


class EngineDeadError(DeltamoeError):
    """A step failed as a whole, and the engine ended with it."""


class ContextTooLongError(ConfigError):
    """A prompt and its answer are longer than a sequence may become."""
