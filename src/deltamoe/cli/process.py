"""What the command line asks of its process before torch is imported: quiet threads, warm memory.

The library asks nothing: importing it changes nothing in a program that uses it.
Measured in docs/decisions/0010-passive-waits.md.
"""

import ctypes
import os
import sys

__all__ = ["settle"]

# <malloc.h> of glibc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_GIB = 1 << 30


def settle() -> None:
    """Choose how threads wait and where freed memory goes; what the user has set stays."""
    # Threads that spin at a barrier starve the very thread they wait for as soon as another program
    # wants a core: a training step then takes ten times as long. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # glibc hands large blocks back to the system when they are freed, so that every activation of
    # every step is mapped and zeroed anew, page by page. Up to 1 GiB they are kept for the next.
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _GIB)
            mallopt(_M_TRIM_THRESHOLD, 2 * _GIB - 1)
