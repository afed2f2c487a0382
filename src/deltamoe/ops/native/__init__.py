"""Operators in C++ for the CPU, compiled when they are first needed.

Lives here: ``build.py``, which compiles and opens a library, and one ``.cpp`` file a family of
operators. Every function in them has a slow obvious twin in PyTorch that defines it, and that runs
where there is no compiler.
May import: ``deltamoe.errors``.
Read first: ``build.py``, ``vector.h``, ``gemm.h``.
"""

import logging
from functools import cache

from deltamoe.ops.native.build import BuildError, open_library

__all__ = ["BuildError", "open_library", "why_not"]

_log = logging.getLogger("deltamoe")


@cache
def why_not(name: str) -> str | None:
    """Return the reason the library of ``<name>.cpp`` cannot be used on this machine, or None.

    The first time, a reason is also said as a warning: what runs instead is several times slower.
    """
    try:
        open_library(name)
    except BuildError as error:
        _log.warning("the C++ operators of %s.cpp are replaced by PyTorch's: %s", name, error)
        return str(error)
    return None
