"""From logits to the log of the decay, in fp32 (fp64 for fp64 inputs).

Two activations, which are two different models and never stand in for one another:

    softplus   log_decay = -exp(A_log) softplus(logits + dt_bias)             unbounded below
    bounded    log_decay = lower_bound sigmoid(exp(A_log) (logits + dt_bias))  >= lower_bound

Lives here: the operator and, in ``reference.py``, its definition; the CPU's kernel is
``native.py`` over ``ops/native/decay.cpp``.
Source: Kimi Linear (arXiv 2510.26692), section 4 and the published modeling code (softplus);
flash-linear-attention's "safe gate" (bounded). The names A_log and dt_bias are the checkpoints'.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from deltamoe.ops.backend import select
from deltamoe.ops.kda.decay import reference

__all__ = ["kda_decay"]


def kda_decay(
    logits: Float[Tensor, "B T HV K"],
    A_log: Float[Tensor, "HV"],
    dt_bias: Float[Tensor, "HV*K"],
    *,
    lower_bound: float | None = None,
) -> Float[Tensor, "B T HV K"]:
    """Turn decay logits into log_decay <= 0, one number a head and key channel.

    Args:
        logits: any real numbers, any floating dtype.
        A_log: log of the rate of each head.
        dt_bias: bias of each head and channel, heads outermost.
        lower_bound: None for the softplus form; a number in [-5, 0) for the bounded form.

    Returns:
        The natural log of the per-step retention, fp32 (fp64 for fp64 logits).
    """
    # torch.compile traces PyTorch's operations, and fuses them itself.
    is_traced = torch.compiler.is_compiling()
    module = (
        reference if is_traced else select("kda_decay", "auto", logits.device.type, logits.dtype)
    )
    with torch.autocast(logits.device.type, enabled=False):
        result: Tensor = module.kda_decay(logits, A_log, dt_bias, lower_bound=lower_bound)
    return result
