"""One choice on its way: what has been read, what was drawn, and where its state is.

``ids`` is the whole text, prompt and answer; ``num_read`` of them are in the state. The prompt is
read in chunks up to its last token, or up to an end short enough to be read as what follows it.
From there on a step reads one token, and draws the next if it was the last. So a sequence that lost
its state is read again by the same cuts, and its own tokens one by one, as they came the first
time; it goes on to the last bit as if nothing had happened.
Knows nothing of models.
"""

import struct
import time
from collections import Counter
from collections.abc import Hashable
from hashlib import blake2b
from secrets import randbits
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from deltamoe.engine.grammar import Matcher
from deltamoe.engine.prefix_tree import Ids
from deltamoe.engine.request import (
    Choice,
    FinishReason,
    Piece,
    Request,
    Result,
    Timings,
    TokenLogprob,
)
from deltamoe.engine.snapshots import Cuts, Kept
from deltamoe.engine.state_pool import Handle
from deltamoe.inference import TextState
from deltamoe.inference.answer import Answer
from deltamoe.tokenizer import Tokenizer

__all__ = ["Job", "Kind", "Listener", "Sequence"]

_DRAW_BITS = 40
_GREEDY_BELOW = 1e-5  # a smaller temperature leaves one id anyway and would overflow on the way

Kind = tuple[()] | tuple[bool, bool, bool]
"""Which rules a request's ids are drawn by: () for the likeliest, or (top-k, top-p, min-p)."""


@runtime_checkable
class Listener(Protocol):
    """Who asked."""

    def on_piece(self, piece: Piece) -> None:
        """One choice has gone on."""

    def on_result(self, result: Result) -> None:
        """All choices are finished; nothing follows."""

    def on_error(self, error: BaseException) -> None:
        """The request failed; nothing follows."""


class Job:
    """A request with all its choices.

    Attributes:
        order: of submission, from 0.
        num_single: longest end of a prompt that is read token by token.
        ids: what is to be read: what the text before had left unread, and the prompt.
        num_before: tokens that the text before has read.
        seed: the request's, or one drawn for it.
        sequences: one a choice; the others begin when the first has read the prompt.
        fork: the state behind the prompt, for those who have not begun.
        has_forked: whether the others wait, or have begun.
        is_audit: whether it repeats another, and nobody asked for it.
        prompt_cuts: how the prompt was read, see ``Sequence.cuts``.
        scope: within which its prefixes are shared.
        kind: which rules its ids are drawn by.
        has_edits: whether its logits depend on what was written, or on ids it names.
        prompt_logprobs: one entry for each of ``ids``, filled as they are read.
        embedding: the last hidden state, once it is there.
        choices: the finished ones by index.
    """

    def __init__(
        self,
        request: Request,
        listener: Listener,
        tokenizer: Tokenizer,
        *,
        order: int,
        num_single: int = 0,
    ) -> None:
        self.request = request
        self.listener = listener
        self.order = order
        # what is asked of the prompt's own tokens, only a chunk's hidden states can answer
        asks = request.prompt_logprobs is not None or request.wants_embedding
        self.num_single = 0 if asks or request.max_tokens == 0 else num_single
        before = request.state or TextState(None, ())
        self.scope: Hashable = (request.scope, before.state and _Identity(before.state.lengths))
        self.ids: Ids = np.array([*before.unread, *request.prompt], np.int64)
        self.kind: Kind = _kind(request)
        self.has_edits = _has_edits(request)
        self.num_before = before.num_tokens - len(before.unread)
        self.seed = randbits(63) if request.seed is None else request.seed
        self.sequences = [Sequence(self, index, tokenizer) for index in range(request.n)]
        self.fork: Kept | None = None
        self.has_forked = False
        self.is_audit = False
        self.prompt_cuts: Cuts = ()
        self.prompt_logprobs: list[TokenLogprob | None] = [None] * len(self.ids)
        self.embedding: Tensor | None = None
        self.choices: dict[int, Choice] = {}
        self.num_cached_tokens = self.num_replayed_tokens = 0
        self.is_exact = True
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.first_token: float | None = None

    def result(self) -> Result:
        """What has become of it, now that its choices are finished."""
        now = time.perf_counter()
        asked = self.request.prompt_logprobs is not None
        first_of_prompt = len(self.ids) - len(self.request.prompt)
        return Result(
            choices=tuple(self.choices[index] for index in sorted(self.choices)),
            prompt_logprobs=tuple(self.prompt_logprobs[first_of_prompt:]) if asked else None,
            embedding=self.embedding,
            num_prompt_tokens=len(self.request.prompt),
            num_cached_tokens=self.num_cached_tokens,
            num_replayed_tokens=self.num_replayed_tokens,
            is_exact=self.is_exact,
            timings=Timings(
                *(
                    (now if at is None else at) - self.submitted
                    for at in (self.started, self.first_token, now)
                )
            ),
        )


