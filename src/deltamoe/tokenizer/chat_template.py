"""Turns of a conversation as ids: the form an instruct model was trained on, as data.

A turn is ``opening name middle body end``: the opening says who speaks, the name may say more, and
opening, middle and end are special tokens. They are put in as ids; names and bodies are encoded as
text, and text never encodes to special ids. So nobody can close a turn by writing its end.

``jinja`` writes the same form for other tools. There the whole conversation becomes one text before
it is encoded, and this protection ends. Jinja from outside is looked at, never run.
Source: the turns of Kimi K2 and Kimi Linear.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from deltamoe.config import open_regular, read_json
from deltamoe.errors import BadFileError, ConfigError
from deltamoe.tokenizer.base import Tokenizer

__all__ = ["CHAT_TEMPLATE", "ChatTemplate", "Message", "Role", "ToolCall", "read_chat_template"]

CHAT_TEMPLATE = "chat_template.jinja"

_LOG = logging.getLogger("deltamoe")
_MAX_FILE_BYTES = 1 << 20

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """A function an assistant asked for.

    Attributes:
        id: as the model wrote it, "functions.NAME:0"; the result is returned under it.
        arguments: JSON text, kept as it was written.
    """

    id: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: who speaks.
        content: what is said; for a tool, what it returned.
        name: the speaker's name, if it is not the role; for a tool, the function's.
        tool_calls: what an assistant asked for, after its content.
        tool_call_id: which call a tool's turn answers.
    """

    role: Role
    content: str = ""
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


class _Piece(NamedTuple):
    text: str
    is_mark: bool


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """The marks of a conversation; the defaults are Kimi's.

    Attributes:
        system, user, assistant: open a turn; a tool's turn opens as the system's.
        middle: between the name and the body.
        end: closes a turn.
        calls_begin, calls_end: around all tool calls of a turn.
        call_begin, call_arguments, call_end: before a call's id, before its arguments, behind them.
        declaration: the name of the turn that declares tools.
        result: what stands before a tool's result; ``{id}`` is the call's.
        default_system: what the system says if a conversation begins otherwise; "" is nothing.
    """

    system: str = "<|im_system|>"
    user: str = "<|im_user|>"
    assistant: str = "<|im_assistant|>"
    middle: str = "<|im_middle|>"
    end: str = "<|im_end|>"
    calls_begin: str = "<|tool_calls_section_begin|>"
    calls_end: str = "<|tool_calls_section_end|>"
    call_begin: str = "<|tool_call_begin|>"
    call_arguments: str = "<|tool_call_argument_begin|>"
    call_end: str = "<|tool_call_end|>"
    declaration: str = "tool_declare"
    result: str = "## Return of {id}\n"
    default_system: str = ""

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        is_answered: bool = True,
    ) -> list[int]:
        """Ids of a conversation.

        Args:
            tokenizer: knows the marks as special tokens.
            messages: the turns in order; none encodes to nothing but what is asked for below.
            tools: declarations of functions, JSON objects as OpenAI's interface has them.
            is_answered: open an assistant's turn at the end, for the model to fill.

        Raises:
            ConfigError: a mark that is needed is no special token of this tokenizer.
            DataError: a text holds a lone surrogate.
        """
        ids: list[int] = []
        text = ""
        for piece in [*self._pieces(messages, tools, is_answered), _Piece("", True)]:
            if not piece.is_mark:
                text += piece.text
                continue
            if text:
                ids += tokenizer.encode(text)
                text = ""
            if piece.text:
                ids.append(self._mark(tokenizer, piece.text))
        return ids

    def end_id(self, tokenizer: Tokenizer) -> int:
        """The id that closes a turn."""
        return self._mark(tokenizer, self.end)

    def fits(self, tokenizer: Tokenizer) -> bool:
        """Whether a tokenizer has the marks that every conversation needs."""
        needed = (self.system, self.user, self.assistant, self.middle, self.end)
        return all(mark in tokenizer.special_ids for mark in needed)

    def jinja(self) -> str:
        """The same form as a Jinja template, as ``chat_template.jinja`` holds it."""
        quoted = {field.name: _quoted(getattr(self, field.name)) for field in fields(self)}
        before_id, _, behind_id = self.result.partition("{id}")
        return _JINJA.format(
            **quoted,
            before_id=_quoted(before_id),
            behind_id=_quoted(behind_id),
            default_turn=f"'{self._default_opening}{_literal(self.default_system)}{self.end}'",
            has_default="true" if self.default_system else "false",
        )

    @property
    def _default_opening(self) -> str:
        return f"{self.system}system{self.middle}"

    def _mark(self, tokenizer: Tokenizer, mark: str) -> int:
        if mark not in tokenizer.special_ids:
            raise ConfigError(
                f"the tokenizer {tokenizer.name} has no special token {mark!r}, which this "
                "conversation needs"
            )
        return tokenizer.special_ids[mark]

    def _pieces(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], is_answered: bool
    ) -> Iterator[_Piece]:
        if tools:
            declared = json.dumps(
                list(tools), ensure_ascii=False, separators=(",", ":"), sort_keys=True
            )
            yield from self._turn(self.system, self.declaration, [_Piece(declared, False)])
        if self.default_system and messages and messages[0].role != "system":
            yield from self._turn(self.system, "system", [_Piece(self.default_system, False)])
        openings = {"user": self.user, "assistant": self.assistant}
        for message in messages:
            opening = openings.get(message.role, self.system)
            yield from self._turn(opening, message.name or message.role, self._body(message))
        if is_answered:
            yield from self._opened(self.assistant, "assistant")

    def _turn(self, opening: str, name: str, body: Sequence[_Piece]) -> Iterator[_Piece]:
        yield from self._opened(opening, name)
        yield from body
        yield _Piece(self.end, True)

    def _opened(self, opening: str, name: str) -> Iterator[_Piece]:
        yield _Piece(opening, True)
        yield _Piece(name, False)
        yield _Piece(self.middle, True)

    def _body(self, message: Message) -> list[_Piece]:
        pieces = [_Piece(message.content, False)]
        if message.role == "tool":
            before_id, _, behind_id = self.result.partition("{id}")
            pieces.insert(0, _Piece(before_id + message.tool_call_id + behind_id, False))
        if message.tool_calls:
            pieces.append(_Piece(self.calls_begin, True))
            for call in message.tool_calls:
                pieces += [
                    _Piece(self.call_begin, True),
                    _Piece(call.id, False),
                    _Piece(self.call_arguments, True),
                    _Piece(call.arguments, False),
                    _Piece(self.call_end, True),
                ]
            pieces.append(_Piece(self.calls_end, True))
        return pieces


