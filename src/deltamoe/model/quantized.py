"""Models whose matrices are kept in 8 or 4 bits, made from one that is there or built empty.

``deltamoe.plan.quantized_bits`` says which matrices, and at how many bits each.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from deltamoe.config.model import ModelConfig
from deltamoe.layers import Experts, Mlp
from deltamoe.layers.quantized import QuantizedExperts, QuantizedLinear, QuantizedMlp
from deltamoe.model.model import HybridLM
from deltamoe.plan import Bits, quantized_bits, weights

__all__ = ["build_quantized", "quantize_model", "replace_modules"]

_Layer = TypeVar("_Layer", bound=nn.Module)


def build_quantized(config: ModelConfig, bits: Bits) -> HybridLM:
    """A quantised model without memory (on the meta device), for a file's tensors to be put in."""
    with torch.device("meta"):
        return quantize_model(HybridLM(config).eval(), bits)


def quantize_model(model: HybridLM, bits: Bits) -> HybridLM:
    """Round a model's matrices, one layer after another, and return it.

    Args:
        model: in evaluation mode; it is changed.
        bits: 8 or 4.
    """
    chosen = {
        weight.name: own
        for weight in weights(model.config)
        if (own := quantized_bits(weight, bits)) is not None
    }
    replace_modules(
        model, Experts, lambda name, layer: QuantizedExperts.of(layer, chosen[f"{name}.w_up"])
    )
    replace_modules(
        model, Mlp, lambda name, layer: QuantizedMlp.of(layer, chosen[f"{name}.w_up.weight"])
    )
    replace_modules(
        model,
        nn.Linear,
        lambda name, layer: (
            QuantizedLinear.of(layer, chosen[f"{name}.weight"])
            if f"{name}.weight" in chosen
            else layer
        ),
    )
    return model.eval()


def replace_modules(
    model: nn.Module, kind: type[_Layer], new: Callable[[str, _Layer], nn.Module]
) -> None:
    """Put ``new(name, layer)`` in the place of every layer of one kind, one after another."""
    names = [name for name, module in model.named_modules() if isinstance(module, kind)]
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, kind)
        model.set_submodule(name, new(name, layer).eval())
