"""Calls of tools, found in what the model wrote.

The marks around a call are special tokens, so a call is told from text that merely spells one.
Knows nothing of requests or streams.
"""

import secrets
from collections.abc import Sequence
from typing import Any

from deltamoe.tokenizer import ChatTemplate, Tokenizer

__all__ = ["answer_parts", "forced_call", "function_call"]


def answer_parts(
    template: ChatTemplate | None, tokenizer: Tokenizer, ids: Sequence[int], text: str
) -> tuple[str, list[dict[str, Any]]]:
    """What an answer says, and the calls it asks for.

    Args:
        template: whose marks they are.
        tokenizer: knows their ids.
        ids: of the answer.
        text: of the answer, which stands if there is no call.
    """
    marks = tokenizer.special_ids
    if template is None or marks.get(template.calls_begin) not in set(ids):
        return text, []
    begin = list(ids).index(marks[template.calls_begin])
    calls = []
    for part in _split(ids[begin + 1 :], marks.get(template.call_begin, -1))[1:]:
        name, *arguments = _split(part, marks.get(template.call_arguments, -1))
        body = _until(arguments[0], marks.get(template.call_end, -1)) if arguments else []
        calls.append(function_call(tokenizer.decode(name).strip(), tokenizer.decode(body)))
    return tokenizer.decode(ids[:begin]), calls


def function_call(call_id: str, arguments: str) -> dict[str, Any]:
    """A call as OpenAI's clients read it; its id says which function, as "functions.NAME:0"."""
    name = call_id.removeprefix("functions.").partition(":")[0]
    return {
        "id": call_id or f"call-{secrets.token_hex(8)}",
        "type": "function",
        "function": {"name": name, "arguments": arguments.strip()},
    }


def forced_call(template: ChatTemplate, tokenizer: Tokenizer, name: str) -> tuple[str, list[int]]:
    """The id of a call that must be made, and how the assistant's turn begins with it."""
    marks, call_id = tokenizer.special_ids, f"functions.{name}:0"
    return call_id, [
        marks[template.calls_begin],
        marks[template.call_begin],
        *tokenizer.encode(call_id),
        marks[template.call_arguments],
    ]


def _split(ids: Sequence[int], mark: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token_id in ids:
        if token_id == mark:
            parts.append([])
        else:
            parts[-1].append(token_id)
    return parts


def _until(ids: Sequence[int], mark: int) -> list[int]:
    return _split(ids, mark)[0]
