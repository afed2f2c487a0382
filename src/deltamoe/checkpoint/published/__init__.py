"""The published checkpoint's format: what Kimi-Linear-48B-A3B is stored in.

What lives here: the table of names, the two spellings of config.json, the folder with its index,
and the reading of weights into a model. Writing is in ``deltamoe.conversion``.
May import: what the checkpoint folder may; torch only in weights.py.
Read first: names.py, then config.py.
"""

from deltamoe.checkpoint.published.config import (
    is_published_config,
    model_config,
    published_config,
    refusals,
)
from deltamoe.checkpoint.published.folder import (
    PublishedFolder,
    is_published,
    open_published,
    published_checkpoint,
    read_published_config,
)
from deltamoe.checkpoint.published.names import (
    NAMES,
    PublishedTensor,
    published_places,
    published_tensors,
)

__all__ = [
    "NAMES",
    "PublishedFolder",
    "PublishedTensor",
    "is_published",
    "is_published_config",
    "model_config",
    "open_published",
    "published_checkpoint",
    "published_config",
    "published_places",
    "published_tensors",
    "read_published_config",
    "refusals",
]
