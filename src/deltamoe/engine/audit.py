"""Computing finished requests again: when there is nothing else to do, at times beside others.

An audit comes after everybody else, and is given up if its place is needed. Nothing is shared or
restored: the prompt is read from its beginning, by the steps that the first reading and those it
was built on took. Where a ``Decoder`` keeps rows apart, the two must agree to the last bit; if not,
a state was not what it should have been. Knows nothing of threads.
"""

import logging
from collections import deque
from dataclasses import replace

from deltamoe.engine.core import Core
from deltamoe.engine.request import Choice, Piece, Result
from deltamoe.engine.sequence import Job

__all__ = ["Auditor"]

_log = logging.getLogger("deltamoe")

_MOST_DUE = 8
"""Requests that wait for their audit; a busy engine forgets the older ones."""
_STEPS_APART = 256
"""Steps of a busy engine from the beginning of one audit to that of the next."""


class Auditor:
    """Chooses what is audited, and compares.

    Args:
        core: does the work.
        every: one in so many finished requests; 0 for none.
    """

    def __init__(self, core: Core, every: int) -> None:
        self._core = core
        self._every = every
        self._num_seen = 0
        self._due: deque[tuple[Job, Result]] = deque(maxlen=_MOST_DUE)
        self._running: Job | None = None
        self._began_at_step = 0

    def note(self, job: Job, result: Result) -> None:
        """A request was answered."""
        is_whole = all(choice.finish_reason != "cancelled" for choice in result.choices)
        if not self._every or not is_whole or not job.request.max_tokens:
            return
        self._num_seen += 1
        if self._num_seen % self._every == 0:
            self._due.append((job, result))

    def begin(self, *, is_idle: bool) -> bool:
        """Start the next audit, unless it is too early for a busy engine; return whether it was."""
        if self._running is not None or not self._due:
            return False
        step = self._core.counters.num_steps
        if not is_idle and step - self._began_at_step < _STEPS_APART:
            return False
        self._began_at_step = step
        job, result = self._due.popleft()
        request = replace(job.request, reuse=False, keep_state=False, prompt_logprobs=None)
        listener = _Comparison(self, result)
        self._running = self._core.add(request, listener, self._core.prepare(request), audited=job)
        return True

    def stop(self) -> None:
        """Audit nothing more."""
        self._due.clear()
        self._every = 0
        if self._running is not None:
            self._core.cancel(self._running)

    def end(self, fault: str | None) -> None:
        """An audit has ended; ``fault`` says what differed."""
        self._running = None
        counters = self._core.counters
        counters.num_audits += 1
        if fault is not None:
            counters.num_audit_mismatches += 1
            _log.error(
                "audit: a request computed again gave another answer: %s; a state was damaged, "
                "and answers of this engine cannot be trusted",
                fault,
            )


class _Comparison:
    def __init__(self, auditor: Auditor, expected: Result) -> None:
        self._auditor = auditor
        self._expected = expected

    def on_piece(self, piece: Piece) -> None:
        """Only the whole is compared."""

    def on_result(self, result: Result) -> None:
        if any(choice.finish_reason == "cancelled" for choice in result.choices):
            self._auditor._running = None
            return
        pairs = zip(self._expected.choices, result.choices, strict=True)
        faults = [fault for one, other in pairs if (fault := _difference(one, other))]
        self._auditor.end(faults[0] if faults else None)

    def on_error(self, error: BaseException) -> None:
        self._auditor.end(f"it failed: {error}")


def _difference(expected: Choice, again: Choice) -> str | None:
    where = f"choice {expected.index}"
    for place, (one, other) in enumerate(zip(expected.ids, again.ids, strict=False)):
        if one != other:
            return f"{where}, token {place} of {len(expected.ids)}"
    if len(expected.ids) != len(again.ids):
        return f"{where} has {len(again.ids)} tokens instead of {len(expected.ids)}"
    if expected.logprobs != again.logprobs:
        return f"{where}: the same tokens with other logprobs"
    return None
