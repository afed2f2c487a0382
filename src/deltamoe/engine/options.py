"""How much an engine may hold and read at once. Knows nothing of models."""

from dataclasses import dataclass

from deltamoe.errors import ConfigError

__all__ = ["EngineOptions"]

MOST_CONTEXT = 131_072


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The limits of an engine, and how it divides its time.

    Attributes:
        max_sequences: choices that are written at once.
        max_waiting: requests that may wait before ``submit`` refuses more.
        context: tokens a sequence may reach; None lets ``state_bytes`` decide, up to 131,072.
        state_bytes: for the states of running sequences; None takes an eighth of the memory.
        cache_bytes: for what is kept of finished ones, so that their beginnings need not be read
            again; None takes an eighth of the memory, 0 keeps nothing.
        prefill_chunk: prompt tokens in one forward pass. Prompts are cut at its multiples.
        single_tokens: a prompt's end of at most so many tokens is read token by token, beside those
            who are writing, instead of in a pass of its own; 0 never does so. None lets the model's
            size decide. Only where there is a ``Decoder``.
        step_tokens: prompt tokens that may be read between two tokens of those who are writing.
        page_tokens: latents in one page.
        exact_reuse: use of a kept state only what a cold reading would have cut there too, so that
            a hit changes no bit. Otherwise the deepest one is used, which is right to rounding.
        audit_every: of so many finished requests one is computed again, without reuse, when there
            is nothing else to do or at times beside others, and compared; 0 audits none.

    Raises:
        ConfigError: a value out of range; the message names it.
    """

    max_sequences: int = 64
    max_waiting: int = 64
    context: int | None = None
    state_bytes: int | None = None
    cache_bytes: int | None = None
    prefill_chunk: int = 512
    single_tokens: int | None = None
    step_tokens: int = 512
    page_tokens: int = 64
    exact_reuse: bool = False
    audit_every: int = 0

    def __post_init__(self) -> None:
        least = {"max_waiting": 0, "cache_bytes": 0, "single_tokens": 0, "audit_every": 0}
        for key in (
            *("max_sequences", "max_waiting", "context", "state_bytes", "cache_bytes"),
            *("prefill_chunk", "single_tokens", "step_tokens", "page_tokens", "audit_every"),
        ):
            value, lowest = getattr(self, key), least.get(key, 1)
            if value is not None and value < lowest:
                raise ConfigError(f"{key} = {value}: expected a whole number >= {lowest}")
