"""``POST /v1/completions``: continue texts, or score them (``echo`` with ``logprobs``).

A text begins with the document border, which the model reads and no answer lists. Token ids are
read as they come, without a border before them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deltamoe.engine import Choice, Piece, Result
from deltamoe.engine import Request as EngineRequest
from deltamoe.server.answers import FINISH, answered, completion_logprobs, head, usage
from deltamoe.server.batch import Batch, until_disconnect
from deltamoe.server.protocol import CompletionRequest
from deltamoe.server.service import Service, aside, service_of
from deltamoe.server.stream import EventStream, PieceStream, event

__all__ = ["router"]

router = APIRouter()


@router.post("/v1/completions", response_model=None)
async def complete(body: CompletionRequest, request: Request) -> Response:
    """Continue one prompt or many."""
    service = service_of(request)
    service.check_model(body.model)
    before = service.kept(request, body.state)
    prompts = await aside(request, service.documents, body.prompt, is_begun=before is not None)
    longest = max(map(len, prompts)) + (0 if before is None else before.num_tokens)
    max_tokens = service.max_tokens(body.max_tokens, longest)
    service.check_extent(
        max_tokens,
        num_choices=len(prompts) * (body.n or 1),
        num_read=sum(map(len, prompts)) * (body.n or 1) if body.echo else 0,
        top=0 if body.logprobs is None else body.logprobs + 1,
    )
    asked = EngineRequest(
        prompt=prompts[0],
        max_tokens=max_tokens,
        num_logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        scope=service.prefix_scope(request),
        state=before,
        **service.sampling(body),
    )
    if _is_scored(body):
        asked = replace(asked, ignore_end=True)
    batch = Batch(service, [replace(asked, prompt=prompt) for prompt in prompts])
    answer = await aside(request, _Answer, service, body, prompts)
    if not body.stream:
        results = await until_disconnect(request, batch.run())
        return await answered(answer.whole, results)
    stream = PieceStream(batch, service.pace)
    try:
        first = await until_disconnect(request, stream.next())
    except BaseException:
        stream.close()
        raise
    return EventStream(stream, first, render=answer.events, finish=answer.last_events)


def _is_scored(body: CompletionRequest) -> bool:
    """Whether the prompt's logprobs are wanted and one token behind it, as evaluations ask.

    They count on that token being listed, so it is also where it is the end of the document.
    """
    return body.echo and body.logprobs is not None and body.max_tokens == 1


class _Answer:
    """Choices as OpenAI's clients read them.

    Args:
        service, body: of the request.
        prompts: the ids of each, as the engine reads them.
    """

    def __init__(
        self, service: Service, body: CompletionRequest, prompts: Sequence[tuple[int, ...]]
    ) -> None:
        self._service = service
        self._body = body
        self._head = head(service, "text_completion", "cmpl")
        is_text = isinstance(body.prompt, str) or isinstance(body.prompt[0], str)
        # The tokens an answer repeats: of a text, all but the border.
        begin = 1 if is_text and body.state is None else 0
        self._echoed = [ids[begin:] if body.echo else () for ids in prompts]
        self._echoed_texts = [service.tokenizer.decode(ids) for ids in self._echoed]
        self._num_choices = body.n or 1
        self._has_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._lengths: dict[int, int] = {}  # characters sent of each choice

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            self._choice(number, result, choice)
            for number, result in enumerate(results)
            for choice in result.choices
        ]
        return self._head | {"choices": choices, "usage": usage(results)}

    def _choice(self, number: int, result: Result, choice: Choice) -> dict[str, Any]:
        service, echoed = self._service, self._echoed[number]
        text, finish_reason = choice.text, FINISH[choice.finish_reason]
        if _is_scored(self._body) and choice.ids and choice.ids[0] in service.tokenizer.stop_ids:
            text, finish_reason = "", "stop"
        logprobs = None
        if self._body.logprobs is not None:
            known = list(result.prompt_logprobs or ())[-len(echoed) :] if echoed else []
            if known:
                known[0] = known[0] if self._body.state else None
            ids = [*echoed, *(entry.id for entry in choice.logprobs)]
            logprobs = completion_logprobs(service.names, [*known, *choice.logprobs], ids)
        return {
            "text": self._echoed_texts[number] + text,
            "index": number * self._num_choices + choice.index,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def events(self, pieces: Sequence[tuple[int, Piece]]) -> Iterator[bytes]:
        """The events of some pieces."""
        for number, piece in pieces:
            index = number * self._num_choices + piece.index
            text = piece.text
            if index not in self._lengths:
                text = self._echoed_texts[number] + text
            offset = self._lengths.get(index, 0)
            self._lengths[index] = offset + len(text)
            logprobs = None
            if self._body.logprobs is not None:
                drawn = [entry.id for entry in piece.logprobs]
                logprobs = completion_logprobs(self._service.names, piece.logprobs, drawn, offset)
            if text or logprobs or piece.finish_reason:
                choice = {
                    "text": text,
                    "index": index,
                    "logprobs": logprobs,
                    "finish_reason": FINISH[piece.finish_reason],
                }
                yield self._event([choice], None)

    def last_events(self, results: Sequence[Result]) -> Iterator[bytes]:
        """The usage, if it was asked for."""
        if self._has_usage:
            yield self._event([], usage(results))

    def _event(self, choices: list[dict[str, Any]], spent: dict[str, Any] | None) -> bytes:
        data = self._head | {"choices": choices}
        return event(data | {"usage": spent} if self._has_usage else data)
