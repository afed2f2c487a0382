"""The next id of every row, each by its own request's rules.

Rows with the same kind of rules are worked on together, by the rules of ``inference.sampler`` with
a number a row. A row's draw depends on its own logits and its own random number alone.
Knows nothing of models or states.
"""

from collections.abc import Sequence as Rows

import torch
from jaxtyping import Float, Int
from torch import Tensor

from deltamoe.engine.request import LEAST_LOGPROB, TokenLogprob
from deltamoe.engine.sequence import Kind, Sequence
from deltamoe.errors import ConfigError, DeltamoeError, NonFiniteError
from deltamoe.inference.sampler import MinP, RepetitionPenalty, Rule, Temperature, TopK, TopP, draw
from deltamoe.tokenizer import Tokenizer

__all__ = ["Sampling"]


class Sampling:
    """Chooses ids of one tokenizer.

    Args:
        tokenizer: what it has no meaning for is never chosen.
        device: of the logits.
    """

    def __init__(self, tokenizer: Tokenizer, device: torch.device) -> None:
        self._vocab_size = tokenizer.vocab_size
        self._unused = torch.tensor(tokenizer.unused_ids, dtype=torch.int64, device=device)

    def choose(
        self, logits: Float[Tensor, "B vocab"], rows: Rows[Sequence]
    ) -> list[int | DeltamoeError]:
        """Draw one id a row; a row that cannot be drawn gets its error instead.

        Args:
            logits: of the model; they are used up.
            rows: one sequence each. What it is asked for in logprobs is added to it.
        """
        chosen: dict[int, int | DeltamoeError] = self._damaged(logits)
        asked = [
            row
            for row, sequence in enumerate(rows)
            if sequence.job.request.num_logprobs is not None and row not in chosen
        ]
        logprobs = logits[asked].log_softmax(-1) if asked else None
        logits = logits[:, : self._vocab_size]
        if len(self._unused):
            logits[:, self._unused] = torch.finfo(logits.dtype).min
        for row, sequence in enumerate(rows):
            if sequence.job.has_edits and row not in chosen:
                try:
                    _edit(logits[row], sequence)
                except DeltamoeError as error:
                    chosen[row] = error
        groups: dict[Kind, list[int]] = {}
        for row, sequence in enumerate(rows):
            if row not in chosen:
                groups.setdefault(sequence.job.kind, []).append(row)
        for kind, at in groups.items():
            part = logits if len(at) == len(logits) else logits[at]
            ids = _draw(part, [rows[row] for row in at], kind) if kind else part.argmax(-1)
            chosen.update(zip(at, ids.tolist(), strict=True))
        if logprobs is not None:
            self._note_logprobs(logprobs, asked, rows, chosen)
        return [chosen[row] for row in range(len(rows))]

    def _damaged(self, logits: Tensor) -> dict[int, int | DeltamoeError]:
        if bool(logits.sum().isfinite()):
            return {}
        finite = logits.isfinite().all(-1)
        return {
            row: NonFiniteError(
                "the model answered with logits that are not finite, so no token can be chosen; "
                "its weights or its state are damaged, or the precision is too low (try fp32)"
            )
            for row in (~finite).nonzero()[:, 0].tolist()
        }

    def _note_logprobs(
        self,
        logprobs: Tensor,
        asked: list[int],
        rows: Rows[Sequence],
        chosen: dict[int, int | DeltamoeError],
    ) -> None:
        numbers = [rows[row].job.request.num_logprobs or 0 for row in asked]
        # A row that failed has no id; whatever is noted for it is not shown.
        ids = [chosen[row] if isinstance(chosen[row], int) else 0 for row in asked]
        entries = self.described(logprobs, torch.tensor(ids, device=logprobs.device), max(numbers))
        for row, number, entry in zip(asked, numbers, entries, strict=True):
            if isinstance(chosen[row], int):
                rows[row].logprobs.append(entry._replace(top=entry.top[:number]))

    def described(
        self, logprobs: Float[Tensor, "T vocab"], ids: Int[Tensor, "T"], number: int
    ) -> list[TokenLogprob]:
        """The logprob of each id, and of the ``number`` likeliest in its place."""
        own = logprobs.gather(1, ids[:, None])[:, 0].clamp(min=LEAST_LOGPROB).tolist()
        usable = logprobs[:, : self._vocab_size]
        if len(self._unused):
            usable = usable.index_fill(1, self._unused, -torch.inf)
        best = usable.topk(min(number, usable.shape[1]))
        values = best.values.clamp(min=LEAST_LOGPROB).tolist()
        return [
            TokenLogprob(token_id, logprob, tuple(zip(likeliest, theirs, strict=True)))
            for token_id, logprob, likeliest, theirs in zip(
                ids.tolist(), own, best.indices.tolist(), values, strict=True
            )
        ]


def _edit(logits: Float[Tensor, "vocab"], sequence: Sequence) -> None:
    """Apply to one row what depends on its text: bias, penalties, grammar."""
    request = sequence.job.request
    if request.logit_bias:
        ids = torch.tensor(list(request.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(request.logit_bias.values())).to(logits)
    if request.repetition_penalty != 1.0:
        ids = torch.tensor(list(sequence.seen), device=logits.device)
        ids = ids[ids < len(logits)]
        seen = torch.ones(1, len(ids), dtype=torch.bool, device=logits.device)
        logits[ids] = RepetitionPenalty(request.repetition_penalty)(logits[ids][None], seen)[0]
    if sequence.counts and (request.presence_penalty or request.frequency_penalty):
        ids = torch.tensor(list(sequence.counts), device=logits.device)
        counts = torch.tensor(list(sequence.counts.values())).to(logits)
        logits[ids] -= request.presence_penalty + request.frequency_penalty * counts
    if sequence.matcher is not None:
        allowed = sequence.matcher.allowed().to(logits.device)
        if not bool(allowed.any()):
            raise ConfigError("the grammar cannot be followed: no id of the vocabulary may follow")
        logits.masked_fill_(~allowed, torch.finfo(logits.dtype).min)


def _draw(logits: Tensor, rows: Rows[Sequence], kind: tuple[bool, bool, bool]) -> Tensor:
    requests = [row.job.request for row in rows]

    def column(numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=logits.dtype, device=logits.device)[:, None]

    has_top_k, has_top_p, has_min_p = kind
    rules: list[Rule] = [Temperature(column([request.temperature for request in requests]))]
    if has_top_k:
        rules.append(TopK(torch.tensor([request.top_k for request in requests])))
    if has_top_p:
        rules.append(TopP(column([request.top_p for request in requests])))
    if has_min_p:
        rules.append(MinP(column([request.min_p for request in requests])))
    unseen = torch.zeros(1, 1, dtype=torch.bool, device=logits.device).expand_as(logits)
    for rule in rules:
        logits = rule(logits, unseen)
    numbers = torch.tensor([row.uniform() for row in rows], dtype=torch.float64)
    return draw(logits, numbers)
