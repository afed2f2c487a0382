"""The places where a running model is looked at, each under one canonical name.

``HOOKS`` is the table; ``watching`` puts the hooks on a model for the time of a block and takes
them off again whatever happens. A hook looks and never changes: a model that is watched answers
the same to the last bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from deltamoe.model import HybridLM

__all__ = ["HOOKS", "Captured", "Hook", "watching"]

Captured = dict[str, Any]
"""What the hooks of one layer saw, by canonical name."""


class Hook(NamedTuple):
    """One place of a block.

    Attributes:
        name: canonical; ``blocks.{layer}.`` stands before it.
        module: path within the block; "" is the block itself. A block without it has no such hook.
        side: what goes in, or what comes out.
        place: which of several tensors.
        meaning: what it is.
    """

    name: str
    module: str
    side: Literal["input", "output"]
    place: int
    meaning: str


HOOKS = (
    Hook("before", "", "input", 0, "the stream before the layer [B, T, D]"),
    Hook("mixer.input", "mixer", "input", 0, "the stream, normalised [B, T, D]"),
    Hook("mixer.query_latent", "mixer.q_norm", "output", 0, "MLA with query_rank: normalised"),
    Hook("mixer.query_projected", "mixer.q_proj", "output", 0, "of all heads [B, T, H·K]"),
    Hook("mixer.key_projected", "mixer.k_proj", "output", 0, "likewise the keys"),
    Hook("mixer.value_projected", "mixer.v_proj", "output", 0, "likewise the values"),
    Hook("mixer.decay_logits", "mixer.decay_up", "output", 0, "of all heads [B, T, HV·K]"),
    Hook("mixer.beta_logits", "mixer.beta_proj", "output", 0, "of all heads [B, T, HV]"),
    Hook("mixer.output_gate_logits", "mixer.output_gate_up", "output", 0, "[B, T, HV·V]"),
    Hook("mixer.latent_projected", "mixer.latent_proj", "output", 0, "[B, T, L + P]"),
    Hook("mixer.answers", "mixer.o_proj", "input", 0, "all heads' answers [B, T, HV·V or H·V]"),
    Hook("mixer.output", "mixer", "output", 0, "what the mixer adds [B, T, D]"),
    Hook("mixer.state", "mixer", "output", 1, "KdaState or MlaState after the last token"),
    Hook("between", "channel_norm", "output", 0, "the stream behind the mixer [B, T, D]"),
    Hook("channel.input", "channel", "input", 0, "that, normalised [B, T, D]"),
    Hook("channel.routed", "channel.experts", "output", 0, "the weighted sum [B·T, D]"),
    Hook("channel.shared", "channel.shared_expert", "output", 0, "its answer [B, T, D]"),
    Hook("channel.output", "channel", "output", 0, "what the channel adds [B, T, D]"),
    Hook("channel.routing", "channel", "output", 1, "Routing; None where the channel is dense"),
    Hook("after", "", "output", 0, "the stream after the layer [B, T, D]"),
)


@contextmanager
def watching(model: HybridLM, on_layer: Callable[[int, Captured], None]) -> Iterator[None]:
    """Look at every layer of the forward passes made inside the block.

    Args:
        model: what is watched; nobody else may use it meanwhile.
        on_layer: called when a layer is done, with its number and what its hooks saw. Nothing is
            kept here afterwards.
    """
    handles: list[RemovableHandle] = []
    try:
        for layer, block in enumerate(model.blocks):
            handles += _watch(block, layer, on_layer)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(
    block: nn.Module, layer: int, on_layer: Callable[[int, Captured], None]
) -> Iterator[RemovableHandle]:
    seen: Captured = {}
    modules = dict(block.named_modules())
    for hook in HOOKS:
        module = modules.get(hook.module)
        if module is None:
            continue
        if hook.side == "input":
            yield module.register_forward_pre_hook(_look_before(hook, seen))
        else:
            yield module.register_forward_hook(_look_after(hook, seen))

    def done(module: nn.Module, inputs: object, output: object) -> None:
        on_layer(layer, dict(seen))
        seen.clear()

    yield block.register_forward_hook(done)


def _look_before(hook: Hook, seen: Captured) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[hook.name] = inputs[hook.place]

    return look


def _look_after(hook: Hook, seen: Captured) -> Callable[[nn.Module, object, Any], None]:
    def look(module: nn.Module, inputs: object, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        seen[hook.name] = parts[hook.place] if hook.place < len(parts) else None

    return look
