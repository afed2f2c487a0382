"""Structured output: which ids may come next if the answer is to fit a JSON schema or a grammar.

The work is llguidance's (https://github.com/guidance-ai/llguidance), imported only here, and only
when it is asked for. Knows nothing of engines.
"""

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from deltamoe.engine.request import Request
from deltamoe.errors import BackendUnavailableError, ConfigError
from deltamoe.tokenizer import Tokenizer

__all__ = ["GrammarCompiler", "Matcher"]

# A space behind a comma or colon and nowhere else: in free white space a small model gets lost.
_JSON: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# A fifth of llguidance's own limits: a grammar may take a tenth of a second, and not two.
_LIMITS: Any = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
}


@runtime_checkable
class Matcher(Protocol):
    """A grammar and how much of an answer it has seen."""

    def allowed(self) -> Tensor:
        """Which ids may come next: [vocab] bool, of the tokenizer's vocabulary."""

    def push(self, token_id: int) -> None:
        """Take the id that was drawn."""

    def copy(self) -> "Matcher":
        """The same grammar at the same place, for another answer."""


class _LlguidanceMatcher:
    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> Tensor:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        bits = np.unpackbits(mask, count=self._vocab_size, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))

    def push(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._check()

    def copy(self) -> "_LlguidanceMatcher":
        return _LlguidanceMatcher(self._matcher.deep_copy(), self._vocab_size)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigError(f"the grammar cannot be followed: {_reason(self._matcher)}")


class GrammarCompiler:
    """Makes matchers for one tokenizer; any thread may ask.

    Args:
        tokenizer: whose ids the answers are made of.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._vocabulary: Any = None

    def matcher(self, request: Request) -> Matcher | None:
        """The matcher of a request; None if any answer will do.

        Raises:
            ConfigError: a schema or grammar that cannot be understood.
            BackendUnavailableError: llguidance is not installed.
        """
        if request.json_schema is None and request.grammar is None:
            return None
        try:
            import llguidance
        except ImportError:
            raise BackendUnavailableError(
                "structured output needs llguidance: pip install 'deltamoe[serve]'"
            ) from None
        if self._vocabulary is None:
            self._vocabulary = _vocabulary(self._tokenizer)
        if request.json_schema is not None:
            try:
                grammar = llguidance.LLMatcher.grammar_from_json_schema(
                    request.json_schema, defaults=_JSON
                )
            except ValueError as error:
                raise ConfigError(f"json_schema: {error}") from None
        else:
            assert request.grammar is not None
            grammar = llguidance.LLMatcher.grammar_from_lark(request.grammar)
        limits = llguidance.LLParserLimits(**_LIMITS)
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the dearest mask is the first: its time is the caller's
        if matcher.is_error():
            kind = "grammar" if request.json_schema is None else "json_schema"
            raise ConfigError(f"{kind}: {_reason(matcher)}")
        return _LlguidanceMatcher(matcher, self._tokenizer.vocab_size)


def _reason(matcher: Any) -> str:
    """What llguidance says, without the dump of its parser behind it."""
    reason: str = matcher.get_error().split("<state>")[0].strip()
    return reason


def _vocabulary(tokenizer: Tokenizer) -> Any:
    import llguidance

    special = sorted(tokenizer.special_ids.values())
    silent = {*tokenizer.unused_ids, *special}

    class Vocabulary:
        """What ``TokenizerWrapper`` asks for."""

        def __init__(self) -> None:
            self.eos_token_id = tokenizer.end_id
            self.bos_token_id = None
            self.special_token_ids = special
            self.tokens = [
                b"" if token_id in silent else tokenizer.decode_bytes([token_id])
                for token_id in range(tokenizer.vocab_size)
            ]

        def __call__(self, text: bytes) -> list[int]:
            return tokenizer.encode(text.decode("utf-8"))

    return llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(Vocabulary()), eos_token=sorted(tokenizer.stop_ids)
    )
