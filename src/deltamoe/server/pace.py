"""How often streams send.

All streams together send about five hundred events a second at most. A lone stream's tokens travel
one by one; under load each event carries the tokens of a few steps, which costs the reader, of 64
an eighth of a second at most, and leaves the processor to the model.
"""

__all__ = ["Pace"]

_EVENTS_PER_SECOND = 500.0


class Pace:
    """The streams that are open, and the time each lets pass between two events."""

    def __init__(self) -> None:
        self.num_streams = 0

    @property
    def interval_s(self) -> float:
        """Seconds from one event of a stream to its next, at least."""
        return 0.0 if self.num_streams < 2 else self.num_streams / _EVENTS_PER_SECOND
