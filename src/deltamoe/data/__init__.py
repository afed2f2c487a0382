"""Text to batches: sources, token shards prepared once, a loader that resumes exactly, baselines.

What lives here: where documents come from and which are held out (document.py, source.py and what
it registers), their tokens on disk (manifest.py, shards.py, stream.py, cache.py, preparation.py),
the batches (loader.py) and what a compressor and a 5-gram make of the same text (baselines.py).
What it may import: errors, config, checkpoint.durable, tokenizer. No torch, but for loader.py.
What to read first: document.py, then preparation.py, then loader.py.
"""

from typing import TYPE_CHECKING, Any

from deltamoe.data.baselines import Baselines, measure_baselines
from deltamoe.data.document import Document, Skipped, Source
from deltamoe.data.preparation import Progress, prepare
from deltamoe.data.prepared import PreparedData, PreparedSource, is_prepared, open_prepared
from deltamoe.data.source import open_source
from deltamoe.data.stream import TokenStream

if TYPE_CHECKING:
    from deltamoe.data.loader import NO_TARGET, Batch, Loader, validation_batches, windows

__all__ = [
    "NO_TARGET",
    "Baselines",
    "Batch",
    "Document",
    "Loader",
    "PreparedData",
    "PreparedSource",
    "Progress",
    "Skipped",
    "Source",
    "TokenStream",
    "is_prepared",
    "measure_baselines",
    "open_prepared",
    "open_source",
    "prepare",
    "validation_batches",
    "windows",
]

_NEEDS_TORCH = {"NO_TARGET", "Batch", "Loader", "validation_batches", "windows"}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deltamoe.data import loader

    return getattr(loader, name)
