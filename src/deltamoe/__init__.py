"""Train, run, serve and see inside Kimi Linear models: KDA, MLA and sparse experts on PyTorch.

    model = deltamoe.load("runs/demo")
    tokenizer = deltamoe.load_tokenizer("runs/demo")
    print(deltamoe.generate(model, tokenizer, "The state of the union").text)

Names are imported when they are first used, so that ``import deltamoe`` costs nothing.
Read first: docs/architecture.md.
"""

from typing import TYPE_CHECKING, Any

from deltamoe.version import __version__

if TYPE_CHECKING:
    from deltamoe.checkpoint import load, load_config
    from deltamoe.config import ModelConfig, RunConfig
    from deltamoe.engine import Engine, Request
    from deltamoe.errors import DeltamoeError
    from deltamoe.explorer import trace
    from deltamoe.inference import generate, stream
    from deltamoe.model import HybridLM, ModelState
    from deltamoe.tokenizer import load_tokenizer

__all__ = [
    "DeltamoeError",
    "Engine",
    "HybridLM",
    "ModelConfig",
    "ModelState",
    "Request",
    "RunConfig",
    "__version__",
    "generate",
    "load",
    "load_config",
    "load_tokenizer",
    "stream",
    "trace",
]

_HOME = {
    "DeltamoeError": "errors",
    "Engine": "engine",
    "HybridLM": "model",
    "ModelConfig": "config",
    "ModelState": "model",
    "Request": "engine",
    "RunConfig": "config",
    "generate": "inference",
    "load": "checkpoint",
    "load_config": "checkpoint",
    "load_tokenizer": "tokenizer",
    "stream": "inference",
    "trace": "explorer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'deltamoe' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"deltamoe.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
