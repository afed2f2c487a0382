"""Cross entropy of rows of logits, leaving its gradient where the logits were.

    loss[n] = log sum_v e^logits[n, v] - logits[n, target[n]]

Lives here: the operator and, in ``reference.py``, its definition; the CPU's kernel is
``native.py`` over ``ops/native/loss.cpp``. Knows logits, not where they come from.
May import: ``deltamoe.errors`` and the rest of ``deltamoe.ops``.
"""

from jaxtyping import Float, Int
from torch import Tensor

from deltamoe.ops.backend import select

__all__ = ["cross_entropy_"]


def cross_entropy_(
    logits: Float[Tensor, "n vocab"],
    targets: Int[Tensor, "n"],
    *,
    no_target: int,
    gradient_scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "n"]:
    """Return each row's loss, in nats; not differentiable, for it brings its own gradient.

    Args:
        logits: overwritten by ``gradient_scale (softmax - onehot)``, in their dtype, and by zeros
            in rows without a target. Without ``gradient_scale`` what they hold afterwards is
            undefined.
        targets: int64 in [0, vocab), or ``no_target``.
        no_target: stands where nothing is to be predicted; not in [0, vocab).
        gradient_scale: what the gradient is multiplied by; None computes none.
        backend: a name from ``deltamoe backends``, or "auto".

    Returns:
        Losses in fp32 (fp64 for fp64 logits), 0 in rows without a target.
    """
    module = select("cross_entropy", backend, logits.device.type, logits.dtype)
    losses: Tensor = module.cross_entropy_(logits, targets, no_target, gradient_scale)
    return losses
