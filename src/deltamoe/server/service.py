"""What every endpoint needs: the engine, the text's tokenizer, and whom it answers.

One ``Service`` lives as long as its app. Knows nothing of any one endpoint.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, TypeVar

from fastapi import Request

from deltamoe.engine import Engine, QueueFullError
from deltamoe.inference import TextState
from deltamoe.server.errors import ApiError
from deltamoe.server.metrics import Metrics
from deltamoe.server.pace import Pace
from deltamoe.server.protocol import SamplingFields, Turn
from deltamoe.server.settings import MAX_ANSWER_TOKENS, MAX_LISTED_LOGPROBS, Settings
from deltamoe.server.shelf import StateShelf
from deltamoe.tokenizer import ChatTemplate, Message, StreamDecoder, Tokenizer, ToolCall

__all__ = ["Service", "TokenNames", "aside", "key_scope", "scope_of", "service_of"]

_SCOPE = "deltamoe.scope"
_BODY_BYTES = "deltamoe.body_bytes"
_SHORT_BODY = 4096  # bytes; tokenized in less time than a thread takes to be woken

Given = ParamSpec("Given")
Made = TypeVar("Made")


@dataclass
class Service:
    """The engine and what is said about it.

    Attributes:
        engine: runs the requests.
        tokenizer: the model's.
        chat_template: the form of its turns; None for a base model.
        settings: what its owner chose.
        metrics: what it counts.
        states: kept texts.
        names: how ids are shown.
        created: when the server began, seconds since 1970.
        is_draining: whether the process was told to end.
        num_requests: HTTP requests being answered.
        pace: how often the streams send.
        compiler: the thread grammars are compiled in, one after the other.
        num_compiling: requests that wait for it.
    """

    engine: Engine
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    settings: Settings
    metrics: Metrics
    states: StateShelf
    names: "TokenNames" = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    num_requests: int = 0
    pace: Pace = field(default_factory=Pace)
    compiler: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "grammar"))
    num_compiling: int = 0

    def __post_init__(self) -> None:
        self.names = TokenNames(self.tokenizer)

    @property
    def context(self) -> int:
        """Tokens that a text may reach."""
        return self.engine.context

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model; "" and none mean the one there is.

        Raises:
            ApiError: 404.
        """
        if name and name != self.settings.model_id:
            raise ApiError(
                404,
                f"no model {name!r} here; this server has {self.settings.model_id!r}",
                code="model_not_found",
                param="model",
            )

    def document(self, text: str, *, is_begun: bool = False) -> tuple[int, ...]:
        """The ids of a text: after the border, unless it goes on from what has been read."""
        [ids] = self.tokenizer.encode_batch([text])  # leaves the interpreter to others meanwhile
        return tuple(ids if is_begun else [self.tokenizer.end_id, *ids])

    def documents(
        self, prompt: str | Sequence[Any], *, is_begun: bool = False
    ) -> list[tuple[int, ...]]:
        """The ids of each prompt of a request; ids are taken as they are.

        Raises:
            ApiError: 400, an id that is not in the vocabulary, or nothing to read.
        """
        if isinstance(prompt, str):
            given: list[Any] = [prompt]
        elif isinstance(prompt[0], int):
            given = [prompt]
        else:
            given = list(prompt)
        documents = []
        for item in given:
            if isinstance(item, str):
                ids = self.document(item, is_begun=is_begun)
            else:
                ids = tuple(item)
                self.check_ids(ids)
            if not ids:
                raise ApiError(400, "an empty prompt: there is nothing to go on", param="prompt")
            documents.append(ids)
        return documents

    def check_ids(self, ids: Iterable[int]) -> None:
        """Refuse ids that stand for nothing.

        Raises:
            ApiError: 400.
        """
        for token_id in ids:
            if not self.names.is_known(token_id):
                raise ApiError(
                    400,
                    f"token id {token_id} is not in this vocabulary of {self.tokenizer.vocab_size}",
                    param="prompt",
                )

    def conversation(
        self,
        turns: Sequence[Turn],
        *,
        tools: Sequence[dict[str, Any]] = (),
        is_begun: bool = False,
        is_answered: bool = True,
    ) -> tuple[int, ...]:
        """The ids of a conversation.

        A base model knows no turns: it reads what was said as one text, each turn on a new line,
        and goes on writing it. ``deltamoe chat`` does the same.

        Args:
            turns: in order.
            tools: declarations.
            is_begun: the turns go on from what has been read.
            is_answered: open the assistant's turn.

        Raises:
            ApiError: 400, tools for a base model.
        """
        if self.chat_template is None:
            if tools or any(turn.tool_calls or turn.role == "tool" for turn in turns):
                raise ApiError(
                    400,
                    f"{self.settings.model_id} is a base model without a chat template: "
                    "it cannot call tools",
                    param="tools",
                )
            text = "\n" if is_begun else ""
            for turn in turns:
                text += turn.text if not text or text.endswith("\n") else "\n" + turn.text
            return self.document(text, is_begun=is_begun)
        template = self.chat_template
        messages = [_message(turn) for turn in turns]
        if is_begun:
            template = replace(template, default_system="")
        return tuple(
            template.encode(self.tokenizer, messages, tools=tools, is_answered=is_answered)
        )

    def prefix_scope(self, request: Request) -> str:
        """Whose beginnings a request may make use of: its key's, or everybody's if all share."""
        return "" if self.settings.shares_prefixes else scope_of(request)

    def kept(self, request: Request, state_id: str | None) -> TextState | None:
        """The text a request goes on from.

        Raises:
            ApiError: 404, nothing is kept under this id for this key.
        """
        if state_id is None:
            return None
        return self.states.find(scope_of(request), state_id).state

    def max_tokens(self, asked: int | None, num_read: int) -> int:
        """Most tokens a choice may have; what there is room for if the request does not say.

        Args:
            asked: by the request.
            num_read: tokens of the text it goes on from.

        Raises:
            ApiError: 400, more than the server allows.
        """
        most = self.settings.max_tokens
        if asked is None:
            return max(min(most, self.context - num_read), 1)
        if asked > most:
            raise ApiError(
                400, f"max_tokens = {asked}: this server allows {most}", param="max_tokens"
            )
        return asked

    def check_extent(self, max_tokens: int, num_choices: int, num_read: int, top: int) -> None:
        """Refuse what is allowed number by number, but not their product.

        Args:
            max_tokens: of each choice.
            num_choices: of all prompts together.
            num_read: prompt tokens whose logprobs are listed.
            top: logprobs listed a token; 0 for none.

        Raises:
            ApiError: 400.
        """
        written = max_tokens * num_choices
        if written > MAX_ANSWER_TOKENS:
            raise ApiError(
                400,
                f"{num_choices} choices of {max_tokens} tokens: one request may ask for "
                f"{MAX_ANSWER_TOKENS} in all",
                param="max_tokens",
            )
        if (written + num_read) * top > MAX_LISTED_LOGPROBS:
            raise ApiError(
                400,
                f"{top} logprobs for each of {written + num_read} tokens: one answer lists "
                f"{MAX_LISTED_LOGPROBS} at most",
                param="logprobs",
            )

    def check_room(self) -> None:
        """Refuse a request that would wait behind too many others, before work is done for it.

        Raises:
            QueueFullError: ``max_waiting`` requests wait already, for the engine or for a grammar.
        """
        stats, most = self.engine.stats(), self.engine.options.max_waiting
        num_free = max(stats.size.num_slots - stats.num_running, 0)
        if stats.num_waiting + self.num_compiling >= most + num_free:
            raise QueueFullError(f"{most} requests wait already; try again in a moment")

    def sampling(self, body: SamplingFields) -> dict[str, Any]:
        """The fields of an engine's request that say how tokens are chosen and where they end."""
        bias = body.logit_bias or {}
        if any(not name.isdecimal() or len(name) > 9 for name in bias):
            raise ApiError(400, "logit_bias: expected token ids as keys", param="logit_bias")
        biases = {int(name): value for name, value in bias.items()}
        self.check_ids(biases)
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        return {
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "top_k": max(body.top_k or 0, 0),
            "min_p": body.min_p or 0.0,
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "repetition_penalty": body.repetition_penalty or 1.0,
            "logit_bias": biases,
            "seed": None if body.seed is None else body.seed % 2**63,
            "n": body.n or 1,
            "stop": tuple(stop),
            "stop_ids": tuple(body.stop_token_ids or ()),
            "ignore_end": body.ignore_eos,
            "reuse": body.reuse,
        }


