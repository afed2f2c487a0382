"""How the next token is chosen from the logits.

A rule is a small frozen value that turns logits into logits; its number may be one for all rows,
or a tensor with one a row. ``Sampler`` checks the numbers a person gave, puts the rules they ask
for in order, and draws one id a row:

    RepetitionPenalty -> Greedy
    RepetitionPenalty -> Temperature -> TopK -> TopP -> MinP

Each row draws from its own generator, so a row's ids do not depend on its neighbours, and the
global random state is never touched. Knows nothing of models, text or states.

Sources: repetition penalty, CTRL (arXiv 1909.05858); top-p, Holtzman et al. (arXiv 1904.09751);
min-p, Nguyen et al. (arXiv 2407.01082).
"""

# ruff: noqa: D102  (a rule's class says what calling it does)

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from deltamoe.errors import ConfigError, NonFiniteError

__all__ = [
    "LEAST_REPETITION_PENALTY",
    "Greedy",
    "MinP",
    "RepetitionPenalty",
    "Rule",
    "Sampler",
    "SamplingOptions",
    "Temperature",
    "TopK",
    "TopP",
    "draw",
]

Logits = Float[Tensor, "B vocab"]
Seen = Bool[Tensor, "B vocab"]  # which ids stand in the text so far
Rule = Callable[[Tensor, Tensor], Tensor]  # (logits, seen) -> logits, -inf for what is ruled out

LEAST_REPETITION_PENALTY = 0.01
"""Much smaller ones are 0 in fp32, and logits are divided by them."""

_GREEDY_BELOW = 1e-5  # a smaller temperature leaves one id anyway and would overflow on the way


@dataclass(frozen=True)
class RepetitionPenalty:
    """Make ids that were seen less likely: positive logits are divided, negative multiplied."""

    penalty: float

    def __call__(self, logits: Logits, seen: Seen) -> Logits:
        penalised = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return torch.where(seen, penalised, logits)


@dataclass(frozen=True)
class Greedy:
    """Keep the most likely id alone; of equals, the lowest."""

    def __call__(self, logits: Logits, seen: Seen) -> Logits:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)


@dataclass(frozen=True)
class Temperature:
    """Divide the logits: below 1 sharpens the choice, above 1 flattens it."""

    temperature: float | Float[Tensor, "B 1"]

    def __call__(self, logits: Logits, seen: Seen) -> Logits:
        # The maximum goes first, so that no quotient overflows upwards.
        return (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature


@dataclass(frozen=True)
class TopK:
    """Keep the ``k`` most likely ids, and whatever ties with the last of them."""

    k: int | Int[Tensor, "B"]

    def __call__(self, logits: Logits, seen: Seen) -> Logits:
        k = torch.as_tensor(self.k, device=logits.device).clamp(max=logits.shape[-1])
        best = logits.topk(int(k.max())).values
        weakest = best.gather(-1, k.expand(len(logits))[:, None] - 1)
        return logits.masked_fill(logits < weakest, -torch.inf)


@dataclass(frozen=True)
class TopP:
    """Keep the fewest most likely ids whose probabilities reach ``p`` together."""

    p: float | Float[Tensor, "B 1"]

    def __call__(self, logits: Logits, seen: Seen) -> Logits:
        ordered, ids = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        total_before = ordered.cumsum(dim=-1) - ordered
        is_over = total_before >= self.p
        is_over[..., 0] = False  # a tiny p is 0 in fp32
        is_dropped = torch.empty_like(is_over).scatter(-1, ids, is_over)
        return logits.masked_fill(is_dropped, -torch.inf)


@dataclass(frozen=True)
class MinP:
    """Keep the ids at least ``p`` times as likely as the most likely one."""

    p: float | Float[Tensor, "B 1"]

    def __call__(self, logits: Logits, seen: Seen) -> Logits:
        weakest = logits.amax(dim=-1, keepdim=True) + torch.as_tensor(self.p).log().to(logits)
        return logits.masked_fill(logits < weakest, -torch.inf)


def draw(logits: Logits, numbers: Float[Tensor, "B"]) -> Int[Tensor, "B"]:
    """Draw one id a row by inverse transform.

    Args:
        logits: -inf for what is ruled out.
        numbers: in [0, 1), with at most 40 bits behind the point; one a row.
    """
    # fp64, because in fp32 the running sum over a large vocabulary loses the rare ids. With so few
    # bits a number is far enough below 1 that the whole sum is not reached.
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    threshold = numbers.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments of ``Sampler``, for functions that hand them on."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key} = {value!r}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The rules in order, and the draw.

    Attributes:
        temperature: 0 takes the most likely id each time.
        top_k: how many ids stay; 0 keeps all.
        top_p: the probability the ids that stay reach together; 1 keeps all.
        min_p: the least probability that stays, relative to the likeliest id's; 0 keeps all.
        repetition_penalty: above 1 makes ids of the text so far less likely; 1 does nothing.
        seed: with the prompt, decides the random numbers.

    Raises:
        ConfigError: a value out of range; the message names it.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            0.0 <= self.temperature <= 100.0,
            "temperature",
            self.temperature,
            "a number from 0 (always the likeliest) to 100",
        )
        _require(self.top_k >= 0, "top_k", self.top_k, "a whole number >= 0 (0 keeps all)")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "a number > 0 and <= 1")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "a number from 0 to 1")
        _require(
            LEAST_REPETITION_PENALTY <= self.repetition_penalty <= 100.0,
            "repetition_penalty",
            self.repetition_penalty,
            f"a number from {LEAST_REPETITION_PENALTY} to 100 (1 does nothing)",
        )
        _require(0 <= self.seed < 2**63, "seed", self.seed, "a whole number from 0 to 2**63 - 1")

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules these numbers ask for, in the order they are applied."""
        rules: list[Rule] = []
        if self.repetition_penalty != 1.0:
            rules.append(RepetitionPenalty(self.repetition_penalty))
        if self.temperature < _GREEDY_BELOW:
            return (*rules, Greedy())
        if self.temperature != 1.0:
            rules.append(Temperature(self.temperature))
        if self.top_k > 0:
            rules.append(TopK(self.top_k))
        if self.top_p < 1.0:
            rules.append(TopP(self.top_p))
        if self.min_p > 0.0:
            rules.append(MinP(self.min_p))
        return tuple(rules)

    def generator(self, prompt: str) -> torch.Generator:
        """A fresh source of random numbers for the continuation of one prompt.

        It follows from the seed and the prompt alone: neighbours in a batch do not share their
        luck, and the device does not matter.
        """
        digest = hashlib.sha256(f"{self.seed}:{prompt}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8]))

    def sample(
        self,
        logits: Float[Tensor, "B vocab"],
        seen: Seen,
        generators: Sequence[torch.Generator],
    ) -> Int[Tensor, "B"]:
        """Draw one id a row.

        Args:
            logits: in any dtype; the rules run in fp32.
            seen: True for ids that stand in the row's text so far.
            generators: one a row; each is advanced by one draw.

        Raises:
            NonFiniteError: a logit is NaN or infinite.
        """
        if not logits.isfinite().all():
            raise NonFiniteError(
                "the model answered with logits that are not finite, so no token can be chosen; "
                "its weights or its state are damaged, or the precision is too low (try fp32)"
            )
        logits = logits.float()
        for rule in self.rules:
            logits = rule(logits, seen)
        numbers = torch.stack([torch.rand((), generator=generator) for generator in generators])
        return draw(logits, numbers)
