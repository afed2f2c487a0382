"""A model at work for the page: it records, branches, ablates and chats. Needs torch.

One piece of work at a time: a recording looks at every forward pass of the model, and an ablation
changes them, so nothing else may run meanwhile. The application calls these methods from its one
worker thread.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from deltamoe.config.parse import to_dict
from deltamoe.engine import Engine, EngineOptions, Request
from deltamoe.errors import ConfigError
from deltamoe.explorer.ablate import SwitchedOff, ablate
from deltamoe.explorer.format import Trace
from deltamoe.explorer.meters import meters
from deltamoe.explorer.record import Capture, Event, trace
from deltamoe.explorer.requests import AblateRequest, BranchRequest, ChatRequest, TraceRequest
from deltamoe.inference import OpenedModel
from deltamoe.tokenizer import Message

__all__ = ["Live"]

_MOST_CHAT_TOKENS = 4096
_CHAT = {"temperature": 0.8}

Tell = Callable[[Event], None]


class Live:
    """An opened model behind the page.

    Args:
        opened: the model, with what belongs to it.
        name: what the page calls it.
        prompt_tokens: longest text that is recorded, prompt and continuation.
    """

    def __init__(self, opened: OpenedModel, *, name: str, prompt_tokens: int = 512) -> None:
        self._opened = opened
        self.prompt_tokens = Capture(most_tokens=prompt_tokens).most_tokens
        self.source = {"name": name, "label": opened.label}
        self.chat_form = "text" if opened.chat_template is None else "turns"
        # it keeps the states of conversations, so that what was said is not read again
        options = EngineOptions(max_sequences=1)
        self._engine = Engine(opened.model, opened.tokenizer, options)
        self.context = self._engine.stats().size.context

    def model(self) -> dict[str, Any]:
        """The answer to ``GET /api/model``."""
        model, tokenizer = self._opened.model, self._opened.tokenizer
        context = self._opened.config.data.context
        return {
            "config": to_dict(model.config),
            "source": self.source,
            "tokenizer": {
                "name": tokenizer.name,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "end_id": tokenizer.end_id,
            },
            **meters(model, context=context),
        }

    def trace(self, request: TraceRequest, tell: Tell) -> Trace:
        """Record a prompt."""
        if (request.prompt is None) == (request.messages is None):
            raise ConfigError("the request: give prompt or messages, one of the two")
        prompt: str | list[int] = request.prompt or ""
        if request.messages is not None:
            prompt = self._turns(request.messages)
        return self._record(request, prompt, self.source, tell)

    def branch(self, request: BranchRequest, origin: Trace, tell: Tell) -> Trace:
        """Record what would have come if another token had."""
        if not 0 <= request.token < origin.num_tokens:
            raise ConfigError(
                f"token = {request.token}: the trace has {origin.num_tokens}, counted from 0"
            )
        vocab_size = self._opened.tokenizer.vocab_size
        if not 0 <= request.id < vocab_size or request.id in self._opened.tokenizer.unused_ids:
            raise ConfigError(f"id = {request.id}: no token of this vocabulary of {vocab_size:,}")
        ids = origin.arrays["tokens.ids"][: request.token + 1].tolist()
        came_from = {"trace": request.trace, "token": request.token, "id": request.id}
        source = {**self.source, "branched_from": came_from}
        return self._record(request, [*ids, request.id], source, tell)

    def ablate(self, request: AblateRequest, origin: Trace) -> dict[str, Any]:
        """Read a trace's text with and without some parts."""
        off = SwitchedOff(
            layers=request.layers,
            heads=request.heads,
            experts=request.experts,
            experts_are=request.experts_are,
        )
        ids = origin.arrays["tokens.ids"].tolist()
        return ablate(self._opened.model, self._opened.tokenizer, ids, off)

    def chat(self, request: ChatRequest, tell: Tell) -> dict[str, Any]:
        """Answer a conversation, piece by piece; returns what the last event says."""
        ids = self._conversation(request)
        if not 0 <= request.max_tokens <= _MOST_CHAT_TOKENS:
            raise ConfigError(
                f"max_tokens = {request.max_tokens}: expected 0 to {_MOST_CHAT_TOKENS:,}"
            )
        ticket = self._engine.submit(
            Request(
                prompt=tuple(ids), max_tokens=request.max_tokens, **{**_CHAT, **request.sampling}
            )
        )
        written, begin = 0, 0.0
        rate = 0.0
        try:
            read = {"num_prompt_tokens": len(ids), "context": self.context}
            tell({"event": "start", **read, "phase": "reading"})
            for piece in ticket.pieces():
                begin = begin or time.perf_counter()
                written += len(piece.ids)
                rate = (written - 1) / max(time.perf_counter() - begin, 1e-9)
                count = {"num_tokens": written, "tokens_per_s": rate}
                tell({"event": "piece", "text": piece.text, **count, "phase": "writing"})
        finally:
            ticket.cancel()  # whoever listened may have gone
            result = ticket.result()
        return {
            "finish_reason": result.choices[0].finish_reason,
            "num_tokens": written,
            "num_prompt_tokens": len(ids),
            "num_cached_tokens": result.num_cached_tokens,
            "tokens_per_s": rate,
        }

    def close(self) -> None:
        """End the engine's thread."""
        self._engine.close(grace_s=0.0)

    def _conversation(self, request: ChatRequest) -> list[int]:
        if self._opened.chat_template is not None:
            if request.text is not None or request.messages is None:
                raise ConfigError("give messages: this model talks in turns")
            return self._turns(request.messages)
        if request.text is None or request.messages is not None:
            raise ConfigError("give text, all of it so far: this model knows no turns")
        tokenizer = self._opened.tokenizer
        return [tokenizer.end_id, *tokenizer.encode(request.text)]

    def _turns(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        if (template := self._opened.chat_template) is None:
            raise ConfigError("messages: this model knows no turns; give text")
        if not messages:
            raise ConfigError("messages: expected at least one")
        turns = [Message(role, content) for role, content in messages]  # type: ignore[arg-type]
        return template.encode(self._opened.tokenizer, turns)

    def _record(
        self,
        request: TraceRequest | BranchRequest,
        prompt: str | list[int],
        source: dict[str, Any],
        tell: Tell,
    ) -> Trace:
        return trace(
            self._opened.model,
            self._opened.tokenizer,
            prompt,
            max_new_tokens=request.max_new_tokens,
            capture=Capture(layers=request.layers, most_tokens=self.prompt_tokens),
            source=source,
            on_event=tell,
            **request.sampling,
        )