class TokenNames:
    """How a single token is shown: its text; of one that is no whole character, its bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {token_id: name for name, token_id in tokenizer.special_ids.items()}
        self._unused = frozenset(tokenizer.unused_ids)
        self._names: dict[int, str] = {}

    def is_known(self, token_id: int) -> bool:
        """Whether an id stands for something."""
        return 0 <= token_id < self._tokenizer.vocab_size and token_id not in self._unused

    def name(self, token_id: int) -> str:
        r"""Different for different tokens: "the", "<|end|>", "bytes:\xe2\x80"."""
        name = self._names.get(token_id)
        if name is None:
            name = self._names[token_id] = self._spelled(token_id)
        return name

    def raw(self, token_id: int) -> bytes:
        """The bytes of its text."""
        return b"" if token_id in self._special else self._tokenizer.decode_bytes([token_id])

    def offsets(self, token_ids: Sequence[int], start: int = 0) -> list[int]:
        """In which character of the text each token begins."""
        decoder = StreamDecoder(self._tokenizer)
        offsets = []
        for token_id in token_ids:
            offsets.append(start)
            start += len(decoder.push(token_id))
        return offsets

    def _spelled(self, token_id: int) -> str:
        if token_id in self._special:
            return self._special[token_id]
        raw = self._tokenizer.decode_bytes([token_id])
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def service_of(request: Request) -> Service:
    """The service of the app that a request came to."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def key_scope(key: str) -> str:
    """What a key's requests share among themselves is known by this: its hash."""
    return hashlib.sha256(key.encode()).hexdigest()[:32] if key else ""


def scope_of(request: Request) -> str:
    """Whose texts a request may see, which the guard has written down."""
    return str(request.scope.get(_SCOPE, ""))


async def aside(
    request: Request, make: Callable[Given, Made], *given: Given.args, **named: Given.kwargs
) -> Made:
    """Work on what a request has sent: in a thread if that is long, so that the streams go on."""
    if request.scope[_BODY_BYTES] <= _SHORT_BODY:
        return make(*given, **named)
    return await asyncio.to_thread(make, *given, **named)


def _message(turn: Turn) -> Message:
    return Message(
        role="system" if turn.role == "developer" else turn.role,
        content=turn.text,
        name=turn.name or "",
        tool_calls=tuple(
            ToolCall(call.id, call.function.arguments) for call in turn.tool_calls or ()
        ),
        tool_call_id=turn.tool_call_id or "",
    )
