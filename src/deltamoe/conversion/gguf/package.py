"""The package gguf, imported when it is first needed. No torch."""

from importlib import import_module
from types import ModuleType

from deltamoe.errors import ConfigError

__all__ = ["gguf"]


def gguf() -> ModuleType:
    """Return the package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module("gguf")
    except ImportError:
        raise ConfigError(
            "GGUF files need the package gguf: pip install 'deltamoe[gguf]'"
        ) from None
