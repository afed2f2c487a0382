"""The engine without its thread: ``step`` moves every request on a little.

A step starts who may start, reads chunks of prompts, and then one token of everybody who is
writing. A request that fails, fails alone; an exception that leaves ``step`` is the engine's own.
Knows nothing of threads or of who is listening.
"""

import time

import numpy as np
import torch

from deltamoe.engine.admission import check_answerable
from deltamoe.engine.counters import Counters
from deltamoe.engine.grammar import GrammarCompiler, Matcher
from deltamoe.engine.options import EngineOptions
from deltamoe.engine.reader import Batch, Reader
from deltamoe.engine.request import Piece, Request
from deltamoe.engine.sampling import Sampling
from deltamoe.engine.scheduler import Scheduler
from deltamoe.engine.sequence import Job, Listener, Sequence
from deltamoe.engine.snapshots import Kept, Snapshots
from deltamoe.engine.state_pool import PoolSize, StatePool
from deltamoe.errors import DeltamoeError
from deltamoe.inference import TextState
from deltamoe.model import HybridLM
from deltamoe.tokenizer import Tokenizer, check_fit

__all__ = ["Core"]

_HEAD_ROWS = 64
"""Tokens of a prompt that are scored at once, so that their logits stay small."""

_LAST = 1 << 62
_CHUNK_PER_GAIN = 8
"""A state is kept, or a prompt cut for one, if it saves this part of a chunk at least."""


