"""Makes a shared library that asks for glibc 2.38 load on an older one, where it can.

What a compiler of 2024 calls ``strtol`` or ``sscanf`` is written into the library as
``__isoc23_strtol``, which glibc has since 2.38 and which reads "0b1" besides. Every glibc has the
plain name at the end of that one, under its oldest version: each such import is pointed there.
"""

import struct
from pathlib import Path

__all__ = ["for_old_glibc"]

PREFIX = b"__isoc23_"
NEW, OLD = b"GLIBC_2.38", b"GLIBC_2.2.5"
DYNSYM, VERSYM, VERNEED = 11, 0x6FFFFFFF, 0x6FFFFFFE


def for_old_glibc(library: Path) -> bytes:
    """The content of a 64-bit little-endian ELF library without its needs of glibc 2.38."""
    data = bytearray(library.read_bytes())
    sections = _sections(data)
    symbols, versions = _of_kind(sections, DYNSYM), _of_kind(sections, VERSYM)
    names = sections[symbols["link"]]["offset"]
    old_index = None
    for entry in _needed_versions(data, _of_kind(sections, VERNEED)):
        if _name(data, names + entry["name"]) == OLD and entry["library"] == b"libc.so.6":
            old_index, old_name, old_hash = entry["index"], entry["name"], entry["hash"]
    assert old_index is not None, f"{library}: imports nothing of {OLD.decode()}"
    for entry in _needed_versions(data, _of_kind(sections, VERNEED)):
        if _name(data, names + entry["name"]) == NEW:
            struct.pack_into("<I", data, entry["at"], old_hash)
            struct.pack_into("<I", data, entry["at"] + 8, old_name)
    for number in range(symbols["size"] // 24):
        at = symbols["offset"] + 24 * number
        (name,) = struct.unpack_from("<I", data, at)
        if _name(data, names + name).startswith(PREFIX):
            struct.pack_into("<I", data, at, name + len(PREFIX))
            struct.pack_into("<H", data, versions["offset"] + 2 * number, old_index)
    return bytes(data)


def _sections(data: bytearray) -> list[dict[str, int]]:
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    keys = ("name", "kind", "flags", "address", "offset", "size", "link", "info")
    return [
        dict(zip(keys, struct.unpack_from("<IIQQQQII", data, table + size * i), strict=True))
        for i in range(count)
    ]


def _of_kind(sections: list[dict[str, int]], kind: int) -> dict[str, int]:
    return next(section for section in sections if section["kind"] == kind)


def _needed_versions(data: bytearray, section: dict[str, int]) -> list[dict[str, int]]:
    found, at = [], section["offset"]
    names = _sections(data)[section["link"]]["offset"]
    while True:
        _, count, file, aux, following = struct.unpack_from("<HHIII", data, at)
        entry = at + aux
        for _ in range(count):
            hashed, _, index, name, step = struct.unpack_from("<IHHII", data, entry)
            found.append({"at": entry, "hash": hashed, "index": index & 0x7FFF, "name": name})
            found[-1]["library"] = _name(data, names + file)
            entry += step
        if not following:
            return found
        at += following


def _name(data: bytearray, at: int) -> bytes:
    return bytes(data[at : data.index(0, at)])
