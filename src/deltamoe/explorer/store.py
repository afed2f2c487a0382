"""The traces a server keeps: the newest few, under names nobody can guess. No torch."""

import secrets
from collections import OrderedDict
from threading import Lock

from deltamoe.errors import DataError
from deltamoe.explorer.format import Trace

__all__ = ["MOST_BYTES", "MOST_TRACES", "TraceStore"]

MOST_TRACES = 32
MOST_BYTES = 256 << 20


class TraceStore:
    """Traces by id; the one that was not asked for longest goes first.

    Args:
        most_traces: kept at most.
        most_bytes: of all their arrays together; the newest is kept even if it is larger.
    """

    def __init__(self, *, most_traces: int = MOST_TRACES, most_bytes: int = MOST_BYTES) -> None:
        self._most_traces, self._most_bytes = most_traces, most_bytes
        self._traces: OrderedDict[str, Trace] = OrderedDict()
        self._lock = Lock()

    def add(self, trace: Trace) -> str:
        """Keep a trace and return its id."""
        name = secrets.token_urlsafe(16)
        with self._lock:
            self._traces[name] = trace
            while len(self._traces) > self._most_traces or (
                len(self._traces) > 1 and self.nbytes > self._most_bytes
            ):
                self._traces.popitem(last=False)
        return name

    def get(self, name: str) -> Trace:
        """The trace of an id.

        Raises:
            DataError: there is none, or it was dropped for newer ones.
        """
        with self._lock:
            if name not in self._traces:
                raise DataError(
                    f"no trace {name[:40]!r} here; the newest {self._most_traces} are kept: "
                    "record it again"
                )
            self._traces.move_to_end(name)
            return self._traces[name]

    def newest_first(self) -> list[tuple[str, Trace]]:
        """Ids and traces, the one that was last asked for at the beginning."""
        with self._lock:
            return list(reversed(self._traces.items()))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(trace.nbytes for trace in self._traces.values())

    def __len__(self) -> int:
        return len(self._traces)
