"""How numbers and tables look in a terminal, and how people may type numbers.

Plain text in aligned columns, so that a report reads the same in a terminal, a pipe and a log.
"""

from collections.abc import Sequence

import click

from deltamoe.config import whole_number

__all__ = ["COUNT", "count", "flops", "size", "table"]


def count(number: int | float) -> str:
    """A number of things in three digits: 950, 2.45M, 48.8B."""
    return _three_digits(number, 1000, ("", "k", "M", "B", "T"))


def flops(number: int | float) -> str:
    """A number of FLOPs in three digits: 81.5 GFLOP."""
    return _three_digits(number, 1000, (" ", " k", " M", " G", " T", " P", " E", " Z")) + "FLOP"


def size(num_bytes: int | float) -> str:
    """A number of bytes in three digits: 950 B, 7.88 KiB, 41.4 MiB."""
    return _three_digits(num_bytes, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), indent: int = 0) -> str:
    """Rows in aligned columns, two blanks apart.

    Args:
        rows: of equal length.
        right: numbers of the columns that are aligned to the right.
        indent: blanks before each row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(" " * indent + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _three_digits(number: int | float, step: int, units: Sequence[str]) -> str:
    exponent = 0
    while abs(number) >= 999.5 and exponent < len(units) - 1:
        number /= step
        exponent += 1
    return f"{number:.3g}{units[exponent]}" if number < 999.5 else f"{number:.0f}{units[exponent]}"


class _Count(click.ParamType):  # type: ignore[type-arg]
    """A whole number such as 250, 2k, 1M or 64Ki."""

    name = "count"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        try:
            number = whole_number(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if number < 0:
            self.fail(f"{value!r} is negative", param, ctx)
        return number


COUNT = _Count()
