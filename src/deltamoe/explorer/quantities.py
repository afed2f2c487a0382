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
    "Keep",
    "Over",
    "Quantity",
    "layers_of",
    "sizes",
]

MOST_TOKENS = 2048
NUM_CANDIDATES = 20
NUM_LENS_CANDIDATES = 5

Over = Literal["all", "kda", "mla", "mlp", "moe"]
Keep = Literal["always", "bulky", "inner"]


class Quantity(NamedTuple):
    """One thing that is measured.

    Attributes:
        name: of the array.
        over: the layers its first axis counts; None for an array without a layer axis.
        axes: the axes behind it, by name; see ``sizes``.
        dtype: "f32", "i32" or "u16".
        unit: what a value counts.
        least, most: the range it cannot leave; None is unbounded.
        meaning: in one sentence.
        keep: "always"; or, to stay within a budget, not for every layer: "bulky" (what memories,
            attention and scores follow from) goes last, "inner" (what only a box of a diagram
            shows) first.
    """

    name: str
    over: Over | None
    axes: tuple[str, ...]
    dtype: str
    unit: str
    least: float | None
    most: float | None
    meaning: str
    keep: Keep = "always"


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
            "mixer.input", "all", (_T, "width"), "f32", "", None, None,
            "the stream, normalised, as the mixer reads it",
            keep="inner",
        ),
        Quantity(
            "mixer.output", "all", (_T, "width"), "f32", "", None, None,
            "what the mixer adds to the stream",
            keep="bulky",
        ),
        Quantity(
            "channel.input", "all", (_T, "width"), "f32", "", None, None,
            "the stream, normalised, as the channel reads it",
            keep="inner",
        ),
        Quantity(
            "channel.output", "all", (_T, "width"), "f32", "", None, None,
            "what the channel adds to the stream",
            keep="bulky",
        ),
        Quantity(
            "mlp.gate", "mlp", (_T, "mlp_channel"), "f32", "", None, None,
            "w_gate x, before its SiLU",
            keep="inner",
        ),
        Quantity(
            "mlp.up", "mlp", (_T, "mlp_channel"), "f32", "", None, None,
            "w_up x, which the gate is multiplied by",
            keep="inner",
        ),
        Quantity(
            "router.logits", "moe", (_T, "expert"), "f32", "", None, None,
            "of every expert, what its score is made of",
            keep="inner",
        ),
        Quantity(
            "router.scores", "moe", (_T, "expert"), "f32", "score", 0, 1,
            "sigmoid (each expert alone) or softmax (they sum to 1) of the router's logits",
            keep="bulky",
        ),
        Quantity(
            "router.ranks", "moe", (_T, "expert"), "u16", "rank", 0, 65_535,
            "place in the order of choice, after the balance bias, 0 first; 65535: its group was "
            "closed",
            keep="bulky",
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
            "experts.answers", "moe", (_T, "choice", "width"), "f32", "", None, None,
            "each chosen expert's answer, before its weight",
            keep="inner",
        ),
        Quantity(
            "experts.routed", "moe", (_T, "width"), "f32", "", None, None,
            "the chosen experts' answers, weighed and summed",
            keep="inner",
        ),
        Quantity(
            "experts.shared", "moe", (_T, "width"), "f32", "", None, None,
            "the shared expert's answer; absent if the model has none",
            keep="inner",
        ),
        Quantity(
            "experts.shared_norm", "moe", (_T,), "f32", "L2 norm", 0, None,
            "of the shared expert's answer; zeros if the model has none",
        ),
        Quantity(
            "kda.query_projected", "kda", (_T, _H, "key_channel"), "f32", "", None, None,
            "q_proj of the stream, before the convolution",
            keep="inner",
        ),
        Quantity(
            "kda.key_projected", "kda", (_T, _H, "key_channel"), "f32", "", None, None,
            "k_proj of the stream, before the convolution",
            keep="inner",
        ),
        Quantity(
            "kda.value_projected", "kda", (_T, _HV, "value_channel"), "f32", "", None, None,
            "v_proj of the stream, before the convolution",
            keep="inner",
        ),
        Quantity(
            "kda.query_convolved", "kda", (_T, _H, "key_channel"), "f32", "", None, None,
            "behind the convolution, if there is one, and SiLU; the query before its length is set",
            keep="inner",
        ),
        Quantity(
            "kda.key_convolved", "kda", (_T, _H, "key_channel"), "f32", "", None, None,
            "likewise the key; the value is done here",
            keep="inner",
        ),
        Quantity(
            "kda.decay_logits", "kda", (_T, _HV, "key_channel"), "f32", "", None, None,
            "what log_decay is made of",
            keep="inner",
        ),
        Quantity(
            "kda.beta_logits", "kda", (_T, _HV), "f32", "", None, None,
            "what beta is made of",
        ),
        Quantity(
            "kda.output_gate_logits", "kda", (_T, _HV, "value_channel"), "f32", "", None, None,
            "what output_gate is made of",
            keep="inner",
        ),
        Quantity(
            "kda.answer_normed", "kda", (_T, _HV, "value_channel"), "f32", "", None, None,
            "the memory's answer to the query, normalised, before the output gate",
            keep="inner",
        ),
        Quantity(
            "kda.query", "kda", (_T, _H, "key_channel"), "f32", "", -1, 1,
            "asks the memory; of length K^-1/2",
            keep="bulky",
        ),
        Quantity(
            "kda.key", "kda", (_T, _H, "key_channel"), "f32", "", -1, 1,
            "where a token writes; of length 1",
            keep="bulky",
        ),
        Quantity(
            "kda.value", "kda", (_T, _HV, "value_channel"), "f32", "", None, None,
            "what a token writes",
            keep="bulky",
        ),
        Quantity(
            "kda.log_decay", "kda", (_T, _HV, "key_channel"), "f32", "nats a token", None, 0,
            "ln of what each key channel retains at this token",
            keep="bulky",
        ),
        Quantity(
            "kda.output_gate", "kda", (_T, _HV, "value_channel"), "f32", "factor", None, None,
            "what each channel of the head's normalised answer is multiplied by",
            keep="bulky",
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
            "mla.query_latent", "mla", (_T, "query_latent_channel"), "f32", "", None, None,
            "the query's bottleneck, normalised; absent if the model has none",
            keep="inner",
        ),
        Quantity(
            "mla.query", "mla", (_T, "mla_head", "mla_channel"), "f32", "", None, None,
            "unscaled; the part from the latent first, then the shared channels",
            keep="bulky",
        ),
        Quantity(
            "mla.key", "mla", (_T, "mla_head", "mla_channel"), "f32", "", None, None,
            "likewise; the shared channels are repeated for every head",
            keep="bulky",
        ),
        Quantity(
            "mla.value", "mla", (_T, "mla_head", "mla_value_channel"), "f32", "", None, None,
            "what each head brings out of the latent",
            keep="inner",
        ),
        Quantity(
            "mla.answer", "mla", (_T, "mla_head", "mla_value_channel"), "f32", "", None, None,
            "each head's mean of the values, by its attention",
            keep="inner",
        ),
        Quantity(
            "mla.latent_projected", "mla", (_T, "latent_channel"), "f32", "", None, None,
            "the latent before its norm",
            keep="inner",
        ),
        Quantity(
            "mla.latent", "mla", (_T, "latent_channel"), "f32", "", None, None,
            "what this token leaves in the cache, normalised",
            keep="bulky",
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
    if over in ("mlp", "moe"):
        return tuple(layer for layer in layers if config.channel(layer) == over)
    return tuple(layer for layer in layers if config.mixer(layer) == over)


def sizes(config: ModelConfig, num_tokens: int) -> dict[str, int]:
    """The length of every axis but "layer", from the model's geometry alone."""
    found = {
        "token": num_tokens,
        "width": config.dim,
        "mlp_channel": config.mlp_dim,
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
            "mla_value_channel": mla.value_dim,
            "query_latent_channel": mla.query_rank or 0,
            "latent_channel": mla.latent_dim,
        }
    if (moe := config.moe) is not None:
        found |= {"expert": moe.num_experts, "choice": moe.experts_per_token}
    return found
