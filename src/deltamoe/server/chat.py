"""``POST /v1/chat/completions``: the assistant's next turn.

The turns take the form the model was trained on. A base model knows none and reads what was said as
one text, see ``Service.conversation``. A call of a named tool, and an answer in JSON, are had by
letting the model choose only among what fits the schema.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deltamoe.engine import Choice, Piece, Result
from deltamoe.engine import Request as EngineRequest
from deltamoe.server.answers import FINISH, answered, chat_logprobs, head, usage
from deltamoe.server.batch import Batch, until_disconnect
from deltamoe.server.errors import ApiError
from deltamoe.server.protocol import ChatRequest, NamedToolChoice, ResponseFormat, Tool
from deltamoe.server.service import Service, aside, service_of
from deltamoe.server.settings import MAX_SCHEMA_BYTES
from deltamoe.server.stream import EventStream, PieceStream, event
from deltamoe.server.tools import answer_parts, forced_call, function_call

__all__ = ["router"]

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def answer(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    service.check_model(body.model)
    before = service.kept(request, body.state)
    tools = [] if body.tool_choice == "none" else body.tools or []
    prompt = await aside(
        request,
        service.conversation,
        body.messages,
        tools=[tool.model_dump(exclude_none=True) for tool in tools],
        is_begun=before is not None,
    )
    schema, call_id = _schema(body.response_format), ""
    if (forced := _forced_tool(body)) is not None and service.chat_template is not None:
        name = forced.function.name
        call_id, opening = forced_call(service.chat_template, service.tokenizer, name)
        prompt = (*prompt, *opening)
        schema = json.dumps(forced.function.parameters or {"type": "object"})
    if schema is not None and len(schema) > MAX_SCHEMA_BYTES:
        raise ApiError(
            400, f"a schema of {len(schema):,} bytes: this server takes {MAX_SCHEMA_BYTES:,}"
        )
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    num_read = len(prompt) + (0 if before is None else before.num_tokens)
    max_tokens = service.max_tokens(asked, num_read)
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    service.check_extent(
        max_tokens, body.n or 1, 0, 0 if num_logprobs is None else num_logprobs + 1
    )
    batch = Batch(
        service,
        [
            EngineRequest(
                prompt=prompt,
                max_tokens=max_tokens,
                num_logprobs=num_logprobs,
                json_schema=schema,
                scope=service.prefix_scope(request),
                state=before,
                **service.sampling(body),
            )
        ],
    )
    reply = _Answer(service, body, has_tools=bool(tools), call_id=call_id)
    if not body.stream:
        results = await until_disconnect(request, batch.run())
        return await answered(reply.whole, results)
    stream = PieceStream(batch, service.pace)
    try:
        first = await until_disconnect(request, stream.next())
    except BaseException:
        stream.close()
        raise
    return EventStream(stream, first, render=reply.events, finish=reply.last_events)


def _schema(form: ResponseFormat | None) -> str | None:
    if form is None or form.type == "text":
        return None
    if form.json_schema is not None and form.type == "json_schema":
        return json.dumps(form.json_schema.schema_)
    return json.dumps({"type": "object"})


def _forced_tool(body: ChatRequest) -> Tool | None:
    """The tool that must be called.

    Raises:
        ApiError: 400, there is no such tool, or one of several must be.
    """
    if body.tool_choice in (None, "none", "auto"):
        return None
    tools = body.tools or []
    if isinstance(body.tool_choice, NamedToolChoice):
        tools = [tool for tool in tools if tool.function.name == body.tool_choice.function.name]
        if not tools:
            raise ApiError(
                400, "tool_choice names a tool that tools do not declare", param="tool_choice"
            )
    if len(tools) > 1:
        raise ApiError(
            400,
            "tool_choice 'required' with several tools is not supported by this server; "
            "name one, or leave the choice to the model",
            param="tool_choice",
        )
    return tools[0]


class _Answer:
    """An assistant's turns as OpenAI's clients read them.

    Args:
        service, body: of the request.
        has_tools: whether the model may call any.
        call_id: of the call it must make; "" if it is free.
    """

    def __init__(
        self, service: Service, body: ChatRequest, *, has_tools: bool, call_id: str
    ) -> None:
        self._service = service
        self._body = body
        self._has_tools = has_tools
        self._call_id = call_id
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._head = head(service, kind, "chatcmpl")
        self._has_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._ids: dict[int, list[int]] = {}  # of each choice of a stream, so far

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [self._choice(choice) for choice in results[0].choices]
        return self._head | {"choices": choices, "usage": usage(results)}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        text, calls = self._parts(choice.ids, choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text}
        if calls:
            message["tool_calls"] = calls
        names = self._service.names
        return {
            "index": choice.index,
            "message": message | {"refusal": None},
            "logprobs": chat_logprobs(names, choice.logprobs) if self._body.logprobs else None,
            "finish_reason": "tool_calls" if calls else FINISH[choice.finish_reason],
        }

    def _parts(self, ids: Sequence[int], text: str) -> tuple[str, list[dict[str, Any]]]:
        if self._call_id:
            return "", [function_call(self._call_id, text)]
        if not self._has_tools:
            return text, []
        service = self._service
        text, calls = answer_parts(service.chat_template, service.tokenizer, ids, text)
        return text, calls[:1] if self._body.parallel_tool_calls is False else calls

    def events(self, pieces: Sequence[tuple[int, Piece]]) -> Iterator[bytes]:
        """The events of some pieces."""
        for _, piece in pieces:
            if piece.index not in self._ids:
                self._ids[piece.index] = []
                delta = {"role": "assistant", "content": ""}
                yield self._event([self._delta(piece.index, delta)])
            ids = self._ids[piece.index]
            ids += piece.ids
            text = self._shown(piece, ids)
            logprobs = None
            if self._body.logprobs and piece.logprobs:
                logprobs = chat_logprobs(self._service.names, piece.logprobs)
            if text or logprobs:
                yield self._event([self._delta(piece.index, {"content": text}, logprobs)])
            if piece.finish_reason is not None:
                yield from self._finished(piece, ids)

    def _shown(self, piece: Piece, ids: Sequence[int]) -> str:
        """The text of a piece that is no part of a call."""
        template = self._service.chat_template
        if self._call_id:
            return ""
        if not self._has_tools or template is None:
            return piece.text
        mark = self._service.tokenizer.special_ids.get(template.calls_begin)
        if mark not in ids:
            return piece.text
        return piece.text.partition(template.calls_begin)[0] if mark in piece.ids else ""

    def _finished(self, piece: Piece, ids: Sequence[int]) -> Iterator[bytes]:
        calls: list[dict[str, Any]] = []
        if self._call_id or self._has_tools:
            _, calls = self._parts(ids, self._service.tokenizer.decode(ids))
        if calls:
            numbered = [{"index": i} | call for i, call in enumerate(calls)]
            yield self._event([self._delta(piece.index, {"tool_calls": numbered})])
        reason = "tool_calls" if calls else FINISH[piece.finish_reason]
        yield self._event([self._delta(piece.index, {}) | {"finish_reason": reason}])

    def _delta(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def last_events(self, results: Sequence[Result]) -> Iterator[bytes]:
        """The usage, if it was asked for."""
        if self._has_usage:
            yield self._event([], usage(results))

    def _event(self, choices: list[dict[str, Any]], spent: dict[str, Any] | None = None) -> bytes:
        data = self._head | {"choices": choices}
        return event(data | {"usage": spent} if self._has_usage else data)
