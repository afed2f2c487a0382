"""Requests run to their end; what they drew, and from which logits.

A request may be led along a given text: whatever it draws is noted, and it goes on with the text's
next id. Knows nothing of what the runs are compared with.
"""

from collections import Counter
from collections.abc import Sequence as Rows
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from deltamoe.engine.core import Core
from deltamoe.engine.request import Piece, Request, Result
from deltamoe.engine.sampling import Sampling
from deltamoe.engine.sequence import Job, Sequence
from deltamoe.engine.snapshots import Cuts
from deltamoe.errors import DeltamoeError

__all__ = ["Recorder", "Run"]


class Run(NamedTuple):
    """What one choice would have written, and how it came about.

    Attributes:
        ids: what it drew, token by token.
        logits: what it drew from, for each token.
        cuts: by which steps its prompt was read; None if not by the engine's.
        number: how often what the run is about took place; None where nothing is counted.
        counted: what was counted.
    """

    ids: tuple[int, ...]
    logits: Float[Tensor, "T vocab"]
    cuts: Cuts | None = None
    number: int | None = None
    counted: str = ""


class Recorder:
    """Runs requests, and keeps what is drawn and from which logits.

    Args:
        core: runs them.
        text: whatever a request draws that follows it, it is given these ids; None lets it write.

    Attributes:
        core: as given.
        results: of the requests that are done.
        num_beside: of each, tokens that were drawn while others drew theirs.
    """

    def __init__(self, core: Core, text: tuple[int, ...] | None = None) -> None:
        self.core = core
        self.results: dict[Job, Result] = {}
        self.num_beside: Counter[Job] = Counter()
        self._text = text
        self._following: set[Job] = set()
        self._drawn: dict[Sequence, list[int]] = {}
        self._logits: dict[Sequence, list[Tensor]] = {}
        core.sampling = _RecordingSampling(core, self)

    def add(self, request: Request) -> Job:
        """Take one that writes as it likes."""
        listener = _Listener(self.results)
        job = self.core.add(request, listener)
        listener.job = job
        return job

    def follow(self, request: Request) -> Job:
        """Add one that follows the text."""
        job = self.add(request)
        self._following.add(job)
        return job

    def note(self, logits: Tensor, rows: Rows[Sequence]) -> None:
        """The logits that these are about to draw from."""
        for row, sequence in zip(logits.cpu(), rows, strict=True):
            self._logits.setdefault(sequence, []).append(row.clone())
            self.num_beside[sequence.job] += len(rows) > 1

    def drew(self, sequence: Sequence, token_id: int) -> int:
        """What it has drawn; returns what it is given."""
        self._drawn.setdefault(sequence, []).append(token_id)
        if self._text is None or sequence.job not in self._following:
            return token_id
        return self._text[len(sequence.answer.ids)]

    def runs(self, job: Job) -> list[Run]:
        """Go on until there is nothing left to do; one run a choice that has drawn anything."""
        while self.core.has_work:
            self.core.step()
        return [
            Run(tuple(self._drawn[sequence]), torch.stack(self._logits[sequence]), job.prompt_cuts)
            for sequence in job.sequences
            if sequence in self._drawn
        ]

    def reusing(self, job: Job) -> Run:
        """One that is to find its beginning kept."""
        [run] = self.runs(job)
        return run._replace(number=job.num_cached_tokens, counted="tokens reused")


class _Listener:
    def __init__(self, results: dict[Job, Result]) -> None:
        self.job: Job | None = None
        self._results = results

    def on_piece(self, piece: Piece) -> None:
        """Only the whole is compared."""

    def on_result(self, result: Result) -> None:
        assert self.job is not None
        self._results[self.job] = result

    def on_error(self, error: BaseException) -> None:
        raise error


class _RecordingSampling(Sampling):
    def __init__(self, core: Core, recorder: Recorder) -> None:
        super().__init__(core.tokenizer, core.model.embedding.weight.device)
        self._recorder = recorder

    def choose(self, logits: Tensor, rows: Rows[Sequence]) -> list[int | DeltamoeError]:
        self._recorder.note(logits[:, : self._vocab_size], rows)
        return [
            token_id if isinstance(token_id, DeltamoeError) else self._recorder.drew(row, token_id)
            for row, token_id in zip(rows, super().choose(logits, rows), strict=True)
        ]
