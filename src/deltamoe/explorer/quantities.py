"""What a trace holds: every quantity with its axes, unit and range, in one table.

docs/explorer.md prints the same table. Knows nothing of files and nothing of torch.
Letters: docs/notation.md.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from deltamoe.config.model import ModelConfig

__all__ = [
    "MOST_TOKENS",
    "NUM_CANDIDATES",
    "NUM_LENS_CANDIDATES",
    "QUANTITIES",
    "Quantity",
    "layers_of",
    "sizes",
]

MOST_TOKENS = 2048
NUM_CANDIDATES = 20
NUM_LENS_CANDIDATES = 5

Over = Literal["all", "kda", "mla", "moe"]


class Quantity(NamedTuple):
    """One thing that is measured.

    Attributes:
        name: of the array.
        over: the layers its first axis counts; None for an array without a layer axis.
        axes: the axes behind it, by name; see ``_sizes``.
        dtype: "f32", "i32" or "u16".
        unit: what a value counts.
        least, most: the range it cannot leave; None is unbounded.
        meaning: in one sentence.
        is_bulky: may be left out of some layers to stay within a budget.
    """

    name: str
    over: Over | None
    axes: tuple[str, ...]
    dtype: str
    unit: str
    least: float | None
    most: float | None
    meaning: str
    is_bulky: bool = False


_T, _H, _HV = "token", "head", "value_head"
QUANTITIES: Mapping[str, Quantity] = {
    quantity.name: quantity
    for quantity in (
        Quantity("tokens.ids", None, (_T,), "i32", "token id", 0, None, "what was read, in order"),
        Quantity(
            "tokens.surprise", None, (_T,), "f32", "nats", 0, None,
            "-ln of the probability the model gave this token; 0 for the first, which is given",
        ),
        Quantity(
            "tokens.ranks", None, (_T,), "i32", "rank", 0, None,
            "how many ids were likelier than this token; 0 for the first, which is given",
        ),
        Quantity(
            "next.ids", None, (_T, "candidate"), "i32", "token id", 0, None,
            "the likeliest ids to follow this token, best first",
        ),
        Quantity(
            "next.probabilities", None, (_T, "candidate"), "f32", "probability", 0, 1,
            "theirs, at temperature 1 and before any sampling rule",
        ),
        Quantity(
            "next.entropy", None, (_T,), "f32", "nats", 0, None,
            "of the distribution over all ids to follow this token",
        ),
        Quantity(
            "lens.ids", "all", (_T, "lens_candidate"), "i32", "token id", 0, None,
            "what the head would answer if this layer were the last, best first",
        ),
        Quantity(
            "lens.probabilities", "all", (_T, "lens_candidate"), "f32", "probability", 0, 1,
            "theirs",
        ),
        Quantity(
            "residual.before", "all", (_T,), "f32", "L2 norm", 0, None,
            "of the stream before the layer",
        ),
        Quantity(
            "residual.mixer", "all", (_T,), "f32", "L2 norm", 0, None,
            "of what the mixer adds to it",
        ),
        Quantity(
            "residual.between", "all", (_T,), "f32", "L2 norm", 0, None,
            "of the stream between mixer and channel",
        ),
        Quantity(
            "residual.channel", "all", (_T,), "f32", "L2 norm", 0, None,
            "of what the channel adds to it",
        ),
        Quantity(
            "residual.after", "all", (_T,), "f32", "L2 norm", 0, None,
            "of the stream after the layer",
        ),
        Quantity(
            "mixer.output", "all", (_T, "width"), "f32", "", None, None,
            "what the mixer adds to the stream",
            is_bulky=True,
        ),
        Quantity(
            "channel.output", "all", (_T, "width"), "f32", "", None, None,
            "what the channel adds to the stream",
            is_bulky=True,
        ),
        Quantity(
            "router.scores", "moe", (_T, "expert"), "f32", "score", 0, 1,
            "sigmoid (each expert alone) or softmax (they sum to 1) of the router's logits",
            is_bulky=True,
        ),
        Quantity(
            "router.ranks", "moe", (_T, "expert"), "u16", "rank", 0, 65_535,
            "place in the order of choice, after the balance bias, 0 first; 65535: its group was "
            "closed",
            is_bulky=True,
        ),
        Quantity(
            "router.balance_bias", "moe", ("expert",), "f32", "score", None, None,
            "added to a score to choose, never to weigh; zeros if the model has none",
        ),
        Quantity(
            "router.entropy", "moe", (_T,), "f32", "nats", 0, None,
            "of the scores, divided by their sum",
        ),
        Quantity(
            "router.expert_ids", "moe", (_T, "choice"), "i32", "expert", 0, None,
            "the chosen experts, best first",
        ),
        Quantity(
            "router.expert_weights", "moe", (_T, "choice"), "f32", "factor", None, None,
            "what each chosen expert's answer is multiplied by",
        ),
        Quantity(
            "experts.counts", "moe", ("expert",), "i32", "tokens", 0, None,
            "tokens that chose each expert; they sum to tokens times choices",
        ),
        Quantity(
            "experts.norms", "moe", (_T, "choice"), "f32", "L2 norm", 0, None,
            "of each chosen expert's answer, before its weight",
        ),
        Quantity(
            "experts.shared_norm", "moe", (_T,), "f32", "L2 norm", 0, None,
            "of the shared expert's answer; zeros if the model has none",
        ),
        Quantity(
            "kda.query", "kda", (_T, _H, "key_channel"), "f32", "", -1, 1,
            "asks the memory; of length K^-1/2",
            is_bulky=True,
        ),
        Quantity(
            "kda.key", "kda", (_T, _H, "key_channel"), "f32", "", -1, 1,
            "where a token writes; of length 1",
            is_bulky=True,
        ),
        Quantity(
            "kda.value", "kda", (_T, _HV, "value_channel"), "f32", "", None, None,
            "what a token writes",
            is_bulky=True,
        ),
        Quantity(
            "kda.log_decay", "kda", (_T, _HV, "key_channel"), "f32", "nats a token", None, 0,
            "ln of what each key channel retains at this token",
            is_bulky=True,
        ),
        Quantity(
            "kda.output_gate", "kda", (_T, _HV, "value_channel"), "f32", "factor", None, None,
            "what each channel of the head's normalised answer is multiplied by",
            is_bulky=True,
        ),
        Quantity(
            "kda.decay_mean", "kda", (_T, _HV), "f32", "nats a token", None, 0,
            "mean of log_decay over the key channels",
        ),
        Quantity(
            "kda.decay_p10", "kda", (_T, _HV), "f32", "nats a token", None, 0,
            "a tenth of the key channels forget faster",
        ),
        Quantity(
            "kda.decay_p90", "kda", (_T, _HV), "f32", "nats a token", None, 0,
            "a tenth of the key channels forget more slowly",
        ),
        Quantity(
            "kda.half_life", "kda", (_T, _HV), "f32", "tokens", 0, 1e9,
            "ln 2 / -decay_mean: at this token's rate a memory is halved in so many tokens",
        ),
        Quantity(
            "kda.beta", "kda", (_T, _HV), "f32", "fraction", 0, 2,
            "how far the memory's answer is moved to the value",
        ),
        Quantity(
            "kda.memory_norm", "kda", (_T, _HV), "f32", "Frobenius norm", 0, None,
            "of the memory after this token",
        ),
        Quantity(
            "kda.change_norm", "kda", (_T, _HV), "f32", "Frobenius norm", 0, None,
            "of the memory after this token less the one before it",
        ),
        Quantity(
            "kda.write_norm", "kda", (_T, _HV), "f32", "Frobenius norm", 0, None,
            "of what this token wrote, its forgetting left out",
        ),
        Quantity(
            "kda.memory", "kda", (_HV, "key_channel", "value_channel"), "f32", "", None, None,
            "the model's own memory after the last token",
        ),
        Quantity(
            "kda.conv", "kda", ("tap", "conv_channel"), "f32", "", None, None,
            "the convolution's last inputs after the last token, oldest first: queries, keys, "
            "values",
        ),
        Quantity(
            "mla.query", "mla", (_T, "mla_head", "mla_channel"), "f32", "", None, None,
            "unscaled; the part from the latent first, then the shared channels",
            is_bulky=True,
        ),
        Quantity(
            "mla.key", "mla", (_T, "mla_head", "mla_channel"), "f32", "", None, None,
            "likewise; the shared channels are repeated for every head",
            is_bulky=True,
        ),
        Quantity(
            "mla.latent", "mla", (_T, "latent_channel"), "f32", "", None, None,
            "what this token leaves in the cache, normalised",
            is_bulky=True,
        ),
        Quantity(
            "mla.latent_norm", "mla", (_T,), "f32", "L2 norm", 0, None,
            "of the latent this token leaves in the cache",
        ),
    )
}  # fmt: skip


def layers_of(config: ModelConfig, over: Over) -> tuple[int, ...]:
    """The layers that have a kind of mixer or channel, counted from 0."""
    layers = range(config.num_layers)
    if over == "all":
        return tuple(layers)
    if over == "moe":
        return tuple(layer for layer in layers if config.channel(layer) == "moe")
    return tuple(layer for layer in layers if config.mixer(layer) == over)


def sizes(config: ModelConfig, num_tokens: int) -> dict[str, int]:
    """The length of every axis but "layer", from the model's geometry alone."""
    found = {
        "token": num_tokens,
        "width": config.dim,
        "candidate": min(NUM_CANDIDATES, config.vocab_size),
        "lens_candidate": min(NUM_LENS_CANDIDATES, config.vocab_size),
    }
    if (kda := config.kda) is not None:
        found |= {
            "head": kda.num_heads,
            "value_head": kda.value_heads,
            "key_channel": kda.key_dim,
            "value_channel": kda.value_dim,
            "tap": max(kda.conv_size - 1, 0),
            "conv_channel": kda.conv_channels,
        }
    if (mla := config.mla) is not None:
        found |= {
            "mla_head": mla.num_heads,
            "mla_channel": mla.query_dim,
            "latent_channel": mla.latent_dim,
        }
    if (moe := config.moe) is not None:
        found |= {"expert": moe.num_experts, "choice": moe.experts_per_token}
    return found