def read_chat_template(folder: Path | str, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The form of the turns in a published folder, or None if its model knows no turns.

    A folder with a template has turns. Its Jinja is not run: what is taken from it is the text of a
    default system turn, if it spells one out. The marks are Kimi's.

    Args:
        folder: may hold ``chat_template.jinja``, or ``chat_template`` in tokenizer_config.json.
        tokenizer: the folder's.

    Raises:
        BadFileError: a file that is no text, longer than 1 MiB, or no regular file.
    """
    source = _template_text(Path(folder))
    if source is None:
        return None
    template = ChatTemplate()
    if not template.fits(tokenizer) or template.user not in source:
        _LOG.warning("%s: its chat template has marks that are not known here; not used", folder)
        return None
    opened, end = re.escape(template._default_opening), re.escape(template.end)
    found = re.search(opened + _LITERAL + end, source)
    if found is None:
        return template
    return ChatTemplate(default_system=_ESCAPED.sub(_unescaped, found[1]))


def _template_text(folder: Path) -> str | None:
    path, config = folder / CHAT_TEMPLATE, folder / "tokenizer_config.json"
    if path.exists():
        with open_regular(path, error=BadFileError) as file:
            content = file.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise BadFileError(f"{path}: longer than {_MAX_FILE_BYTES:,} bytes")
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as fault:
            raise BadFileError(f"{path}: not UTF-8 text at byte {fault.start}") from None
    if not config.exists():
        return None
    text = read_json(config, error=BadFileError).get("chat_template")
    return text if isinstance(text, str) else None


def _quoted(text: str) -> str:
    """A text as a Jinja literal."""
    return "'" + "".join(_ESCAPES.get(character, character) for character in text) + "'"


_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r"}
# Text that can only be meant as it stands, whether inside or outside of quotes.
_LITERAL = r"((?:[^<{}%'\"\\]|\\.){1,2000})"
_ESCAPED = re.compile(r"\\(?:x([0-9a-f]{2})|(.))")


def _literal(text: str) -> str:
    """A text inside a Jinja literal, with nothing left that could be taken for Jinja or a mark."""
    return re.sub(r"[<{}%'\"\\\r\n]", lambda found: f"\\x{ord(found[0]):02x}", text)


def _unescaped(escape: re.Match[str]) -> str:
    if escape[1]:
        return chr(int(escape[1], 16))
    return {"n": "\n", "r": "\r", "t": "\t"}.get(escape[2], escape[2])


# Every tag trims the white space around it: what is written is what stands between quotes.
_JINJA = """\
{{%- macro opened(opening, name) -%}}
  {{{{- opening + name + {middle} -}}}}
{{%- endmacro -%}}
{{%- macro spoken(content) -%}}
  {{%- if content is string -%}}
    {{{{- content -}}}}
  {{%- else -%}}
    {{%- for part in content or [] -%}}{{{{- part.text -}}}}{{%- endfor -%}}
  {{%- endif -%}}
{{%- endmacro -%}}
{{%- if tools -%}}
  {{{{- opened({system}, {declaration}) -}}}}
  {{{{- tools | tojson(separators=(',', ':'), sort_keys=true) -}}}}
  {{{{- {end} -}}}}
{{%- endif -%}}
{{%- if {has_default} and messages and messages[0].role != 'system' -%}}
  {{{{- {default_turn} -}}}}
{{%- endif -%}}
{{%- for message in messages -%}}
  {{%- set openings = {{'user': {user}, 'assistant': {assistant}}} -%}}
  {{{{- opened(openings.get(message.role, {system}), message.name or message.role) -}}}}
  {{%- if message.role == 'tool' -%}}
    {{{{- {before_id} + (message.tool_call_id or '') + {behind_id} -}}}}
  {{%- endif -%}}
  {{{{- spoken(message.content) -}}}}
  {{%- if message.tool_calls -%}}
    {{{{- {calls_begin} -}}}}
    {{%- for call in message.tool_calls -%}}
      {{%- set arguments = call.function.arguments -%}}
      {{{{- {call_begin} + call.id + {call_arguments} -}}}}
      {{{{- arguments if arguments is string else arguments | tojson -}}}}
      {{{{- {call_end} -}}}}
    {{%- endfor -%}}
    {{{{- {calls_end} -}}}}
  {{%- endif -%}}
  {{{{- {end} -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
  {{{{- opened({assistant}, 'assistant') -}}}}
{{%- endif -%}}
"""
