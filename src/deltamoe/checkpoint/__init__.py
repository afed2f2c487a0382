"""Weights and runs on disk: read without trust, written so that a crash harms nothing.

What lives here: the safetensors header and tensors, the manifest and the step folder it seals,
the run folder with its lock, the published format, and ``load``, which turns a folder into a model.
May import: errors, config, plan, ops, layers, model. What needs torch is imported when it is first
used, so that a look at a header stays quick.
Read first: folder.py, the write protocol; then header.py, the reader of hostile files.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deltamoe.checkpoint.folder import (
    Checkpoint,
    open_checkpoint,
    step_folder,
    step_folders,
    write_checkpoint,
)
from deltamoe.checkpoint.header import Header, TensorInfo, read_header
from deltamoe.checkpoint.lock import lock_run
from deltamoe.checkpoint.run_folder import (
    clean_run,
    find_checkpoint,
    load_config,
    load_run_config,
    newest_checkpoint,
    prune_checkpoints,
    write_run_config,
)

if TYPE_CHECKING:
    from deltamoe.checkpoint.state_file import load_state, save_state
    from deltamoe.checkpoint.tensors import read_tensors, require_finite, write_tensors
    from deltamoe.checkpoint.weights import load

__all__ = [
    "Checkpoint",
    "Header",
    "TensorInfo",
    "clean_run",
    "find_checkpoint",
    "load",
    "load_config",
    "load_run_config",
    "load_state",
    "lock_run",
    "newest_checkpoint",
    "open_checkpoint",
    "prune_checkpoints",
    "read_header",
    "read_tensors",
    "require_finite",
    "save_state",
    "step_folder",
    "step_folders",
    "write_checkpoint",
    "write_run_config",
    "write_tensors",
]

_NEEDS_TORCH = {
    "load": "weights",
    "load_state": "state_file",
    "read_tensors": "tensors",
    "require_finite": "tensors",
    "save_state": "state_file",
    "write_tensors": "tensors",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NEEDS_TORCH[name]}"), name)
