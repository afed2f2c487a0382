"""A conversation: with a base model one text that both sides write on, with another turns.

The session holds the state, so what was said is never read twice.
"""

import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from deltamoe.inference.generation import Decoding, Generation
from deltamoe.inference.sampler import SamplingOptions
from deltamoe.inference.text_state import TextState, load_text_state, save_text_state
from deltamoe.model import HybridLM
from deltamoe.tokenizer import ChatTemplate, Message, Tokenizer

__all__ = ["Session"]


class Session:
    """One text in progress.

    Args:
        model: a trained model.
        tokenizer: the one it was trained with.
        weights_sha256: ``Checkpoint.weights_sha256``; lets a saved state refuse other weights.
        chat_template: the form of the turns; None for a base model, which knows none.
        system: what the system says before the first turn; "" leaves that to the template.

    Attributes:
        text: the state behind all that was said.
        answer: the last answer, finished or not; None before the first.
        tokens_per_second: decoding speed of the last answer, prefill left out; 0 before it.
    """

    def __init__(
        self,
        model: HybridLM,
        tokenizer: Tokenizer,
        *,
        weights_sha256: str = "",
        chat_template: ChatTemplate | None = None,
        system: str = "",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.weights_sha256 = weights_sha256
        self.chat_template = chat_template
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Forget everything and start an empty text."""
        has_turns = self.chat_template is not None
        self.text = TextState(None, ()) if has_turns else TextState.start(self.tokenizer)
        self.answer: Generation | None = None
        self.tokens_per_second = 0.0

    def stream(
        self,
        prompt: str,
        *,
        max_tokens: int = 200,
        stop: tuple[str, ...] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> Generator[str, None, None]:
        """Put ``prompt`` behind the text and yield the answer in pieces.

        Where there are turns, the prompt is the user's turn and the answer the assistant's; an
        empty prompt lets the assistant go on.

        The session goes on from wherever the answer was left, also if it is left half-way (the
        iterator is closed, or a signal interrupts it). Arguments and errors as for ``generate``.
        """
        text = self.text
        if self.chat_template is not None and (prompt or not text.num_tokens):
            text = TextState(text.state, (*text.unread, *self._turn(self.chat_template, prompt)))
            prompt = ""
        decoding = Decoding(
            self.model,
            self.tokenizer,
            [prompt],
            max_tokens=max_tokens,
            stop=stop,
            state=text,
            **sampling,
        )
        begin = time.perf_counter()
        try:
            yield from decoding.pieces()
        finally:
            self.answer = decoding.generation(0)
            self.text = self.answer.state
            seconds = time.perf_counter() - begin
            self.tokens_per_second = len(self.answer.ids) / seconds if seconds else 0.0

    def _turn(self, template: ChatTemplate, prompt: str) -> list[int]:
        """The end of the turn before, the user's turn, and the beginning of the answer."""
        messages = [Message("user", prompt)]
        if self.text.num_tokens:
            later = replace(template, default_system="")
            return [template.end_id(self.tokenizer), *later.encode(self.tokenizer, messages)]
        if self.system:
            messages.insert(0, Message("system", self.system))
        return template.encode(self.tokenizer, messages)

    def save(self, path: Path | str) -> None:
        """Keep the text's state in a file."""
        save_text_state(path, self.text, self.model, weights_sha256=self.weights_sha256)

    def load(self, path: Path | str) -> None:
        """Go on from a file that ``save`` wrote, in place of the present text."""
        text = load_text_state(path, self.model, weights_sha256=self.weights_sha256)
        self.reset()
        self.text = text
