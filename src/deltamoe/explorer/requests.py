"""What the page may ask for, checked before anything is done: no unknown key, no odd value.

Ranges that the model's side knows (temperature, layers, tokens) are checked there. No torch.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from deltamoe.config.strict_json import parse_json
from deltamoe.errors import ConfigError

__all__ = ["AblateRequest", "BranchRequest", "ChatRequest", "TraceRequest", "parse_request"]

_SAMPLING: dict[str, type] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
}
_MOST_ITEMS = 4096


@dataclass(frozen=True, kw_only=True)
class TraceRequest:
    """A prompt, or a conversation, to record; ``layers`` names those kept in full."""

    prompt: str | None = None
    messages: tuple[tuple[str, str], ...] | None = None
    max_new_tokens: int = 20
    layers: tuple[int, ...] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BranchRequest:
    """A trace to leave behind ``token`` with another ``id``."""

    trace: str
    token: int
    id: int
    max_new_tokens: int = 20
    layers: tuple[int, ...] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AblateRequest:
    """A trace to read again with parts switched off."""

    trace: str
    layers: tuple[int, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()
    experts: tuple[tuple[int, int], ...] = ()
    experts_are: Literal["never_chosen", "silent"] = "never_chosen"


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A conversation to answer: messages for a model with turns, a text for one without."""

    messages: tuple[tuple[str, str], ...] | None = None
    text: str | None = None
    max_tokens: int = 200
    sampling: dict[str, Any] = field(default_factory=dict)


Request = TraceRequest | BranchRequest | AblateRequest | ChatRequest


def parse_request(content: bytes, kind: type[Request]) -> Request:
    """Turn a request's body into one of the classes above.

    Raises:
        ConfigError: no JSON object, a key that is missing or unknown, a value of another kind.
    """
    data = parse_json(content, source="the request", max_depth=6)
    if not isinstance(data, dict):
        raise ConfigError("the request: expected a JSON object")
    allowed = set(kind.__dataclass_fields__)
    values: dict[str, Any] = {}
    if "sampling" in allowed:
        allowed = (allowed - {"sampling"}) | set(_SAMPLING)
        values["sampling"] = {
            key: _checked(key, data[key], _SAMPLING[key]) for key in _SAMPLING if key in data
        }
    if unknown := sorted(set(data) - allowed):
        raise ConfigError(
            f"the request: unknown key {unknown[0][:60]!a}; the keys are "
            + ", ".join(sorted(allowed))
        )
    for key in allowed & set(data) - set(_SAMPLING):
        values[key] = _CHECKS[key](key, data[key])
    required = {
        name
        for name, item in kind.__dataclass_fields__.items()
        if item.default is item.default_factory
    }
    if missing := sorted(required - set(values)):
        raise ConfigError(f"the request: {missing[0]!r} is missing")
    return kind(**values)


def _checked(key: str, value: Any, kind: type) -> Any:
    expected = {int: "a whole number", float: "a number", str: "a text"}[kind]
    is_right = type(value) is kind or (kind is float and type(value) is int)
    if not is_right:
        raise ConfigError(f"the request: {key} = {ascii(value)[:60]}: expected {expected}")
    return kind(value)


def _text(key: str, value: Any) -> str:
    return str(_checked(key, value, str))


def _whole(key: str, value: Any) -> int:
    return int(_checked(key, value, int))


def _layers(key: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    _require_list(key, value)
    return tuple(_whole(key, item) for item in value)


def _pairs(key: str, value: Any) -> tuple[tuple[int, int], ...]:
    _require_list(key, value)
    pairs = []
    for item in value:
        if not isinstance(item, list) or len(item) != 2:
            raise ConfigError(
                f"the request: {key}: {ascii(item)[:60]}: expected pairs such as [1, 7]"
            )
        pairs.append((_whole(key, item[0]), _whole(key, item[1])))
    return tuple(pairs)


def _how(key: str, value: Any) -> str:
    if value not in ("never_chosen", "silent"):
        raise ConfigError(f"the request: {key}: expected never_chosen or silent")
    return str(value)


def _messages(key: str, value: Any) -> tuple[tuple[str, str], ...]:
    _require_list(key, value)
    messages = []
    for item in value:
        if not isinstance(item, dict) or item.keys() != {"role", "content"}:
            raise ConfigError(f"the request: {key}: expected objects of role and content")
        role = _text("role", item["role"])
        if role not in ("system", "user", "assistant"):
            raise ConfigError(f"the request: role {role[:40]!a}: expected system, user, assistant")
        messages.append((role, _text("content", item["content"])))
    return tuple(messages)


def _require_list(key: str, value: Any) -> None:
    if not isinstance(value, list) or len(value) > _MOST_ITEMS:
        raise ConfigError(f"the request: {key}: expected a list of at most {_MOST_ITEMS:,} items")


_CHECKS = {
    "prompt": _text,
    "text": _text,
    "trace": _text,
    "token": _whole,
    "id": _whole,
    "max_new_tokens": _whole,
    "max_tokens": _whole,
    "layers": _layers,
    "heads": _pairs,
    "experts": _pairs,
    "experts_are": _how,
    "messages": _messages,
}
