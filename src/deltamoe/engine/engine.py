"""The engine: many requests at once, in a thread of its own.

Whoever submits gets a ``Ticket``. Only the thread touches model and states; it sleeps while there
is nothing to do, and its heartbeat goes on. Knows no HTTP.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from deltamoe.engine.audit import Auditor
from deltamoe.engine.core import Core
from deltamoe.engine.counters import Counters
from deltamoe.engine.errors import EngineDeadError, QueueFullError, ShuttingDownError
from deltamoe.engine.grammar import Matcher
from deltamoe.engine.options import EngineOptions
from deltamoe.engine.request import Piece, Request, Result
from deltamoe.engine.sequence import Job
from deltamoe.engine.sequence import Sequence as ActiveSequence
from deltamoe.engine.state_pool import PoolSize
from deltamoe.engine.ticket import Ticket, wake
from deltamoe.errors import ConfigError
from deltamoe.inference.text_state import evaluating
from deltamoe.model import HybridLM
from deltamoe.tokenizer import Tokenizer

__all__ = ["Engine", "EngineStats"]

_BEAT_S = 0.5
_ABORT_S = 0.8
"""For a step to end by itself; one that reads a long chunk with a large model takes longer."""


@dataclass(frozen=True)
class EngineStats:
    """How an engine is doing. Audits are not among the requests and sequences.

    Attributes:
        size: how its budget is divided.
        counters: what it has done; only grows.
        num_waiting: requests that have not been taken up, and sequences that wait for a place.
        num_running: sequences with a place.
        num_prefilling: of these, that still read their prompt.
        state_bytes: of the states of running sequences.
        cache_bytes: of the states that are kept.
        num_snapshots: states that are kept.
        num_evicted: states that made room for others.
        expert_counts: for each layer, how many tokens each expert was given.
    """

    size: PoolSize
    counters: Counters
    num_waiting: int
    num_running: int
    num_prefilling: int
    state_bytes: int
    cache_bytes: int
    num_snapshots: int
    num_evicted: int
    expert_counts: tuple[tuple[int, ...], ...]


class Engine:
    """A model that answers many requests at once.

    Args:
        model: a trained model; it is put into evaluation mode.
        tokenizer: the one it was trained with.
        options: the limits.
        weights_sha256: ``Checkpoint.weights_sha256``; for whoever saves states.

    Attributes:
        options: as given.
        weights_sha256: as given.
        failure: what ended the engine; None while it is well.

    Raises:
        ConfigError: a tokenizer that does not fit the model, or options that contradict each other.
        DoesNotFitError: a budget that holds no sequence.
    """

    def __init__(
        self,
        model: HybridLM,
        tokenizer: Tokenizer,
        options: EngineOptions | None = None,
        *,
        weights_sha256: str = "",
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.options = EngineOptions() if options is None else options
        self.weights_sha256 = weights_sha256
        self.failure: BaseException | None = None
        self._core = Core(model, tokenizer, self.options)
        if self.options.audit_every and not self._core.reader.has_decoder:
            raise ConfigError(
                "audit_every: answers can be compared bit by bit only where a Decoder reads them, "
                "in fp32 or bf16 on a CPU with every expert in memory"
            )
        self._changed = threading.Condition()
        self._auditor = Auditor(self._core, self.options.audit_every)
        self._submitted: deque[tuple[Request, Matcher | None, Ticket]] = deque()
        self._cancelled: deque[Ticket] = deque()
        self._jobs: dict[Ticket, Job] = {}
        self._touched: set[Ticket] = set()
        self._is_closing = False
        self._must_end = False
        self._has_ended = False
        self._was_aborted = False
        self._numbers = itertools.count(1)
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="deltamoe-engine", daemon=True)
        self._thread.start()

    # Asking

    def submit(self, request: Request) -> Ticket:
        """Take a request; any thread may call this. A grammar is compiled here, which takes time.

        Raises:
            QueueFullError: ``max_waiting`` requests wait already.
            ContextTooLongError: prompt and answer do not fit into a sequence.
            ConfigError: an id outside the vocabulary, or a grammar that cannot be understood.
            BackendUnavailableError: a grammar, and llguidance is not installed.
            EngineDeadError, ShuttingDownError: nothing is taken any more.
        """
        return self._submit(request, waits=False)

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Answer requests, in their order; waits where ``submit`` would refuse.

        Raises:
            BaseException: the error of the first request that failed; the others are cancelled.
        """
        tickets: list[Ticket] = []
        try:
            for request in requests:
                tickets.append(self._submit(request, waits=True))
            return [ticket.result() for ticket in tickets]
        finally:
            for ticket in tickets:
                ticket.cancel()

    async def stream(self, request: Request) -> AsyncIterator[Piece]:
        """Answer one request piece by piece; whoever leaves the iterator cancels it."""
        ticket = self.submit(request)
        try:
            async for piece in ticket.apieces():
                yield piece
        finally:
            ticket.cancel()

    # Watching

    @property
    def is_alive(self) -> bool:
        """Whether the engine answers, or will."""
        return self._thread.is_alive() and self.failure is None

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the thread last came by; a step takes as long as its longest chunk."""
        return time.monotonic() - self._beat

    @property
    def context(self) -> int:
        """Tokens a sequence may reach."""
        return self._core.size.context

    def stats(self) -> EngineStats:
        """Counters and gauges; any thread may call this, and they may be a step apart."""
        core, size = self._core, self._core.size
        running = _without_audits(core.scheduler.running)
        counts = core.reader.expert_counts
        return EngineStats(
            size=size,
            counters=core.counters,
            num_waiting=len(self._submitted) + len(_without_audits(core.scheduler.waiting)),
            num_running=len(running),
            num_prefilling=sum(sequence.is_prefilling for sequence in running),
            state_bytes=(size.num_slots - core.pool.num_free_slots) * size.slot_bytes
            + core.pool.num_running_pages * size.page_bytes,
            cache_bytes=core.snapshots.nbytes,
            num_snapshots=len(core.snapshots),
            num_evicted=core.snapshots.num_evicted,
            expert_counts=() if counts is None else tuple(map(tuple, counts.tolist())),
        )

    # Ending

    def close(self, *, grace_s: float = 10.0) -> None:
        """Take nothing new, let what is running finish, and end the thread.

        Args:
            grace_s: seconds to finish in; what has not by then gets ``ShuttingDownError``.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._has_ended, grace_s)
            self._must_end = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._has_ended)
        if not self._was_aborted:
            self._thread.join()

    def abort(self) -> None:
        """End at once: in less than a second, also if the step at hand takes longer.

        Whatever is running or waiting gets ``ShuttingDownError``; a ``close`` that waits in another
        thread returns. The thread is left to its step; it does not keep the process.
        """
        with self._changed:
            self._is_closing = self._must_end = self._was_aborted = True
            self._changed.notify_all()
        self._thread.join(_ABORT_S)
        self._end_all(_closed())

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(grace_s=10.0 if error is None else 0.0)

    # The callers' side of the door

    def _submit(self, request: Request, *, waits: bool) -> Ticket:
        matcher = self._core.prepare(request)
        ticket = Ticket(f"request-{next(self._numbers)}", self._cancel)
        with self._changed:
            while True:
                if self.failure is not None or not self._thread.is_alive():
                    raise EngineDeadError(f"the engine has failed: {self.failure!r}")
                if self._is_closing:
                    raise ShuttingDownError("the engine is being closed; it takes nothing new")
                if self._has_room():
                    break
                if not waits:
                    raise QueueFullError(
                        f"{self.options.max_waiting} requests wait already; try again in a moment"
                    )
                self._changed.wait(_BEAT_S)
            self._submitted.append((request, matcher, ticket))
            self._changed.notify_all()
        return ticket

    def _has_room(self) -> bool:
        scheduler, size = self._core.scheduler, self._core.size
        free = max(size.num_slots - len(_without_audits(scheduler.running)), 0)
        waiting = len(self._submitted) + len(_without_audits(scheduler.waiting))
        return waiting < self.options.max_waiting + free

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.is_done:
            return
        with self._changed:
            self._cancelled.append(ticket)
            self._changed.notify_all()

    # The thread

    def _run(self) -> None:
        try:
            with evaluating(self.model):
                while self._take():
                    self._beat = time.monotonic()
                    self._core.step()
                    self._deliver()
        except BaseException as failure:
            self.failure = failure
            self._end_all(EngineDeadError(f"the engine has failed: {failure!r}"))
            raise
        else:
            self._end_all(_closed())

    def _take(self) -> bool:
        """Take what was submitted and cancelled; sleep if there is nothing to do.

        Returns:
            Whether there is a step to be taken; False ends the thread.
        """
        with self._changed:
            if self._is_closing:
                self._auditor.stop()
            while not (self._submitted or self._cancelled or self._core.has_work):
                self._beat = time.monotonic()
                if self._is_closing:
                    return False
                if self._auditor.begin(is_idle=True):
                    break
                self._changed.wait(_BEAT_S)
            if self._must_end:
                return False
            submitted, self._submitted = self._submitted, deque()
            cancelled, self._cancelled = self._cancelled, deque()
        self._auditor.begin(is_idle=False)
        for request, matcher, ticket in submitted:
            listener = _Delivery(self, ticket)
            self._jobs[ticket] = self._core.add(request, listener, matcher)
        for ticket in cancelled:
            if ticket in self._jobs and not ticket.is_done:
                self._core.cancel(self._jobs[ticket])
        self._deliver()
        return True

    def _deliver(self) -> None:
        """Wake whoever got something in this step."""
        if not self._touched:
            return
        wake(self._touched)
        has_ended = False
        for ticket in self._touched:
            if ticket.is_done:
                self._jobs.pop(ticket, None)
                has_ended = True
        self._touched.clear()
        if has_ended:
            with self._changed:
                self._changed.notify_all()  # there may be room to submit

    def _end_all(self, error: Exception) -> None:
        with self._changed:
            # one copy at once: after an abort the thread may still be changing the jobs
            tickets = {*list(self._jobs), *(ticket for *_, ticket in self._submitted)}
            self._submitted.clear()
            self._has_ended = True
            self._changed.notify_all()
        for ticket in tickets:
            if not ticket.is_done:
                ticket.on_error(error)
        wake(tickets)


def _without_audits(sequences: list[ActiveSequence]) -> list[ActiveSequence]:
    return [sequence for sequence in list(sequences) if not sequence.job.is_audit]


def _closed() -> ShuttingDownError:
    return ShuttingDownError("the engine was closed before this was finished")


class _Delivery:
    """Passes everything on to a ticket, and notes that its consumer is to be woken."""

    def __init__(self, engine: Engine, ticket: Ticket) -> None:
        self._engine = engine
        self._ticket = ticket

    def on_piece(self, piece: Piece) -> None:
        self._ticket.on_piece(piece)
        self._engine._touched.add(self._ticket)

    def on_result(self, result: Result) -> None:
        self._ticket.on_result(result)
        self._engine._touched.add(self._ticket)
        self._engine._auditor.note(self._engine._jobs[self._ticket], result)

    def on_error(self, error: BaseException) -> None:
        self._ticket.on_error(error)
        self._engine._touched.add(self._ticket)
