"""What the person at the keyboard sees while training: one line that stays true.

On a terminal the line is redrawn in place; elsewhere (a log file, CI) a plain line is printed
every few seconds. Written to stderr. A closed pipe silences it and never stops training. Knows
records (``metrics``), nothing of models.
"""

import contextlib
import sys
import time
from typing import TYPE_CHECKING

from deltamoe.training.metrics import Record

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

__all__ = ["Progress"]


class Progress:
    """The line.

    Args:
        every: seconds between plain lines.
    """

    def __init__(self, *, every: float = 5.0) -> None:
        self._every = every
        self._next = 0.0
        self._validation = ""
        self._seconds_per_step: float | None = None
        self._live: Live | None = None
        if sys.stderr.isatty():
            self._live = _start_live()

    def update(self, record: Record, *, end: int) -> None:
        """Show the newest record of a run to step ``end``."""
        seconds, smooth = record["seconds"], self._seconds_per_step
        self._seconds_per_step = seconds if smooth is None else 0.9 * smooth + 0.1 * seconds
        if "validation_bits_per_byte" in record:
            bits = record["validation_bits_per_byte"]
            self._validation = f"val {bits:.3f} bits/byte at {record['step']}"
        if self._live is None and record["step"] != end and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._every
        line = self._describe(record, end, self._seconds_per_step)
        if self._live is None:
            self.say(line)
        else:
            self._live.update(_one_line(line))

    def _describe(self, record: Record, end: int, seconds_per_step: float) -> str:
        parts = [
            f"step {record['step']}/{end}",
            f"loss {record['loss']:.3f}",
            self._validation,
            f"{record['tokens_per_s']:,.0f} tokens/s",
            f"{record['matmul_fraction']:.0%} of matmul peak",
        ]
        if record["max_vio"]:
            parts.append(f"MaxVio {max(record['max_vio'].values()):.2f}")
        num_dead = sum(record["dead_experts"].values())
        if num_dead:
            parts.append(f"dead experts {num_dead}")
        left = (end - record["step"]) * seconds_per_step
        parts.append(f"{_duration(left)} left")
        return " · ".join(part for part in parts if part)

    def say(self, text: str) -> None:
        """Print a line of its own, above the live one."""
        with contextlib.suppress(OSError, ValueError):
            if self._live is None:
                print(text, file=sys.stderr, flush=True)
            else:
                self._live.console.print(text, markup=False, highlight=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the last line standing."""
        if self._live is not None:
            with contextlib.suppress(OSError, ValueError):
                self._live.stop()


def _one_line(text: str) -> "Text":
    from rich.text import Text

    return Text(text, no_wrap=True, overflow="ellipsis")


def _start_live() -> "Live":
    from rich.console import Console
    from rich.live import Live

    live = Live(console=Console(stderr=True), refresh_per_second=4)
    live.start()
    return live


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"
