"""The parts that several answers share: identities, usage, logprobs in both of OpenAI's shapes.

An answer may be long, so that it is made and written as JSON in a thread, while the streams go on.

A logprob is a natural logarithm. Where a token is listed twice, drawn and among the likeliest, both
numbers are the same float, so that clients may compare them.
"""

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi.responses import Response

from deltamoe.engine import Result, TokenLogprob
from deltamoe.server.service import Service, TokenNames

__all__ = ["FINISH", "answered", "chat_logprobs", "completion_logprobs", "head", "usage"]

# Why a text ended, in OpenAI's words: the end of a document or a turn is a stop as well.
FINISH = {"stop": "stop", "end": "stop", "length": "length", "cancelled": "stop", None: None}

_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


async def answered(make: Callable[..., Any], *given: Any) -> Response:
    """What a function makes of what is given, as JSON."""

    def write() -> bytes:
        # ``encode`` would hold the interpreter until it is done: with many logprobs a second
        return "".join(_JSON.iterencode(make(*given))).encode()

    return Response(await asyncio.to_thread(write), media_type="application/json")


def head(service: Service, kind: str, prefix: str) -> dict[str, Any]:
    """What every answer, and every event of a stream, begins with."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": service.settings.model_id,
    }


def usage(results: Sequence[Result]) -> dict[str, Any]:
    """Tokens read, taken from earlier requests, and written."""
    read = sum(result.num_prompt_tokens for result in results)
    written = sum(len(choice.ids) for result in results for choice in result.choices)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {
            "cached_tokens": sum(result.num_cached_tokens for result in results),
            "replayed_tokens": sum(result.num_replayed_tokens for result in results),
        },
    }


def completion_logprobs(
    names: TokenNames,
    entries: Sequence[TokenLogprob | None],
    ids: Sequence[int],
    offset: int = 0,
) -> dict[str, Any]:
    """Logprobs as ``/v1/completions`` gives them.

    Args:
        names: how tokens are shown.
        entries: one a token; None for the first of a document, which nothing foretold.
        ids: the tokens.
        offset: characters before the first.
    """
    return {
        "tokens": [names.name(token_id) for token_id in ids],
        "token_logprobs": [None if entry is None else entry.logprob for entry in entries],
        "top_logprobs": [None if entry is None else _top(names, entry) for entry in entries],
        "text_offset": names.offsets(ids, offset),
    }


def _top(names: TokenNames, entry: TokenLogprob) -> dict[str, float]:
    top: dict[str, float] = {}
    for token_id, logprob in (*entry.top, (entry.id, entry.logprob)):
        top.setdefault(names.name(token_id), logprob)
    return top


def chat_logprobs(names: TokenNames, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Logprobs as ``/v1/chat/completions`` gives them."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        raw = list(names.raw(token_id))
        return {"token": names.name(token_id), "logprob": logprob, "bytes": raw}

    content = [
        one(entry.id, entry.logprob) | {"top_logprobs": [one(*other) for other in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}
