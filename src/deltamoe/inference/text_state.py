"""A text in progress: what the model carries of it, and what it has still to read.

Knows nothing of sampling. The state of a text is a few numbers a layer for KDA and a latent a token
for MLA, so it can be kept, forked, and put into a file.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from deltamoe.checkpoint import load_state, save_state
from deltamoe.model import HybridLM, ModelState
from deltamoe.tokenizer import Tokenizer

__all__ = ["TextState", "evaluating", "load_text_state", "read", "save_text_state"]

PREFILL_CHUNK = 2048


class TextState(NamedTuple):
    """A text as far as it has come, ready to be written on.

    Attributes:
        state: what the model carries of the tokens it has read; one row. None before the first.
        unread: what comes after them: as a rule the last token, nothing if it has been read too.
    """

    state: ModelState | None
    unread: tuple[int, ...]

    @classmethod
    def start(cls, tokenizer: Tokenizer) -> "TextState":
        """An empty text: nothing was read, and the document border comes next."""
        return cls(None, (tokenizer.end_id,))

    @property
    def num_tokens(self) -> int:
        """Tokens of the text, the document border at its start included."""
        return len(self.unread) + (0 if self.state is None else int(self.state.lengths))

    @property
    def nbytes(self) -> int:
        """Bytes the model carries for this text."""
        return 0 if self.state is None else self.state.nbytes


@contextmanager
def evaluating(model: HybridLM) -> Iterator[None]:
    """Evaluation mode and no gradients for the time of the block; training mode returns after."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if was_training:
            model.train()


def read(
    model: HybridLM,
    token_ids: Sequence[Sequence[int]],
    state: ModelState | None = None,
    *,
    prefill_chunk: int = PREFILL_CHUNK,
) -> ModelState:
    """Read tokens, ``prefill_chunk`` at a time so that memory stays bounded.

    Args:
        model: the reader.
        token_ids: one sequence of ids a row; rows may differ in length or be empty.
        state: where the rows stand; None starts from zeros.
        prefill_chunk: tokens of a row in one forward pass; changes speed and memory only.

    Returns:
        The state after the last token of each row.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor([len(row) for row in token_ids], device=device)
    longest = max(map(len, token_ids))
    padded = torch.tensor(
        [[*row, *[0] * (longest - len(row))] for row in token_ids], dtype=torch.int64, device=device
    )
    with evaluating(model):
        state = model.initial_state(len(token_ids)) if state is None else state
        for start in range(0, longest, prefill_chunk):
            ids = padded[:, start : start + prefill_chunk]
            remaining = (lengths - start).clamp(0, ids.shape[1])
            state = model.hidden(ids, state, lengths=remaining).state
            assert state is not None, "only packed sequences leave no state"
    return state


def save_text_state(
    path: Path | str, text: TextState, model: HybridLM, *, weights_sha256: str = ""
) -> None:
    """Write a text's state to a file, read to its last token.

    Args:
        path: where.
        text: what to keep.
        model: the model that read it.
        weights_sha256: ``Checkpoint.weights_sha256`` of that model, if known.

    Raises:
        CheckpointError, DoesNotFitError: the disk refused.
    """
    state = read(model, [text.unread], text.state)
    save_state(path, state, config=model.config, weights_sha256=weights_sha256)


def load_text_state(path: Path | str, model: HybridLM, *, weights_sha256: str = "") -> TextState:
    """Read what ``save_text_state`` wrote; what follows must begin with a prompt.

    Raises:
        CheckpointError: no such file, damaged, or of another model.
    """
    device = next(model.parameters()).device
    state = load_state(path, config=model.config, weights_sha256=weights_sha256, device=device)
    return TextState(state, ())
