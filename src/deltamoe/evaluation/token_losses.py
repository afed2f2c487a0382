"""One number a token: how surprised the model was by it.

Everything this folder reports about a text is arithmetic on these numbers. Two ways to read:
``window_losses`` as in training (fixed windows, each from zeros), ``streamed_losses`` as in use
(each document from its first token to its last, the state carried along).

A text is a stream of tokens in which each document begins with the document border. The border
itself is never scored: it has no bytes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from deltamoe.inference.text_state import evaluating
from deltamoe.model import HybridLM

__all__ = ["Progress", "ScoredTokens", "streamed_losses", "window_losses"]

Progress = Callable[[int], None]

_LOGITS_AT_ONCE = 2**24  # numbers; bounds the head's memory whatever the vocabulary


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredTokens:
    """A text and what each of its tokens cost.

    Attributes:
        token_ids: the text, int64 [num_tokens].
        losses: minus log-probability of each token given those before it, in nats, fp32
            [num_tokens]; NaN where nothing was predicted.
        segment_starts: the tokens at which the model began from zeros, ascending, the first 0.
    """

    token_ids: NDArray[np.int64]
    losses: NDArray[np.float32]
    segment_starts: NDArray[np.int64]

    @property
    def is_scored(self) -> NDArray[np.bool_]:
        """Which tokens were predicted."""
        return ~np.isnan(self.losses)

    @property
    def segments(self) -> NDArray[np.int64]:
        """For each token, the segment whose tokens it was predicted from."""
        before = np.maximum(np.arange(len(self.token_ids)) - 1, 0)
        return np.searchsorted(self.segment_starts, before, side="right") - 1

    @property
    def num_visible(self) -> NDArray[np.int64]:
        """For each token, how many tokens it was predicted from."""
        return np.arange(len(self.token_ids)) - self.segment_starts[self.segments]


def window_losses(
    model: HybridLM,
    token_ids: NDArray[np.int64],
    document_starts: NDArray[np.int64],
    *,
    context: int,
    rows: int = 8,
    progress: Progress | None = None,
) -> ScoredTokens:
    """Score a text in windows of ``context`` tokens; memory is empty at window and document starts.

    Args:
        model: a trained model.
        token_ids: the stream; each document begins with the border.
        document_starts: where the borders stand, ascending, the first 0.
        context: tokens of one window. The token after a window is predicted from it, so every
            token but the borders is scored once.
        rows: windows in one forward pass.
        progress: is told after each forward pass how many tokens are done.
    """
    losses = np.full(len(token_ids), np.nan, dtype=np.float32)
    windows = np.arange(0, len(token_ids), context)
    starts = np.union1d(windows, document_starts).astype(np.int64)
    device = next(model.parameters()).device
    with evaluating(model):
        for start in range(0, len(token_ids) - 1, rows * context):
            stop = min(start + rows * context, len(token_ids) - 1)
            ids = torch.from_numpy(token_ids[start : stop + 1]).to(device)
            inside = starts[(starts >= start) & (starts < stop)]
            borders = torch.from_numpy(np.append(inside, stop) - start).to(device)
            hidden = model.hidden(ids[None, :-1], cu_seqlens=borders).hidden[0]
            losses[start + 1 : stop + 1] = _losses(model, hidden, ids[1:])
            if progress:
                progress(stop + 1)
    losses[document_starts] = np.nan
    return ScoredTokens(token_ids=token_ids, losses=losses, segment_starts=starts)


def streamed_losses(
    model: HybridLM,
    token_ids: NDArray[np.int64],
    document_starts: NDArray[np.int64],
    *,
    chunk: int,
    rows: int = 8,
    progress: Progress | None = None,
) -> ScoredTokens:
    """Score each document as one long text, ``chunk`` tokens at a time with the state carried on.

    Documents of similar length share a forward pass, ``rows`` of them. Arguments as for
    ``window_losses``; ``chunk`` changes speed and memory only.
    """
    losses = np.full(len(token_ids), np.nan, dtype=np.float32)
    ends = np.append(document_starts[1:], len(token_ids))
    num_done = 0
    by_length = np.argsort(ends - document_starts, kind="stable")
    with evaluating(model):
        for at in range(0, len(by_length), rows):
            group = by_length[at : at + rows]
            spans = list(zip(document_starts[group], ends[group], strict=True))
            for start, piece in _stream_group(model, token_ids, spans, chunk):
                losses[start : start + len(piece)] = piece
            num_done += int((ends - document_starts)[group].sum())
            if progress:
                progress(num_done)
    return ScoredTokens(token_ids=token_ids, losses=losses, segment_starts=document_starts)


def _stream_group(
    model: HybridLM,
    token_ids: NDArray[np.int64],
    spans: list[tuple[np.int64, np.int64]],
    chunk: int,
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (token, losses from it on) of documents read side by side."""
    device = next(model.parameters()).device
    state = model.initial_state(len(spans))
    # A document of n tokens is n - 1 predictions.
    for offset in range(0, max(int(stop - start) - 1 for start, stop in spans), chunk):
        is_longer = [stop - start - 1 > offset for start, stop in spans]
        if not all(is_longer):
            staying = [row for row, longer in enumerate(is_longer) if longer]
            state = state.select(torch.tensor(staying, device=device))
            spans = [spans[row] for row in staying]
        pieces = [token_ids[start + offset : stop][: chunk + 1] for start, stop in spans]
        lengths = torch.tensor([len(piece) - 1 for piece in pieces], device=device)
        padded = torch.zeros(len(pieces), int(lengths.max()) + 1, dtype=torch.int64)
        for row, piece in enumerate(pieces):
            padded[row, : len(piece)] = torch.from_numpy(piece)
        padded = padded.to(device)
        hidden, after, _ = model.hidden(padded[:, :-1], state, lengths=lengths)
        assert after is not None, "only packed sequences leave no state"
        state = after
        for row, (start, _) in enumerate(spans):
            length = int(lengths[row])
            yield (
                int(start) + offset + 1,
                _losses(model, hidden[row, :length], padded[row, 1 : length + 1]),
            )


def _losses(model: HybridLM, hidden: Tensor, targets: Tensor) -> NDArray[np.float32]:
    """Cross-entropy of each target [N] under the hidden vectors [N, D], in nats."""
    at_once = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    parts = [
        cross_entropy(model.logits(some), wanted, reduction="none")
        for some, wanted in zip(hidden.split(at_once), targets.split(at_once), strict=True)
    ]
    losses: NDArray[np.float32] = torch.cat(parts).float().cpu().numpy()
    return losses
