"""Compile one C++ file of this folder into a shared library, once a machine, and open it.

The files have a plain C interface and include nothing of PyTorch's, so a build takes seconds. A
library is kept in the user's cache folder under a key made of everything that decides its bytes:
the sources, the flags, the compiler and the processor's features.

PyTorch must have been imported before: its copy of OpenMP's runtime then serves these libraries
too, so that both share one pool of threads and ``torch.set_num_threads`` rules both.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

__all__ = ["BuildError", "cache_folder", "open_library"]

FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fopenmp"),
    # Nothing here reads errno or traps; inf and NaN keep their meaning (no -ffast-math).
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fno-semantic-interposition"),
    *("-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"),
)
_SOURCES = Path(__file__).parent
_TIME_LIMIT = 300


class BuildError(Exception):
    """The library could not be made or opened; the message is one line and says why."""


@cache
def open_library(name: str) -> ctypes.CDLL:
    """Open the library made of ``<name>.cpp``, compiling it first if this machine never has.

    Raises:
        BuildError: no compiler, a compiler that fails, or a library that cannot be opened here.
    """
    compiler = _compiler()
    flags = (*FLAGS, "-mprefer-vector-width=512") if platform.machine() == "x86_64" else FLAGS
    path = cache_folder() / f"{name}-{_key(name, compiler, flags)}.so"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with (path.parent / f"{name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it: wait for it
                if not path.exists():
                    _compile(compiler, flags, _SOURCES / f"{name}.cpp", path)
        if path.stat().st_uid != os.getuid():
            raise BuildError(f"{path} belongs to another user; remove it")
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path}: {error}") from error


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    return base / "deltamoe" / "native"


def _compiler() -> str:
    wanted = os.environ.get("CXX", "")
    for candidate in (wanted, "c++", "g++", "clang++"):
        if candidate and (found := shutil.which(candidate)):
            return found
    raise BuildError("no C++ compiler was found (c++, g++ or clang++; $CXX names another)")


def _key(name: str, compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for source in (_SOURCES / f"{name}.cpp", *sorted(_SOURCES.glob("*.h"))):
        digest.update(source.read_bytes())
    digest.update("\0".join((*flags, _version(compiler), _processor())).encode())
    return digest.hexdigest()[:20]


@cache
def _version(compiler: str) -> str:
    try:
        asked = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler} --version failed: {error}") from error
    return asked.stdout.partition("\n")[0]


@cache
def _processor() -> str:
    """The features that ``-march=native`` turns into instructions."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return " ".join(sorted(line.partition(":")[2].split()))
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()}"


def _compile(compiler: str, flags: tuple[str, ...], source: Path, path: Path) -> None:
    """Compile beside ``path``, then rename: a library is there whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *flags, str(source), "-o", str(made)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=_TIME_LIMIT
            )
        except subprocess.SubprocessError as error:
            raise BuildError(f"{compiler} failed on {source.name}: {error}") from error
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line]
            said = lines[0] if lines else f"exit status {done.returncode}"
            raise BuildError(f"{compiler} failed on {source.name}: {said}")
        made.replace(path)
