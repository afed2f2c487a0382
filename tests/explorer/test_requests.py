"""Requests from the page: what is taken and what is refused."""

import json
from typing import Any

import pytest

from deltamoe.errors import ConfigError
from deltamoe.explorer.requests import (
    AblateRequest,
    BranchRequest,
    ChatRequest,
    TraceRequest,
    parse_request,
)


def parse(kind: type[Any], **data: Any) -> Any:
    return parse_request(json.dumps(data).encode(), kind)


def test_what_is_taken() -> None:
    assert parse(TraceRequest, prompt="x") == TraceRequest(prompt="x", sampling={})
    asked = parse(TraceRequest, prompt="", layers=[0, 2], temperature=1, seed=3)
    assert asked.layers == (0, 2)
    assert asked.sampling == {"temperature": 1, "seed": 3}
    assert parse(BranchRequest, trace="a", token=3, id=5).max_new_tokens == 20
    asked = parse(AblateRequest, trace="a", heads=[[0, 1]], experts=[], experts_are="silent")
    assert (asked.heads, asked.experts_are) == (((0, 1),), "silent")
    asked = parse(ChatRequest, messages=[{"role": "user", "content": "hi"}])
    assert asked.messages == (("user", "hi"),)


@pytest.mark.parametrize(
    ("kind", "data", "sentence"),
    [
        (AblateRequest, {}, "'trace' is missing"),
        (TraceRequest, {"prompt": 3}, "expected a text"),
        (TraceRequest, {"prompt": "x", "max_new_tokens": True}, "whole number"),
        (TraceRequest, {"prompt": "x", "max_new_tokens": 1.0}, "whole number"),
        (TraceRequest, {"prompt": "x", "temperature": "hot"}, "a number"),
        (TraceRequest, {"prompt": "x", "layers": 3}, "a list"),
        (TraceRequest, {"prompt": "x", "layers": ["0"]}, "whole number"),
        (TraceRequest, {"prompt": "x", "layers": [0] * 5000}, "4,096"),
        (TraceRequest, {"prompt": "x", "<b>": 1}, "unknown key '<b>'"),
        (TraceRequest, {"prompt": "x", "sampling": {}}, "unknown key 'sampling'"),
        (BranchRequest, {"trace": "a", "token": 1}, "'id' is missing"),
        (AblateRequest, {"trace": "a", "heads": [[1]]}, "pairs"),
        (AblateRequest, {"trace": "a", "experts_are": "dead"}, "never_chosen or silent"),
        (ChatRequest, {"messages": [{"role": "root", "content": ""}]}, "role"),
        (ChatRequest, {"messages": [{"role": "user"}]}, "role and content"),
    ],
)
def test_what_is_refused(kind: type[Any], data: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse(kind, **data)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"prompt": NaN}', b"\xff", b"[" * 1000])
def test_what_is_no_request(body: bytes) -> None:
    with pytest.raises(ConfigError):
        parse_request(body, TraceRequest)
