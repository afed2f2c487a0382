"""What is asked of an engine, and what it answers. Knows nothing of how it is done.

All ids are token ids; all logprobs are natural logarithms of the model's own probabilities, before
temperature and penalties.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from deltamoe.errors import ConfigError
from deltamoe.inference import TextState
from deltamoe.inference.sampler import LEAST_REPETITION_PENALTY

__all__ = ["Choice", "FinishReason", "Piece", "Request", "Result", "Timings", "TokenLogprob"]

FinishReason = Literal["stop", "length", "end", "cancelled"]

LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of zero, which JSON cannot carry."""

_MOST_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
        prompt: everything the model is to read: document border and template are the caller's
            business.
        max_tokens: most tokens of a choice; 0 only reads.
        temperature: 0 takes the likeliest id each time.
        top_k: how many ids stay; 0 keeps all.
        top_p: the probability the ids that stay reach together; 1 keeps all.
        min_p: the least probability that stays, relative to the likeliest id's; 0 keeps all.
        repetition_penalty: above 1 makes ids of prompt and answer so far less likely.
        presence_penalty: taken off the logit of every id the answer has.
        frequency_penalty: taken off once for each time the answer has it.
        logit_bias: added to the logits of some ids.
        seed: decides the random numbers, whatever else the engine is doing; None draws one.
        n: choices; they share the state of the prompt.
        stop: strings that end a choice; they and what follows are not part of its text.
        stop_ids: ids that end a choice, and are not part of it.
        ignore_end: go on behind the tokenizer's own stop ids.
        num_logprobs: None for none; k for those of each drawn id and of the k likeliest, <= 20.
        prompt_logprobs: the same for each prompt token but the first.
        json_schema: the answer is to be JSON that fits this schema; "{}" lets any JSON pass.
        grammar: the answer is to fit this grammar, in llguidance's dialect of Lark.
        scope: prefixes are shared between requests of the same scope only.
        reuse: whether kept prefixes may be used, and this one be kept.
        state: the text the prompt goes on from; None begins at nothing.
        wants_embedding: the last hidden state of the last prompt token is asked for; needs
            ``max_tokens`` = 0.
        keep_state: each choice comes with its state.

    Raises:
        ConfigError: a value out of range; the message names it.
    """

    prompt: tuple[int, ...]
    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_end: bool = False
    num_logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | None = None
    grammar: str | None = None
    scope: str = ""
    reuse: bool = True
    state: TextState | None = field(default=None, repr=False, compare=False)
    wants_embedding: bool = False
    keep_state: bool = False

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError("prompt: expected at least one token id; a text begins with a border")
        for key, expected, is_right in (
            ("max_tokens", "a whole number >= 0", self.max_tokens >= 0),
            ("temperature", "a number from 0 to 100", 0.0 <= self.temperature <= 100.0),
            ("top_k", "a whole number >= 0 (0 keeps all)", self.top_k >= 0),
            ("top_p", "a number > 0 and <= 1", 0.0 < self.top_p <= 1.0),
            ("min_p", "a number from 0 to 1", 0.0 <= self.min_p <= 1.0),
            (
                "repetition_penalty",
                f"a number from {LEAST_REPETITION_PENALTY} to 100",
                LEAST_REPETITION_PENALTY <= self.repetition_penalty <= 100,
            ),
            ("presence_penalty", "a number from -100 to 100", abs(self.presence_penalty) <= 100),
            ("frequency_penalty", "a number from -100 to 100", abs(self.frequency_penalty) <= 100),
            ("seed", "a whole number from -2**63 to 2**63 - 1", _fits_64_bits(self.seed)),
            ("n", "a whole number >= 1", self.n >= 1),
            ("num_logprobs", f"0 to {_MOST_LOGPROBS}", _is_few(self.num_logprobs)),
            ("prompt_logprobs", f"0 to {_MOST_LOGPROBS}", _is_few(self.prompt_logprobs)),
        ):
            if not is_right:
                raise ConfigError(f"{key} = {getattr(self, key)!r}: expected {expected}")
        if not all(map(math.isfinite, self.logit_bias.values())):
            raise ConfigError("logit_bias: expected finite numbers")
        if "" in self.stop:
            raise ConfigError(
                "stop = '': expected text; an empty stop string stops before it began"
            )
        if self.json_schema is not None and self.grammar is not None:
            raise ConfigError("json_schema and grammar: expected one of them, or neither")
        if self.wants_embedding and self.max_tokens:
            raise ConfigError(
                f"wants_embedding with max_tokens = {self.max_tokens}: expected 0; "
                "an embedding is of the prompt"
            )


def _fits_64_bits(seed: int | None) -> bool:
    return seed is None or -(2**63) <= seed < 2**63


def _is_few(number: int | None) -> bool:
    return number is None or 0 <= number <= _MOST_LOGPROBS


class TokenLogprob(NamedTuple):
    """How likely the model thought a token.

    Attributes:
        id: the token.
        logprob: of this token; finite, -9999 where the probability is zero.
        top: (id, logprob) of the likeliest tokens, the likeliest first.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step adds to one choice.

    Attributes:
        index: of the choice, from 0.
        text: what has become certain; often empty.
        ids: what was drawn, without the stop id that ended it.
        logprobs: of these ids, if asked for.
        finish_reason: None while the choice goes on.
    """

    index: int
    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Choice:
    """One continuation, finished or cancelled.

    Attributes:
        index: from 0.
        text: up to the stop string, if one came.
        ids: everything drawn but the stop id that ended it; a stop string's ids included.
        logprobs: of these ids, if asked for.
        finish_reason: "stop" (a stop string or stop id of the request), "end" (of the document or
            the turn), "length" or "cancelled".
        matched_stop: the stop string or stop id; None for other reasons.
        state: prompt and continuation, ready to be written on, if asked for.
    """

    index: int
    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    matched_stop: str | int | None
    state: TextState | None = field(default=None, repr=False, compare=False)


class Timings(NamedTuple):
    """Seconds since the request was submitted.

    Attributes:
        queued_s: until the reading of its prompt began.
        first_token_s: until its first token was drawn, or the prompt read if none is wanted.
        total_s: until it was finished.
    """

    queued_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True)
class Result:
    """The answer to a request.

    Attributes:
        choices: in the order of their index.
        prompt_logprobs: one entry for each prompt token, None where nothing stands before it.
        embedding: [D] fp32.
        num_prompt_tokens: of the prompt alone, what ``state`` has read left out.
        num_cached_tokens: of these, how many a kept state made it unnecessary to read.
        num_replayed_tokens: of these, how many were known and read nevertheless, because no state
            was kept where the known text ended.
        is_exact: whether every state was cut as in a cold reading, so that the answer is that of
            an engine without reuse to the last bit.
        timings: how long it took.
    """

    choices: tuple[Choice, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    embedding: Tensor | None = field(repr=False, compare=False)
    num_prompt_tokens: int
    num_cached_tokens: int
    num_replayed_tokens: int
    is_exact: bool
    timings: Timings = field(compare=False)
