"""The first signal asks training to stop; the second one stops the process.

``StopRequest`` is a flag that every loop polls: steps, validation, sampling, data preparation.
Nothing is raised from inside a handler, so no tensor is ever left half-updated and no checkpoint
half-written. Knows nothing of training.
"""

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopRequest"]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """Context in which SIGTERM, SIGINT and SIGHUP are requests.

    Python delivers signals to the main thread alone; entered in another thread the context leaves
    the handlers as they are. A signal the parent chose to ignore (``nohup``) stays ignored.

    Attributes:
        name: the signal that asked first, such as "SIGTERM"; None while nobody asked.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def is_requested(self) -> bool:
        """Whether a stop was asked for."""
        return self.name is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            os._exit(128 + number)
        self.name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # not print: it may be in the middle of a line itself
            os.write(
                2, f"\n{self.name}: stopping after this step; again to exit at once\n".encode()
            )
