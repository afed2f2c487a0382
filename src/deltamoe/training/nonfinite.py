"""Where a NaN or an infinity came from.

Training stops before the update, so the weights are still good and the step can be run again: a
forward pass with a hook on every module finds the first output that is not finite. If the outputs
are good and a gradient is not, the parameter nearest to the loss is named, for there the backward
pass met it first. Knows modules, not what they compute.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deltamoe.errors import NonFiniteError

__all__ = ["StepNotFiniteError", "first_bad_gradient", "first_bad_output"]


class StepNotFiniteError(NonFiniteError):
    """A step met a NaN or an infinity; ``details`` is plain data for a file."""

    def __init__(self, message: str, details: dict[str, Any]) -> None:
        super().__init__(message)
        self.details = details


def first_bad_output(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Name the first module whose output holds a NaN or an infinity while ``forward`` runs.

    A module finishes after the modules inside it, so the name is the innermost one.
    """
    bad: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not bad and not all(_is_finite(t) for t in _tensors(output)):
                bad.append(name or "the model")

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return bad[0] if bad else None


def first_bad_gradient(model: nn.Module) -> str | None:
    """Name the last parameter, in the model's order, whose gradient is not finite.

    For a stack of experts the experts' numbers are named as well.
    """
    for name, parameter in reversed(list(model.named_parameters())):
        gradient = parameter.grad
        if gradient is None or _is_finite(gradient):
            continue
        if gradient.ndim == 3:
            rows = (~gradient.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
            return f"{name} (expert {', '.join(map(str, rows))})"
        return name
    return None


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _tensors(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