class Core:
    """A model, its states, and whose turn it is.

    Args:
        model: in evaluation mode.
        tokenizer: the one it was trained with.
        options: the limits.

    Attributes:
        size: how the budget was divided.
        counters: what was done.
        sampling: how ids are chosen.
    """

    def __init__(self, model: HybridLM, tokenizer: Tokenizer, options: EngineOptions) -> None:
        check_fit(tokenizer, model.config.vocab_size)
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.size = PoolSize.of(model, options)
        self.pool = StatePool(model, self.size)
        self.snapshots = Snapshots(self.pool)
        self.scheduler = Scheduler()
        self.reader = Reader(model, self.pool, options.single_tokens)
        self.counters = Counters()
        self._audits_counters = Counters()
        self._batch = Batch(self.size.num_slots)
        self.sampling = Sampling(tokenizer, model.embedding.weight.device)
        self._grammars = GrammarCompiler(tokenizer)
        self._least_gain = max(options.prefill_chunk // _CHUNK_PER_GAIN, 1)
        self._num_jobs = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    def prepare(self, request: Request) -> Matcher | None:
        """Refuse what could never be answered, and compile a grammar; any thread may call this.

        Raises:
            ContextTooLongError: prompt and answer do not fit into a sequence.
            ConfigError: an id outside the vocabulary, or a grammar that cannot be understood.
            BackendUnavailableError: a grammar, and llguidance is not installed.
        """
        check_answerable(request, self.model, self.tokenizer, self.size.context)
        return self._grammars.matcher(request)

    def add(
        self,
        request: Request,
        listener: Listener,
        matcher: Matcher | None = None,
        *,
        audited: Job | None = None,
    ) -> Job:
        """Take a request.

        Args:
            request: one that ``prepare`` let pass.
            listener: is told what becomes of it.
            matcher: what ``prepare`` answered.
            audited: a finished job that this one repeats, reading the prompt by the same steps;
                everything else goes first.
        """
        order = self._num_jobs if audited is None else _LAST
        job = Job(request, listener, self.tokenizer, order=order, num_single=self.reader.num_single)
        self._num_jobs += 1
        first = job.sequences[0]
        if audited is not None:
            job.is_audit, job.seed = True, audited.seed
            first.cuts, first.is_bound = list(audited.prompt_cuts), True
        if matcher is not None:
            for sequence in job.sequences:
                sequence.matcher = matcher.copy()
        self.scheduler.add(first)
        return job

    def cancel(self, job: Job) -> None:
        """End a request as it stands; its choices so far are its result."""
        if len(job.choices) == len(job.sequences):
            return
        for sequence in job.sequences:
            if sequence.index not in job.choices:
                self._let_go(sequence)
                job.choices[sequence.index] = sequence.choice("cancelled")
        self._close(job)
        self._counters_of(job).num_cancelled += 1
        self._deliver(job)

    def fail(self, job: Job, error: BaseException) -> None:
        """End a request with an error."""
        for sequence in job.sequences:
            self._let_go(sequence)
        self._close(job)
        self._counters_of(job).num_failed += 1
        job.listener.on_error(error)

    def step(self) -> None:
        """Move every request on."""
        self.counters.num_steps += 1
        with torch.inference_mode():
            self._start()
            self._read_prompts()
            self._write()

    def _counters_of(self, job: Job) -> Counters:
        return self._audits_counters if job.is_audit else self.counters

    # Starting

    def _start(self) -> None:
        while self.scheduler.waiting:
            sequence = self.scheduler.waiting[0]
            kept = self._kept_for(sequence) if self.pool.num_free_slots else None
            if not self._has_place(sequence, kept):
                if sequence.job.is_audit or not self._gave_up_audit():
                    return
                continue
            self.scheduler.start()
            try:
                self._place(sequence, kept)
            except Exception as error:  # its own state, which nobody else has begun to use
                self.fail(sequence.job, error)

    def _has_place(self, sequence: Sequence, kept: Kept | None) -> bool:
        pages = self._pages_to_start(sequence, kept)
        return self.pool.num_free_slots > 0 and pages <= self.pool.num_free_pages

    def _gave_up_audit(self) -> bool:
        """End an audit that has a place, for whoever needs it; return whether there was one."""
        if not self.scheduler.running or not self.scheduler.youngest().job.is_audit:
            return False
        self.cancel(self.scheduler.youngest().job)
        return True

    def _kept_for(self, sequence: Sequence) -> Kept | None:
        """The state a sequence can go on from: its own, its prompt's, or a prefix of it."""
        for own in (sequence.parked, sequence.job.fork):
            if own is not None and own.snapshot is not None:
                return own
        job, step = sequence.job, self.options.prefill_chunk
        if not job.request.reuse or job.request.prompt_logprobs is not None:
            return None  # scoring a prompt needs to read it
        cuts = None
        if sequence.is_bound:
            cuts = tuple(sequence.cuts)
        elif self.options.exact_reuse:
            cuts = sequence.cold_cuts(step)
        last = sequence.num_prompt - 1
        kept, num_known = self.snapshots.find(job.scope, job.ids, limit=last, cuts=cuts)
        if not sequence.is_bound:
            # Where two texts part, a state is worth keeping: a third one may come that way.
            sequence.num_known = num_known = min(num_known, last)
            if cuts is not None:
                num_known = max((cut for cut in cuts if 0 < cut <= num_known), default=0)
            length = kept.snapshot.length - job.num_before if kept and kept.snapshot else 0
            sequence.extra_cut = num_known if num_known - length >= self._least_gain else 0
        return kept

    def _pages_to_start(self, sequence: Sequence, kept: Kept | None) -> int:
        """Pages for the whole prompt, and for the next token of a text that is further."""
        pool, before = self.pool, sequence.job.num_before
        length = before + sequence.num_prompt
        if kept is None or kept.snapshot is None:
            return pool.pages_for(length)
        length = max(length, kept.snapshot.length + 1)
        own = pool.pages_for(length) - len(kept.snapshot.pages)
        return own + pool.pages_to_restore(kept.snapshot)

    def _place(self, sequence: Sequence, kept: Kept | None) -> None:
        """Give a sequence its place in the pool, and what it goes on from."""
        job, before = sequence.job, sequence.job.num_before
        is_own = kept is not None and kept in (sequence.parked, job.fork)
        self._counters_of(job).num_rebuilt += sequence.is_bound and not is_own
        if kept is not None and kept.snapshot is not None:
            sequence.handle = handle = self.pool.restore(kept.snapshot)
        else:
            sequence.handle = handle = self.pool.acquire()
            if job.request.state is not None and job.request.state.state is not None:
                self.pool.reserve(handle, before)
                self.pool.write(handle, job.request.state.state, before)
                self._keep(sequence)
        self.pool.reserve(handle, max(before + sequence.num_prompt, handle.length + 1))
        sequence.num_read = handle.length - before
        sequence.is_fresh = True
        if not sequence.is_bound:
            sequence.cuts = list(kept.cuts) if kept is not None else []
            job.num_cached_tokens = sequence.num_read
            job.num_replayed_tokens = max(sequence.num_known - sequence.num_read, 0)
        if job.started is None:
            job.started = time.perf_counter()
        self._forget_parked(sequence)
        if job.has_forked and all(each.has_begun for each in job.sequences):
            self._close(job)
        self._go_on(sequence)

    def _go_on(self, sequence: Sequence) -> None:
        """A sequence has been placed, or has read a chunk: what comes next?"""
        if sequence.is_prefilling:
            return
        if sequence.num_read >= sequence.prefill_end and not sequence.answer.ids:
            self._prompt_was_read(sequence)
        if sequence.handle is not None and not sequence.is_prefilling:
            self._batch.add(sequence)

    # Reading prompts

    def _read_prompts(self) -> None:
        """Read chunks until the step's tokens are spent; one at least, whatever its size."""
        left = self.options.step_tokens
        begin = time.perf_counter()
        while left > 0 and (sequence := self.scheduler.next_prompt()):
            if sequence.is_fresh:
                self._look_again(sequence)
            if sequence.handle is None or not sequence.is_prefilling:
                continue
            num_read = sequence.num_read
            try:
                self._read_chunk(sequence)
            except Exception as error:  # only this sequence's state was touched
                self.fail(sequence.job, error)
            left -= max(sequence.num_read - num_read, 1)
        self.counters.prefill_s += time.perf_counter() - begin

    def _look_again(self, sequence: Sequence) -> None:
        """Use what others have read since the sequence was placed."""
        sequence.is_fresh = False
        kept = None if sequence.is_bound else self._kept_for(sequence)
        if kept is None or kept.snapshot is None:
            return
        if kept.snapshot.length - sequence.job.num_before > sequence.num_read:
            assert sequence.handle is not None
            self.pool.release(sequence.handle)
            self._place(sequence, kept)
            sequence.is_fresh = False

    def _read_chunk(self, sequence: Sequence) -> None:
        job, handle = sequence.job, sequence.handle
        assert handle is not None
        begin = sequence.num_read
        end = sequence.chunk_end(self.options.prefill_chunk)
        sequence.is_bound = True
        hidden = self.reader.prefill(handle, job.ids[begin:end], is_counted=not job.is_audit)
        sequence.num_read = end
        self._counters_of(job).num_prompt_tokens += end - begin
        if not sequence.cuts or end > abs(sequence.cuts[-1]):
            sequence.cuts.append(end)
        if job.request.prompt_logprobs is not None and sequence.index == 0:
            self._score(job, hidden, begin)
        if job.request.wants_embedding and end == sequence.num_prompt:
            job.embedding = hidden[-1].float().cpu()
        if self._is_worth_keeping(sequence):
            self._keep(sequence)
        self._go_on(sequence)

    def _score(self, job: Job, hidden: torch.Tensor, begin: int) -> None:
        """The logprobs of the tokens behind those that were read."""
        number = job.request.prompt_logprobs
        assert number is not None
        for start in range(0, len(hidden), _HEAD_ROWS):
            rows = hidden[start : start + _HEAD_ROWS]
            behind = torch.from_numpy(job.ids[begin + start + 1 :][: len(rows)]).to(rows.device)
            logprobs = self.model.logits(rows[: len(behind)]).log_softmax(-1)
            place = begin + start + 1
            job.prompt_logprobs[place : place + len(behind)] = self.sampling.described(
                logprobs, behind, number
            )

    def _is_worth_keeping(self, sequence: Sequence) -> bool:
        """At the prompt's end, where texts part, and at the last of the usual cuts."""
        job, read = sequence.job, sequence.num_read
        last = sequence.num_prompt - 1
        step = self.options.prefill_chunk
        is_last_usual = (job.num_before + read) % step == 0 and read + step > last
        return read <= last and (is_last_usual or read in (last, sequence.extra_cut))

    def _prompt_was_read(self, sequence: Sequence) -> None:
        job = sequence.job
        if sequence.index == 0:
            job.prompt_cuts = sequence.cuts_so_far()
            job.is_exact = job.prompt_cuts == sequence.cold_cuts(self.options.prefill_chunk)
            if len(job.sequences) > 1 and not job.has_forked and job.request.max_tokens:
                self._fork(sequence)
        if job.request.max_tokens == 0:
            job.first_token = time.perf_counter()
            for each in job.sequences:
                self._finish(each, "", sequence)

    def _fork(self, sequence: Sequence) -> None:
        """Let the other choices begin where the first one has come to."""
        assert sequence.handle is not None
        job, cuts = sequence.job, sequence.cuts_so_far()
        job.has_forked = True
        job.fork = self.snapshots.hold(sequence.handle, cuts)
        for other in job.sequences[1:]:
            other.cuts, other.is_bound = list(cuts), True
            self.scheduler.add(other)

    # Writing

    def _write(self) -> None:
        self._make_room()
        rows = list(self._batch.rows)
        if not rows:
            return
        begin = time.perf_counter()
        logits = self.reader.decode(self._batch)
        middle = time.perf_counter()
        self.counters.decode_s += middle - begin
        drawing = [at for at, row in enumerate(rows) if row.is_drawing]
        for row in rows:
            row.num_read += 1
            row.is_bound = True
        if len(drawing) < len(rows):
            self._read_singly([row for row in rows if row.num_read < len(row.ids)])
            logits, rows = logits[drawing], [rows[at] for at in drawing]
        if rows:
            chosen = self.sampling.choose(logits, rows)
            for row, token_id in zip(rows, chosen, strict=True):
                self._push(row, token_id)
        self.counters.sample_s += time.perf_counter() - middle

    def _make_room(self) -> None:
        """See that every row has a page for its next token; the youngest give way if not."""
        for row in list(self._batch.rows):
            handle = row.handle
            if handle is None or self.pool.pages_for(handle.length + 1) <= len(handle.pages):
                continue
            while row.handle is not None and not self.pool.reserve(handle, handle.length + 1):
                if not self._gave_up_audit():
                    self.preempt(self.scheduler.youngest())
            if row.handle is not None:
                self._batch.note_page(self._batch.rows.index(row))

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's place; it waits with its state put aside, or to be rebuilt."""
        assert sequence.handle is not None
        self._counters_of(sequence.job).num_preemptions += 1
        sequence.parked = self.snapshots.hold(sequence.handle, sequence.cuts_so_far())
        self._batch.remove(sequence)
        self.pool.release(sequence.handle)
        sequence.handle, sequence.num_read = None, 0
        self.scheduler.give_way(sequence)

    def _read_singly(self, rows: list[Sequence]) -> None:
        """Rows that have read a token there was: the end of a prompt, or one read again."""
        for row in rows:
            self._counters_of(row.job).num_prompt_tokens += row.num_read <= row.prefill_end
            if row.is_prefilling:  # a chunk is read again, too
                self._batch.remove(row)
            elif row.num_read == row.prefill_end and not row.answer.ids:
                self._keep(row)
                self._prompt_was_read(row)

    def _push(self, sequence: Sequence, token_id: int | DeltamoeError) -> None:
        job = sequence.job
        if sequence.handle is None:  # another choice of this request has failed in this step
            return
        try:
            if isinstance(token_id, DeltamoeError):
                raise token_id
            text = sequence.push(token_id)
        except Exception as error:
            self.fail(job, error)
            return
        self._counters_of(job).num_generated_tokens += 1
        if job.first_token is None:
            job.first_token = time.perf_counter()
        if sequence.answer.finish_reason is not None:
            self._finish(sequence, text, sequence, token_id)
        else:
            logprobs = tuple(sequence.logprobs[-1:])
            job.listener.on_piece(Piece(sequence.index, text, (token_id,), logprobs, None))

    # Ending

    def _finish(
        self, sequence: Sequence, text: str, reader: Sequence, token_id: int | None = None
    ) -> None:
        """End a choice; ``reader`` is the sequence whose state is the choice's too."""
        job = sequence.job
        is_last = len(job.choices) == len(job.sequences) - 1
        if sequence.answer.ids:
            self._keep(sequence)
        reason = sequence.answer.finish_reason
        assert reason is not None
        if token_id is not None and len(sequence.logprobs) > len(sequence.answer.ids):
            sequence.logprobs.pop()  # of the stop id, which is no part of the text
        state = self._text_state(reader) if job.request.keep_state else None
        job.choices[sequence.index] = sequence.choice(reason, state)
        has_id = token_id is not None and sequence.answer.ids[-1:] == [token_id]
        ids = (token_id,) if token_id is not None and has_id else ()
        logprobs = tuple(sequence.logprobs[-1:]) if ids else ()
        job.listener.on_piece(Piece(sequence.index, text, ids, logprobs, reason))
        if sequence is not reader:
            if is_last:
                self._let_go(reader)
        elif is_last or job.request.max_tokens:
            self._let_go(sequence)
        if is_last:
            self._close(job)
            self._counters_of(job).num_finished += 1
            self._deliver(job)

    def _let_go(self, sequence: Sequence) -> None:
        """Give up everything a sequence holds."""
        self.scheduler.remove(sequence)
        self._batch.remove(sequence)
        self._forget_parked(sequence)
        if sequence.handle is not None:
            self.pool.release(sequence.handle)
            sequence.handle = None

    def _forget_parked(self, sequence: Sequence) -> None:
        if sequence.parked is not None:
            self.snapshots.drop(sequence.parked)
            sequence.parked = None

    def _close(self, job: Job) -> None:
        if job.fork is not None:
            self.snapshots.drop(job.fork)
            job.fork = None

    def _text_state(self, sequence: Sequence) -> TextState:
        assert sequence.handle is not None
        unread = tuple(sequence.ids[sequence.num_read :])
        return TextState(self.pool.copy(sequence.handle), unread)

    def _deliver(self, job: Job) -> None:
        counters = self._counters_of(job)
        counters.num_cached_tokens += job.num_cached_tokens
        counters.num_replayed_tokens += job.num_replayed_tokens
        job.listener.on_result(job.result())

    # Keeping

    def _keep(self, sequence: Sequence) -> None:
        """Keep the state of what has been read, for a text that begins like this one."""
        job = sequence.job
        if not job.request.reuse or sequence.handle is None:
            return
        if sequence.handle.length < self._least_gain:
            return
        ids = np.array(sequence.ids[: sequence.num_read], np.int64)
        cuts = sequence.cuts_so_far()
        is_cold = cuts == sequence.cold_cuts(self.options.prefill_chunk)[: len(cuts)]
        self.snapshots.keep(job.scope, ids, sequence.handle, cuts, is_cold=is_cold)
