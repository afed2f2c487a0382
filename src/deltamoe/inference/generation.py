"""Prefill, then decode: from prompts to their continuations.

Prefill reads all tokens of a prompt but the last. Each decode step reads the last token of every
row and draws the next one, so the first step and the hundredth are the same step. Rows are decoded
together, finished ones leave the batch, and no row's text depends on its neighbours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Unpack, overload

import torch
from torch import Tensor

from deltamoe.errors import ConfigError
from deltamoe.inference.answer import Answer, FinishReason
from deltamoe.inference.sampler import Sampler, SamplingOptions
from deltamoe.inference.text_state import PREFILL_CHUNK, TextState, evaluating, read
from deltamoe.model import HybridLM, ModelState, token_reader
from deltamoe.tokenizer import Tokenizer, check_fit

__all__ = ["Decoding", "Generation", "GenerationOptions", "generate", "stream"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One prompt's continuation.

    Attributes:
        prompt: the text that was continued.
        text: the continuation, up to the stop string if one came.
        ids: the ids drawn, in order, without the stop id that ended them.
        finish_reason: "stop" (a stop string), "length" (``max_tokens``) or "end" (of the document,
            or of the turn).
        state: prompt and continuation as a ``TextState``; hand it to ``generate`` to write on.
    """

    prompt: str
    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    state: TextState = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, str | list[int]]:
        """All but the state, as plain data."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "ids": list(self.ids),
            "finish_reason": self.finish_reason,
        }


class GenerationOptions(SamplingOptions, total=False):
    """The keyword arguments of ``Decoding``, for functions that hand them on."""

    max_tokens: int
    stop: Sequence[str]
    state: TextState | None
    prefill_chunk: int


class Decoding:
    """Prompts on their way to their continuations; ``step`` moves each on by one token.

    Args:
        model: a trained model; its training mode is left as it was.
        tokenizer: the one it was trained with.
        prompts: texts to continue, at least one; an empty one starts a new document.
        max_tokens: most tokens drawn a row; 0 only reads the prompts.
        stop: strings that end a row; they and what follows are not part of its text.
        state: the text the prompts continue, the same for all; None begins a new document each.
        prefill_chunk: prompt tokens of a row read in one forward pass.
        sampling: how tokens are chosen, see ``Sampler``. Its repetition penalty sees the prompt
            and what is drawn, not the text behind ``state``.

    Raises:
        ConfigError: a value out of range, or a tokenizer larger than the model's vocabulary.
    """

    def __init__(
        self,
        model: HybridLM,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        *,
        max_tokens: int = 200,
        stop: Sequence[str] = (),
        state: TextState | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        **sampling: Unpack[SamplingOptions],
    ) -> None:
        if max_tokens < 0:
            raise ConfigError(f"max_tokens = {max_tokens}: expected a whole number >= 0")
        if prefill_chunk < 1:
            raise ConfigError(f"prefill_chunk = {prefill_chunk}: expected a whole number >= 1")
        check_fit(tokenizer, model.config.vocab_size)
        encoded = tokenizer.encode_batch(list(prompts))
        self.prompts = list(prompts)
        self.answers = [Answer(tokenizer, max_tokens=max_tokens, stop=stop) for _ in prompts]
        self._model = model
        self._read = token_reader(model)
        self._vocab_size = tokenizer.vocab_size
        self._sampler = Sampler(**sampling)
        self._generators = [self._sampler.generator(prompt) for prompt in prompts]
        self._rows = list(range(len(prompts)))  # the prompts still in the batch, in its order
        self._text_states: dict[int, TextState] = {}  # where the others ended

        so_far = TextState.start(tokenizer) if state is None else state
        unread = [[*so_far.unread, *ids] for ids in encoded]
        if not all(unread):
            raise ConfigError("the text has been read to its end: give a prompt to continue it")
        before = None if so_far.state is None else _select(so_far.state, [0] * len(prompts))
        all_but_last = [ids[:-1] for ids in unread]
        self._state = read(model, all_but_last, before, prefill_chunk=prefill_chunk)
        device = self._state.lengths.device
        self._last = torch.tensor([ids[-1] for ids in unread], device=device)
        self._seen = torch.zeros(len(prompts), self._vocab_size, dtype=torch.bool, device=device)
        for row, ids in enumerate(encoded):
            self._seen[row, ids] = True
        self._unused = torch.tensor(tokenizer.unused_ids, dtype=torch.int64, device=device)
        self._drop_finished(self._state, self._last)

    @property
    def is_running(self) -> bool:
        """Whether a row is not finished."""
        return bool(self._rows)

    def step(self) -> list[tuple[int, str]]:
        """Read one token in every unfinished row and draw the next.

        Returns:
            (index of the prompt, text that became certain) for each row that took part.

        Raises:
            NonFiniteError: the model's logits are not finite.
        """
        with evaluating(self._model):
            logits, state = self._read(self._last, self._state)
            # Rows of the embedding that pad the vocabulary mean nothing and cannot be chosen, nor
            # can the tokenizer's ids without a meaning. (A logit of -inf would count as damage.)
            logits = logits[:, : self._vocab_size]
            logits = logits.index_fill(1, self._unused, torch.finfo(logits.dtype).min)
            drawn = self._sampler.sample(logits, self._seen, self._generators)
            pieces = [
                (row, self.answers[row].push(token_id))
                for row, token_id in zip(self._rows, drawn.tolist(), strict=True)
            ]
            self._seen.scatter_(1, drawn[:, None], True)
            self._drop_finished(state, drawn)
        return pieces

    def pieces(self) -> Iterator[str]:
        """The text of a single prompt, piece by piece, until it is finished."""
        while self.is_running:
            [(_, piece)] = self.step()
            if piece:
                yield piece

    def generation(self, row: int) -> Generation:
        """The continuation of one prompt as it stands; an unfinished one counts as cut short."""
        answer = self.answers[row]
        return Generation(
            prompt=self.prompts[row],
            text=answer.text,
            ids=tuple(answer.ids),
            finish_reason=answer.finish_reason or "length",
            state=self._text_states.get(row) or self._text_state(self._state, self._last, row),
        )

    def _text_state(self, state: ModelState, last: Tensor, row: int) -> TextState:
        at = self._rows.index(row)
        return TextState(_select(state, [at]), (int(last[at]),))

    def _drop_finished(self, state: ModelState, last: Tensor) -> None:
        """Go on from ``state`` and ``last`` with the rows that are not finished."""
        for row in self._rows:
            match self.answers[row].finish_reason:
                case "end":  # a stop id is no part of the text: its state is the one before
                    self._text_states[row] = self._text_state(self._state, self._last, row)
                case "stop" | "length":
                    self._text_states[row] = self._text_state(state, last, row)
        staying = [at for at, row in enumerate(self._rows) if row not in self._text_states]
        if len(staying) < len(self._rows):
            state, last, self._seen = _select(state, staying), last[staying], self._seen[staying]
            self._rows = [self._rows[at] for at in staying]
            self._generators = [self._generators[at] for at in staying]
        self._state, self._last = state, last


def _select(state: ModelState, rows: list[int]) -> ModelState:
    return state.select(torch.tensor(rows, dtype=torch.int64, device=state.lengths.device))


@overload
def generate(
    model: HybridLM, tokenizer: Tokenizer, prompt: str, **options: Unpack[GenerationOptions]
) -> Generation: ...
@overload
def generate(
    model: HybridLM, tokenizer: Tokenizer, prompt: list[str], **options: Unpack[GenerationOptions]
) -> list[Generation]: ...
def generate(
    model: HybridLM,
    tokenizer: Tokenizer,
    prompt: str | list[str],
    **options: Unpack[GenerationOptions],
) -> Generation | list[Generation]:
    """Continue one prompt, or several together.

    Args:
        model: a trained model.
        tokenizer: the one it was trained with.
        prompt: a text, or a list of texts; each is continued as if it were alone.
        options: max_tokens, stop, state and prefill_chunk as for ``Decoding``; temperature,
            top_k, top_p, min_p, repetition_penalty and seed as for ``Sampler``.

    Returns:
        A ``Generation``, or a list of them in the order of the prompts.

    Raises:
        ConfigError: a value out of range.
        NonFiniteError: the model's logits are not finite.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not prompts:
        return []
    decoding = Decoding(model, tokenizer, prompts, **options)
    while decoding.is_running:
        decoding.step()
    generations = [decoding.generation(row) for row in range(len(prompts))]
    return generations[0] if isinstance(prompt, str) else generations


def stream(
    model: HybridLM, tokenizer: Tokenizer, prompt: str, **options: Unpack[GenerationOptions]
) -> Iterator[str]:
    """Continue one prompt; the same text as ``generate``, in pieces as they become certain.

    A piece never breaks a character and never holds part of a stop string. Arguments and errors
    are those of ``generate``; errors in the arguments are raised at once.
    """
    return Decoding(model, tokenizer, [prompt], **options).pieces()
