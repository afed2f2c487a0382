"""JSON from outside, read without trust.

The standard reader lets the last of two equal keys win, turns ``1e999`` into infinity, and can be
made to recurse or to allocate by a small file. Here every such text is an error that names the
source. ``open_regular`` is the door all outside files come through, JSON or not: no pipe, no
device, no symbolic link that leaves its folder.

Knows nothing of what the values mean. Reads, never writes.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterable
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any

from deltamoe.errors import ConfigError, DeltamoeError

__all__ = ["check_format", "open_regular", "parse_json", "read_json"]

_MAX_DIGITS = 20  # 2**64 has 20; a longer whole number is no size, count or seed
_SURROGATE = re.compile("[\ud800-\udfff]")


class _RefusedError(ValueError):
    """Raised inside the standard reader's hooks; becomes the caller's error."""


def parse_json(
    text: str | bytes,
    *,
    source: str,
    error: type[DeltamoeError] = ConfigError,
    max_bytes: int = 1 << 20,
    max_depth: int = 20,
) -> Any:
    """Parse one JSON text, strictly.

    Args:
        text: the text; bytes must be UTF-8.
        source: what the error message calls it, usually the path.
        error: the exception raised on any fault.
        max_bytes: longest text accepted, in bytes (in characters, for a ``str``).
        max_depth: deepest nesting of objects and arrays accepted.

    Raises:
        error: too long, not UTF-8, not JSON, nested too deep, a key that stands twice, a number
            that is not finite or has more than 20 digits, half of a surrogate pair.
    """
    if len(text) > max_bytes:
        raise error(f"{source}: {len(text):,} bytes of JSON; expected at most {max_bytes:,}")
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(
            decoded,
            object_pairs_hook=_object_without_duplicates,
            parse_int=_whole_number,
            parse_float=_finite_number,
            parse_constant=_no_constant,
        )
        _check_tree(value, max_depth)
    except UnicodeDecodeError as fault:
        raise error(f"{source}: not UTF-8 text ({fault.reason} at byte {fault.start})") from None
    except json.JSONDecodeError as fault:
        raise error(
            f"{source}: not JSON: {fault.msg} at line {fault.lineno}, column {fault.colno}"
        ) from None
    except _RefusedError as fault:
        raise error(f"{source}: {fault}") from None
    except RecursionError:
        raise error(f"{source}: nested deeper than {max_depth} levels") from None
    return value


def read_json(
    path: Path | str,
    *,
    max_bytes: int = 1 << 20,
    error: type[DeltamoeError] = ConfigError,
) -> dict[str, Any]:
    """Read a file that holds one JSON object, with the bounds of ``parse_json``.

    Raises:
        error: the file is missing, is no regular file, or holds anything else.
    """
    with open_regular(path, error=error) as file:
        text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise error(f"{path}: longer than {max_bytes:,} bytes, which no such file needs")
    value = parse_json(text, source=str(path), error=error, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, got {_kind(value)}")
    return value


def check_format(
    data: dict[str, Any],
    *,
    source: str,
    known: int = 1,
    error: type[DeltamoeError] = ConfigError,
) -> None:
    """Refuse an object whose ``"format"`` is missing, malformed or newer than ``known``."""
    version = data.get("format")
    if type(version) is not int or version < 1:
        raise error(
            f'{source}: "format" is {version!r}; expected a whole number from 1 to {known}: '
            "this file was not written by deltamoe, or it was damaged"
        )
    if version > known:
        raise error(
            f"{source}: written by a newer deltamoe: format {version}, "
            f"this program knows {known}; upgrade deltamoe to read it"
        )


def open_regular(path: Path | str, *, error: type[DeltamoeError] = ConfigError) -> BufferedReader:
    """Open a regular file for reading; never blocks, never follows a link out of its folder.

    Raises:
        error: missing, unreadable, a folder, a pipe, a device or a socket, or a symbolic link
            whose target lies outside the folder that holds the link.
    """
    name = os.fspath(path)
    try:
        if os.path.islink(name):
            folder = os.path.realpath(os.path.dirname(name) or ".")
            target = os.path.realpath(name)
            if os.path.commonpath([folder, target]) != folder:
                raise error(
                    f"{name}: a symbolic link that leaves its folder, to {target!r}; "
                    "give the path of the file itself"
                )
        # O_NONBLOCK: opening a pipe would otherwise wait for its writer.
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise error(f"{name}: no such file") from None
    except (OSError, ValueError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else fault
        raise error(f"{name!r}: cannot be opened ({reason})") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
        raise error(f"{name}: expected a regular file, this is {kind}")
    return os.fdopen(descriptor, "rb")


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedError(f"the key {_quote(key)} stands twice in one object")
            seen.add(key)
    return result


def _whole_number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _RefusedError(
            f"a whole number of {len(digits):,} digits; expected at most {_MAX_DIGITS}"
        )
    return int(digits)


def _finite_number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _RefusedError(f"the number {_quote(digits)} is too large for a 64-bit float")
    return value


def _no_constant(name: str) -> float:
    raise _RefusedError(f"{name} is not a JSON number")


def _check_tree(value: Any, max_depth: int) -> None:
    """Bound the nesting and refuse text that could not be written out again."""
    level: list[dict[str, Any] | list[Any]] = [[value]]
    depth = 0
    while level:
        if depth > max_depth:
            raise _RefusedError(f"nested deeper than {max_depth} levels")
        below = []
        for container in level:
            for item in _leaves_and_branches(container):
                if isinstance(item, dict | list):
                    below.append(item)
                elif isinstance(item, str) and not item.isascii() and _SURROGATE.search(item):
                    raise _RefusedError(f"the text {_quote(item)} holds half of a surrogate pair")
        level = below
        depth += 1


def _leaves_and_branches(container: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return chain(container, container.values()) if isinstance(container, dict) else container


def _quote(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:57] + "...")


def _kind(value: object) -> str:
    names = {list: "an array", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
