"""The initial weights, as a table that is applied from top to bottom: the first match wins.

Sources: N(0, init_std) for matrices and A_log, dt_bias as in the published modeling code and
flash-linear-attention; matrices that write into the residual stream are scaled by 1/sqrt(2 layers)
(GPT-2), so that the stream's size does not depend on depth; convolution taps as in
``torch.nn.Conv1d`` (uniform within 1/sqrt(W)); the router's bias starts at zero.
"""

import math
from collections.abc import Callable
from fnmatch import fnmatch

import torch
from torch import Generator, Tensor

from deltamoe.config.model import ModelConfig

__all__ = ["INIT", "initialize"]

Init = Callable[[Tensor, ModelConfig, Generator], Tensor]


def _ones(weight: Tensor, config: ModelConfig, generator: Generator) -> Tensor:
    return weight.fill_(1.0)


def _zeros(weight: Tensor, config: ModelConfig, generator: Generator) -> Tensor:
    return weight.zero_()


def _normal(weight: Tensor, config: ModelConfig, generator: Generator) -> Tensor:
    return weight.normal_(0.0, config.init_std, generator=generator)


def _into_stream(weight: Tensor, config: ModelConfig, generator: Generator) -> Tensor:
    std = config.init_std / math.sqrt(2 * config.num_layers)
    return weight.normal_(0.0, std, generator=generator)


def _taps(weight: Tensor, config: ModelConfig, generator: Generator) -> Tensor:
    bound = weight.shape[1] ** -0.5
    return weight.uniform_(-bound, bound, generator=generator)


def _rate(weight: Tensor, config: ModelConfig, generator: Generator) -> Tensor:
    if config.kda is not None and config.kda.decay == "bounded":
        return weight.zero_()
    return weight.uniform_(1.0, 16.0, generator=generator).log_()


def _time_step(weight: Tensor, config: ModelConfig, generator: Generator) -> Tensor:
    """The inverse softplus of a step drawn log-uniformly between 0.001 and 0.1."""
    step = weight.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_()
    return step.add_(torch.log(-torch.expm1(-step)))


INIT: dict[str, Init] = {
    "*norm.weight": _ones,
    "*.balance_bias": _zeros,
    "*.A_log": _rate,
    "*.dt_bias": _time_step,
    "*_conv.weight": _taps,
    "*.o_proj.weight": _into_stream,
    "*.w_down*": _into_stream,
    "*": _normal,
}


@torch.no_grad()
def initialize(tensors: dict[str, Tensor], config: ModelConfig, seed: int) -> None:
    """Fill named tensors in place, in order, from one generator."""
    for name, tensor in tensors.items():
        init = next(init for pattern, init in INIT.items() if fnmatch(name, pattern))
        # one generator a tensor: a tensor's values do not depend on what else the model has
        generator = torch.Generator(tensor.device)
        generator.manual_seed(_seed_of(seed, name))
        init(tensor, config, generator)


def _seed_of(seed: int, name: str) -> int:
    value = seed & 0xFFFFFFFF
    for byte in name.encode():  # FNV-1a: stable across processes, unlike hash()
        value = ((value ^ byte) * 0x100000001B3) & 0x7FFFFFFFFFFFFFFF
    return value
