"""The requests this server understands, with a bound on every number, and the answers it gives.

Fields nobody has heard of are accepted and ignored, as OpenAI's clients expect, and so are mere
labels (``user``, ``metadata``, ``safety_identifier``, ``prompt_cache_key``). Fields with a meaning
that cannot be honoured are refused by name: silence would be a wrong answer. Beyond
OpenAI's are ``top_k``, ``min_p``, ``repetition_penalty``, ``stop_token_ids`` and ``ignore_eos`` in
their customary spelling, and our own ``state`` (go on from a kept text) and ``reuse`` (false: read
the prompt anew).

Knows nothing of engines or models.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, model_validator

from deltamoe.inference.sampler import LEAST_REPETITION_PENALTY
from deltamoe.server.settings import MAX_CHOICES, MAX_LOGPROBS, MAX_PROMPTS, MAX_STATE_NAME

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "ContentPart",
    "DetokenizeRequest",
    "EmbeddingRequest",
    "NamedToolChoice",
    "ResponseFormat",
    "SamplingFields",
    "StateRequest",
    "TokenizeRequest",
    "Tool",
    "Turn",
]

_MAX_ID = 2**31 - 1
_MAX_LENGTH = 2**24  # tokens or characters; the body's size and the context bind sooner

Number = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[StrictInt, Field(ge=0, le=_MAX_ID)]
Text = Annotated[StrictStr, Field(max_length=_MAX_LENGTH)]
# One complaint about a list is enough: a body has room for a quarter of a million.
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=_MAX_LENGTH, fail_fast=True)]
Prompt = (
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
)
Stop = Annotated[StrictStr, Field(min_length=1, max_length=256)]
Name = Annotated[StrictStr, Field(min_length=1, max_length=256)]
Bias = Annotated[Number, Field(ge=-100, le=100)]


# What means something to OpenAI's clients and cannot be had where it is no declared field: its
# name, and the values that ask for nothing beside null.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "dimensions": (),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "max_completion_tokens": (),
    "messages": (),
    "min_tokens": (0,),
    "modalities": ([], ["text"]),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "prompt": (),
    "reasoning": (),
    "reasoning_effort": (),
    "refusal": ("",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _refuse_what_cannot_be_honoured(self) -> "_Request":
        for name, value in (self.model_extra or {}).items():
            if value is not None and value not in _UNSUPPORTED.get(name, (value,)):
                raise ValueError(f"{name} is not supported here; leave it out")
        return self


class _Answerable(_Request):
    model: Annotated[StrictStr, Field(max_length=256)] | None = None


class StreamOptions(_Request):
    """What a stream says beside its text."""

    include_usage: bool = False


class SamplingFields(_Answerable):
    """How tokens are chosen and when the text ends."""

    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_MAX_ID)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=LEAST_REPETITION_PENALTY, le=10)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None
    state: Annotated[StrictStr, Field(max_length=MAX_STATE_NAME)] | None = None
    reuse: bool = True

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "SamplingFields":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for requests with stream: true")
        return self


class CompletionRequest(SamplingFields):
    """``POST /v1/completions``."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, le=_MAX_LENGTH)] | None = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is not supported by this server; ask for n choices")
        if self.stream and self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs cannot be streamed; leave stream out")
        return self


class ContentPart(_Request):
    """A part of a message."""

    type: StrictStr
    text: Text | None = None

    @model_validator(mode="after")
    def _only_text(self) -> "ContentPart":
        if self.type != "text" or self.text is None:
            raise ValueError(f"a content part of type {self.type[:40]!r}: this model reads text")
        return self


class CalledFunction(_Request):
    """Which function, and its arguments as JSON text."""

    name: Name
    arguments: Text = ""


class TurnToolCall(_Request):
    """A call an assistant asked for."""

    id: Name
    function: CalledFunction


class Turn(_Request):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[TurnToolCall], Field(max_length=128)] | None = None
    tool_call_id: Name | None = None

    @property
    def text(self) -> str:
        """What is said, the parts joined."""
        if isinstance(self.content, list):
            return "".join(part.text or "" for part in self.content)
        return self.content or ""


Turns = Annotated[list[Turn], Field(min_length=1, max_length=4096, fail_fast=True)]


class ToolFunction(_Request):
    """A function's declaration."""

    name: Annotated[StrictStr, Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Request):
    """A tool the assistant may call."""

    type: Literal["function"]
    function: ToolFunction


class NamedFunction(_Request):
    """A function by its name."""

    name: Name


class NamedToolChoice(_Request):
    """The one function that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(_Request):
    """A schema and its name."""

    name: Name = "answer"
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")


class ResponseFormat(_Request):
    """The form the answer must have."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_one_is_announced(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs the field json_schema")
        return self


class ChatRequest(SamplingFields):
    """``POST /v1/chat/completions``."""

    messages: Turns
    max_tokens: Annotated[int, Field(ge=0, le=_MAX_LENGTH)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0, le=_MAX_LENGTH)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _check_together(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        is_free = self.tool_choice in (None, "auto")
        if is_free and any(tool.function.strict for tool in self.tools or ()):
            raise ValueError(
                "strict: a tool can be so where tool_choice names it; name it, or leave strict out"
            )
        return self


class EmbeddingRequest(_Answerable):
    """``POST /v1/embeddings``."""

    input: Prompt
    encoding_format: Literal["float", "base64"] = "float"
    user: StrictStr | None = None


class TokenizeRequest(_Request):
    """``POST /tokenize``: a text, or a conversation as the model would read it."""

    model: StrictStr | None = None
    prompt: Text | None = None
    messages: Turns | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected either prompt or messages")
        return self


class DetokenizeRequest(_Request):
    """``POST /detokenize``."""

    model: StrictStr | None = None
    tokens: Annotated[list[TokenId], Field(max_length=_MAX_LENGTH, fail_fast=True)]


class StateRequest(_Answerable):
    """``POST /v1/states``: a text to read once and go on from often."""

    prompt: Text | TokenIds | None = None
    messages: Turns | None = None
    state: Annotated[StrictStr, Field(max_length=MAX_STATE_NAME)] | None = None
    name: Annotated[StrictStr, Field(max_length=256)] = ""

    @model_validator(mode="after")
    def _one_of_two(self) -> "StateRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected either prompt or messages")
        return self
