"""Who runs, who waits, whose chunk of a prompt comes next, and who gives way.

Those who came first start first, and are the last to give way. Of several prompts the one with the
least left is read first, so that short ones need not wait for long ones; every fourth chunk is that
of the oldest, so that long ones are not starved. Audits are the youngest, and read after everybody.
Bookkeeping only: no tensors, no clocks.
"""

from bisect import insort
from collections.abc import Iterable

from deltamoe.engine.sequence import Job, Sequence

__all__ = ["Scheduler"]

_OLDEST_EVERY = 4


class Scheduler:
    """Two lists in order of age, and the rules.

    Attributes:
        waiting: not yet started, or sent back; the oldest first.
        running: with a place in the pool; the oldest first.
    """

    def __init__(self) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._num_chunks = 0

    @property
    def has_work(self) -> bool:
        """Whether anything is running or waiting."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait, behind those who came before it."""
        insort(self.waiting, sequence, key=lambda other: other.order)

    def start(self) -> Sequence:
        """Let the first of those who wait run."""
        sequence = self.waiting.pop(0)
        insort(self.running, sequence, key=lambda other: other.order)
        return sequence

    def give_way(self, sequence: Sequence) -> None:
        """Send a running sequence back."""
        self.running.remove(sequence)
        self.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is."""
        for sequences in (self.running, self.waiting):
            if sequence in sequences:
                sequences.remove(sequence)

    def next_prompt(self) -> Sequence | None:
        """Whose chunk of a prompt is to be read next; None if there is none left to read."""
        prompts = [sequence for sequence in self.running if sequence.is_prefilling]
        if not prompts:
            return None
        self._num_chunks += 1
        if self._num_chunks % _OLDEST_EVERY == 0:
            return prompts[0]
        return min(prompts, key=lambda each: (each.job.is_audit, each.prefill_end - each.num_read))

    def youngest(self) -> Sequence:
        """Who gives way."""
        return self.running[-1]

    def jobs(self) -> Iterable[Job]:
        """Every request that is running or waiting, the oldest first."""
        jobs = {sequence.job.order: sequence.job for sequence in (*self.running, *self.waiting)}
        return [jobs[order] for order in sorted(jobs)]
