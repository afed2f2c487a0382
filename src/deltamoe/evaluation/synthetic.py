"""Three tasks that only memory can solve: Palindrome, MQAR and Stack.

Each function draws a batch of sequences and says what is to be answered where: ``targets[b, t]`` is
the id that the logits at position t must rank first, ``IGNORED`` where nothing is scored. The
targets stand where the answer is given; they are not to be shifted again.

    Palindrome   O G R S _ S R G O          repeat it backwards
    MQAR         A 1 C 3 B 0 _ B A          look up the value of each key
    Stack        push 7 x  push 2 y  pop 7 x    what was pushed last on that stack?

Knows nothing of models. Source: Kimi Linear (arXiv 2510.26692), section 5.1, which leaves open the
vocabulary, the number of pairs and how often a stack is popped; here they are arguments.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["IGNORED", "Examples", "accuracy", "mqar", "palindrome", "stack"]

IGNORED = -100  # torch's cross_entropy leaves this target out


class Examples(NamedTuple):
    """A batch: the ids to read, and the ids to answer with."""

    ids: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]


def palindrome(batch: int, num_symbols: int, *, vocab_size: int = 64, seed: int = 0) -> Examples:
    """Random symbols, a separator, and the same symbols backwards.

    The separator is the last id. The first symbol after it is given; each of the others is to be
    predicted from the one before it.

    Args:
        batch: B, sequences.
        num_symbols: symbols before the separator; T = 2 num_symbols + 1.
        vocab_size: ids, the separator included.
        seed: of the symbols.
    """
    _require(num_symbols >= 1 and vocab_size >= 2, "one symbol and a separator at least")
    separator = vocab_size - 1
    symbols = torch.randint(separator, (batch, num_symbols), generator=_generator(seed))
    backwards = symbols.flip(1)
    ids = torch.cat([symbols, torch.full((batch, 1), separator), backwards], dim=1)
    targets = torch.full_like(ids, IGNORED)
    targets[:, num_symbols + 1 : -1] = backwards[:, 1:]
    return Examples(ids, targets)


def mqar(
    batch: int,
    num_pairs: int,
    *,
    num_queries: int | None = None,
    vocab_size: int = 64,
    seed: int = 0,
) -> Examples:
    """Multi-query associative recall: key-value pairs, a separator, and keys to look up.

    The separator is the last id; of the others the lower half are keys and the rest values. Keys
    of one sequence are distinct, queries are distinct keys of it, and the value is to be predicted
    at the query itself.

    Args:
        batch: B, sequences.
        num_pairs: pairs before the separator.
        num_queries: keys after it; None asks for every pair. T = 2 num_pairs + 1 + num_queries.
        vocab_size: ids, the separator included.
        seed: of keys, values and queries.
    """
    num_queries = num_pairs if num_queries is None else num_queries
    separator = vocab_size - 1
    num_keys = separator // 2
    _require(1 <= num_queries <= num_pairs <= num_keys, f"1 <= queries <= pairs <= {num_keys} keys")
    generator = _generator(seed)
    keys = _distinct(batch, num_keys, num_pairs, generator)
    values = torch.randint(num_keys, separator, (batch, num_pairs), generator=generator)
    asked = _distinct(batch, num_pairs, num_queries, generator)

    pairs = torch.stack([keys, values], dim=2).flatten(1)  # [B, 2 num_pairs]
    ids = torch.cat([pairs, torch.full((batch, 1), separator), keys.gather(1, asked)], dim=1)
    targets = torch.full_like(ids, IGNORED)
    targets[:, -num_queries:] = values.gather(1, asked)
    return Examples(ids, targets)


def stack(
    batch: int,
    num_operations: int,
    *,
    num_stacks: int = 64,
    vocab_size: int = 128,
    pop_probability: float = 0.5,
    seed: int = 0,
) -> Examples:
    """Pushes and pops on many stacks, mixed; what a pop brings up is to be predicted.

    An operation is three ids: ``push`` or ``pop``, the stack, the element. The element of a pop is
    to be predicted at its stack's id. Only a stack that holds something is popped. Ids: stacks
    first, then elements, then push and pop as the last two.

    Args:
        batch: B, sequences.
        num_operations: T = 3 num_operations.
        num_stacks: stacks, each last in, first out.
        vocab_size: ids in all; ``vocab_size - num_stacks - 2`` of them are elements.
        pop_probability: chance that an operation is a pop, if any stack can be popped.
        seed: of operations, stacks and elements.
    """
    _require(1 <= num_stacks <= vocab_size - 3, "room for one element, push and pop")
    push_id, pop_id = vocab_size - 2, vocab_size - 1
    generator = _generator(seed)
    rows = torch.arange(batch)
    contents = torch.zeros(batch, num_stacks, num_operations, dtype=torch.int64)
    heights = torch.zeros(batch, num_stacks, dtype=torch.int64)
    operations = []
    for _ in range(num_operations):
        can_pop = (heights > 0).any(dim=1)
        is_pop = can_pop & (torch.rand(batch, generator=generator) < pop_probability)
        # The largest of random numbers is a uniform choice among the stacks that may be chosen.
        lots = torch.rand(batch, num_stacks, generator=generator)
        chosen = lots.masked_fill(is_pop[:, None] & (heights == 0), -1.0).argmax(dim=1)
        fresh = torch.randint(num_stacks, push_id, (batch,), generator=generator)

        height = heights[rows, chosen]
        top = contents[rows, chosen, (height - 1).clamp(min=0)]
        element = torch.where(is_pop, top, fresh)
        contents[rows, chosen, height] = fresh  # above the top, where a pop never looks
        heights[rows, chosen] += torch.where(is_pop, -1, 1)
        operations.append(torch.stack([torch.where(is_pop, pop_id, push_id), chosen, element], 1))
    ids = torch.stack(operations, dim=1)  # [B, num_operations, 3]
    targets = torch.full_like(ids, IGNORED)
    targets[:, :, 1] = torch.where(ids[:, :, 0] == pop_id, ids[:, :, 2], IGNORED)
    return Examples(ids.flatten(1), targets.flatten(1))


def accuracy(logits: Float[Tensor, "B T vocab"], targets: Int[Tensor, "B T"]) -> float:
    """Share of the scored positions whose target has the largest logit, 0 to 1."""
    is_scored = targets != IGNORED
    return (logits.argmax(dim=-1) == targets)[is_scored].double().mean().item()


def _distinct(batch: int, pool: int, size: int, generator: torch.Generator) -> Tensor:
    """``size`` different numbers below ``pool`` in random order, for each row: [B, size]."""
    return torch.rand(batch, pool, generator=generator).argsort(dim=1)[:, :size]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _require(condition: bool, expected: str) -> None:
    if not condition:
        raise ValueError(f"the task does not fit its vocabulary: expected {expected}")