def _kind(request: Request) -> Kind:
    if request.temperature < _GREEDY_BELOW:
        return ()
    return request.top_k > 0, request.top_p < 1.0, request.min_p > 0.0


def _has_edits(request: Request) -> bool:
    return (
        request.json_schema is not None
        or request.grammar is not None
        or bool(request.logit_bias)
        or request.repetition_penalty != 1.0
        or request.presence_penalty != 0.0
        or request.frequency_penalty != 0.0
    )


class _Identity:
    """Equal to itself and no other, as long as anything refers to it."""

    def __init__(self, thing: object) -> None:
        self._thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self._thing is other._thing

    def __hash__(self) -> int:
        return id(self._thing)


class Sequence:
    """One choice.

    Attributes:
        job: the request it belongs to.
        index: of the choice.
        ids: prompt and answer.
        num_read: of ``ids``, in the state.
        handle: where the state is; None while it waits.
        parked: the state of a sequence that had to give way, if it was kept.
        cuts: how far the prompt has been read, and by which steps: the end of each chunk, and as a
            negative number the end of a stretch that was read token by token. What is read again is
            read by the same steps.
        extra_cut: a place where the prompt is cut beside the usual ones, for a state worth keeping.
        answer: what was drawn, as text.
        logprobs: of what was drawn.
        matcher: the grammar it must follow.
        counts: how often the answer has each id, where ``Job.has_edits``.
        seen: every id of prompt and answer, where a repetition penalty asks for it.
        num_known: ids of the prompt that some earlier text began with.
        is_fresh: whether it has read nothing since it was given its place.
        is_bound: whether it has read anything at all, so that ``cuts`` can no longer be chosen.
    """

    def __init__(self, job: Job, index: int, tokenizer: Tokenizer) -> None:
        request = job.request
        self.job = job
        self.index = index
        self.ids: list[int] = job.ids.tolist()
        self.num_read = 0
        self.handle: Handle | None = None
        self.parked: Kept | None = None
        self.cuts: list[int] = []
        self.extra_cut = 0
        self.answer = Answer(
            tokenizer,
            max_tokens=request.max_tokens,
            stop=request.stop,
            stop_ids=request.stop_ids,
            ignores_end=request.ignore_end,
        )
        self.logprobs: list[TokenLogprob] = []
        self.matcher: Matcher | None = None
        self.counts: Counter[int] = Counter()
        self.seen: set[int] = set(self.ids) if request.repetition_penalty != 1.0 else set()
        self.num_known = 0
        self.is_fresh = True
        self.is_bound = False

    @property
    def order(self) -> tuple[int, int]:
        """Who came first: of two sequences the smaller one."""
        return self.job.order, self.index

    @property
    def num_prompt(self) -> int:
        """Ids of the prompt."""
        return len(self.job.ids)

    @property
    def prefill_end(self) -> int:
        """Ids read before anything is drawn: all but the last, and with it if it is asked for."""
        return self.num_prompt - (not self.job.request.wants_embedding)

    @property
    def is_prefilling(self) -> bool:
        """Whether a chunk of the prompt comes next, and not a single token."""
        if self.num_read >= self.prefill_end:
            return False
        cut = self._next_cut()
        return cut > 0 or (cut == 0 and not self._is_at_end)

    @property
    def _is_at_end(self) -> bool:
        """Whether what is left of the prompt is read token by token."""
        left = self.num_prompt - 1 - self.num_read
        return 0 < left <= self.job.num_single and self.extra_cut <= self.num_read

    @property
    def is_drawing(self) -> bool:
        """Whether the next token to be read is the last of the text."""
        return self.num_read == len(self.ids) - 1

    @property
    def has_begun(self) -> bool:
        """Whether it has a place, or had one."""
        return self.handle is not None or self.parked is not None or bool(self.answer.ids)

    def chunk_end(self, step: int) -> int:
        """Where the next chunk of the prompt ends; see ``cold_cuts``."""
        if cut := self._next_cut():
            return cut
        before, read = self.job.num_before, self.num_read
        cuts = (
            ((before + read) // step + 1) * step - before,
            self.num_prompt - 1,
            self.prefill_end,
            self.extra_cut,
        )
        return min(cut for cut in cuts if cut > read)

    def cold_cuts(self, step: int) -> Cuts:
        """Where a prompt is cut that nothing is known of.

        At multiples of ``step`` tokens from the beginning of the text, and before its last token,
        which is read as those that are drawn; so is the end, if it is short. The cuts follow from
        the prompt alone.
        """
        before, last = self.job.num_before, self.num_prompt - 1
        cuts, read = [], 0
        while read < last and last - read > self.job.num_single:
            read = min(((before + read) // step + 1) * step - before, last)
            cuts.append(read)
        if read < last:
            cuts.append(-last)
        if last < self.prefill_end:
            cuts.append(self.prefill_end)
        return tuple(cuts)

    def cuts_so_far(self) -> Cuts:
        """``cuts`` up to where the text has been read."""
        if self.cuts and self.num_read <= abs(self.cuts[-1]):
            return tuple(cut for cut in self.cuts if abs(cut) <= self.num_read)
        return (*self.cuts, -self.num_read) if self.num_read else ()

    def _next_cut(self) -> int:
        """The end of the stretch to be read again, as in ``cuts``; 0 if none is."""
        if not self.cuts or self.num_read >= abs(self.cuts[-1]):
            return 0
        return next(cut for cut in self.cuts if abs(cut) > self.num_read)

    def push(self, token_id: int) -> str:
        """Take the id that was drawn; return the text that has become certain."""
        piece = self.answer.push(token_id)
        if len(self.answer.ids) > len(self.ids) - self.num_prompt:
            self.ids.append(token_id)
            if self.job.has_edits:
                self.counts[token_id] += 1
                self.seen.add(token_id)
        if self.matcher is not None and self.answer.finish_reason is None:
            self.matcher.push(token_id)
        return piece

    def choice(self, reason: FinishReason, state: TextState | None = None) -> Choice:
        """What has been written, now that nothing follows."""
        return Choice(
            index=self.index,
            text=self.answer.text,
            ids=tuple(self.answer.ids),
            logprobs=tuple(self.logprobs),
            finish_reason=reason,
            matched_stop=self.answer.matched_stop,
            state=state,
        )

    def uniform(self) -> float:
        """The random number in [0, 1) for the next draw: a function of seed, choice and place."""
        place = struct.pack("<qqq", self.job.seed, self.index, len(self.ids) - self.num_prompt)
        bits = int.from_bytes(blake2b(place, digest_size=8).digest()) >> (64 - _DRAW_BITS)
        return bits / (1 << _DRAW_BITS)
