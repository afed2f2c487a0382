"""MuonAdamW: Muon on the matrices, AdamW on everything else, in one optimizer.

A parameter's treatment follows from its *name* (``RULES``), never from its number of dimensions: a
stack of experts and a depthwise convolution are both 3-D or 2-D and want opposite things. Muon
replaces a matrix's momentum by the nearest matrix with equal singular values, found by five
Newton-Schulz steps, and scales it to the size of an AdamW update. A stack [E, F, D] is E matrices.

Knows names and tensors; nothing of modules, losses or schedules (the loop sets ``lr``).

Source: Muon is Scalable for LLM Training (arXiv 2502.16982), section 2; Kimi Linear
(arXiv 2510.26692), section 5. The momentum and the scale are those of ``torch.optim.Muon`` with
``adjust_lr_fn="match_rms_adamw"``, which takes 2-D tensors only.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from deltamoe.config.run import OptimizerConfig
from deltamoe.errors import CheckpointError
from deltamoe.ops.muon import muon_step_

__all__ = ["RULES", "MuonAdamW", "Rule", "fastest_dtype", "rule_for"]

Method = Literal["muon", "adamw"]


class Rule(NamedTuple):
    """How the parameters whose whole name matches ``pattern`` are optimized."""

    pattern: str
    method: Method
    has_weight_decay: bool


# The first match decides. beta_proj has a row for each head and nothing between them that an
# orthogonal update could use. The router's weight goes with Muon, as in the published recipes:
# after 120 steps of a small run the loss was AdamW's, with 1 dead expert instead of 5.
RULES = (
    Rule(r"(embedding|head)\.weight", "adamw", True),
    Rule(r"(.*[._])?norm\.weight", "adamw", False),
    Rule(r".*\.(A_log|dt_bias)", "adamw", False),
    Rule(r".*\.[qkv]_conv\.weight", "adamw", True),
    Rule(r".*\.(beta_proj|noise_proj)\.weight", "adamw", True),
    Rule(r".*\.([qkvo]|latent)_proj\.weight", "muon", True),
    Rule(r".*\.(q|decay|output_gate)_(down|up)\.weight", "muon", True),
    Rule(r".*\.(latent_up|router)\.weight", "muon", True),
    Rule(r".*\.(w_gate|w_up|w_down)(\.weight)?", "muon", True),
)


def rule_for(name: str) -> Rule:
    """The first rule that matches a parameter's name; ValueError if none does."""
    for rule in RULES:
        if re.fullmatch(rule.pattern, name):
            return rule
    raise ValueError(f"no optimizer rule matches the parameter {name!r}: add it to RULES")


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The dtype whose products are fastest here: bf16 if the device multiplies it natively.

    A run records the answer and keeps it, so that a resumed run computes the same numbers.
    """
    has_fast_bf16 = device.type != "cpu" or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_fast_bf16 else torch.float32


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the parameters whose rule says so, AdamW for the others.

    Every group carries ``peak_lr``; the loop sets ``lr`` through ``scale_learning_rates``.

    Args:
        named_parameters: of the model; each name must match a rule.
        config: learning rates, weight decay, moments. ``name="adamw"`` overrules the rules'
            method and keeps their weight decay.
        newton_schulz_dtype: dtype of the Newton-Schulz iterations.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        config: OptimizerConfig,
        *,
        newton_schulz_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.betas = (config.beta1, config.beta2)
        self.eps = config.eps
        self.momentum = config.momentum
        self.newton_schulz_dtype = newton_schulz_dtype
        self.names: dict[Tensor, str] = {}
        groups: dict[tuple[Method, bool], list[Tensor]] = {}
        for name, parameter in named_parameters:
            rule = rule_for(name)
            method = rule.method if config.name == "muon" else "adamw"
            groups.setdefault((method, rule.has_weight_decay), []).append(parameter)
            self.names[parameter] = name
        super().__init__(
            [
                {
                    "params": parameters,
                    "method": method,
                    "weight_decay": config.weight_decay if has_weight_decay else 0.0,
                    "peak_lr": config.muon_lr if method == "muon" else config.lr,
                    "lr": config.muon_lr if method == "muon" else config.lr,
                }
                for (method, has_weight_decay), parameters in groups.items()
            ],
            {},
        )

    def scale_learning_rates(self, factor: float) -> None:
        """Set each group's learning rate to ``factor`` times its peak."""
        for group in self.param_groups:
            group["lr"] = factor * group["peak_lr"]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Any) -> float: ...
    @torch.no_grad()
    def step(self, closure: Any = None) -> float | None:
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("MuonAdamW takes no closure: compute the gradients, then call step()")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters and group["method"] == "muon":
                self._step_muon(parameters, group["lr"], group["weight_decay"])
            elif parameters:
                self._step_adamw(parameters, group["lr"], group["weight_decay"])
        return None

    def _step_muon(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        muon_step_(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [self._moments(p, "momentum")["momentum"] for p in parameters],
            lr=lr,
            weight_decay=weight_decay,
            beta=self.momentum,
            dtype=self.newton_schulz_dtype,
        )

    def _step_adamw(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        states = [
            self._moments(p, "first_moment", "second_moment", "num_updates") for p in parameters
        ]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["first_moment"] for state in states],
            [state["second_moment"] for state in states],
            [],
            [state["num_updates"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )

    def _moments(self, parameter: Tensor, *kinds: str) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            for kind in kinds:
                state[kind] = _zeros(parameter, kind)
        return state

    def named_state(self) -> dict[str, Tensor]:
        """The state as ``PARAMETER.KIND`` -> tensor, to be saved; the tensors are not copied."""
        return {
            f"{self.names[parameter]}.{kind}": tensor
            for parameter, state in self.state.items()
            for kind, tensor in state.items()
        }

    def load_named_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what ``named_state`` gave, exactly.

        Raises:
            CheckpointError: a tensor belongs to no parameter here, or has another shape.
        """
        parameters = {name: parameter for parameter, name in self.names.items()}
        self.state.clear()
        for key, tensor in tensors.items():
            name, _, kind = key.rpartition(".")
            if name not in parameters:
                raise CheckpointError(
                    f"the optimizer state {key!r} belongs to no parameter of this model"
                )
            state = self.state[parameters[name]]
            state[kind] = _zeros(parameters[name], kind)
            if state[kind].shape != tensor.shape:
                raise CheckpointError(
                    f"the optimizer state {key!r} has shape {list(tensor.shape)}; "
                    f"this model needs {list(state[kind].shape)}"
                )
            state[kind].copy_(tensor)


def _zeros(parameter: Tensor, kind: str) -> Tensor:
    if kind == "num_updates":
        return torch.zeros((), dtype=torch.float32, device=parameter.device)
    return torch.zeros_like(parameter, memory_format=torch.contiguous_format)
