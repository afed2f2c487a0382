"""What a run costs as a whole, and whether a machine has that much memory.

Knows nothing of single tensors' shapes.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deltamoe.config import ModelConfig, RunConfig
from deltamoe.plan.costs import (
    activation_bytes,
    cache_bytes_per_token,
    flops_per_token,
    state_bytes_per_sequence,
    widest_precision,
)
from deltamoe.plan.inventory import Bits, Dtype, Parameters, parameters, stored_bytes, weights

__all__ = [
    "GenerationPlan",
    "Plan",
    "TrainingPlan",
    "generation_plan",
    "machine_memory",
    "plan",
]

_PROGRAM_BYTES = 1 << 30  # the program and torch, 500 MiB, and the activations of a prompt


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What training costs; sizes in bytes.

    Weights, their gradients and the optimizer's moments are fp32: two moments for AdamW, one for a
    matrix under Muon. ``compute_copies`` are the bf16 copies that autocast keeps of the weights.
    ``checkpoint_bytes`` is one checkpoint: weights and moments. ``flops`` is three times the
    forward pass over all ``tokens``; what ``checkpoint_activations`` computes again is not in it.
    """

    tokens_per_step: int
    tokens: int
    flops: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    compute_copies: int
    activation_bytes: int
    total_bytes: int
    checkpoint_bytes: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """What generating costs in ``dtype``; sizes in bytes.

    ``bits`` is what the matrices are quantised to, None if they are not. ``sequence_bytes`` is one
    sequence's state and its cache at ``Plan.context`` tokens; ``sequences_that_fit`` is how many
    find room beside the weights. ``expert_bytes`` is one routed expert, of ``num_experts`` in all
    layers together. ``resident_bytes`` is everything but them: the other weights, one sequence, and
    a generous share for the program; ``cached_experts`` is how many find room beside it, if the
    others stay on the disk.
    """

    dtype: Dtype
    bits: Bits | None
    weight_bytes: int
    expert_bytes: int
    num_experts: int
    resident_bytes: int
    cached_experts: int
    sequence_bytes: int
    total_bytes: int
    sequences_that_fit: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The costs of one run.

    Attributes:
        parameters: counts.
        context: the length, in tokens, that the following figures are for.
        flops_per_token: forward, mean over ``context`` tokens read at once (chunk form).
        flops_per_next_token: forward, one token after ``context`` (recurrent form).
        state_bytes_per_sequence, cache_bytes_per_token: of one sequence, in ``generation.dtype``.
        memory_bytes: what ``fits`` is judged by.
        training, generation: see there.
    """

    parameters: Parameters
    context: int
    flops_per_token: int
    flops_per_next_token: int
    state_bytes_per_sequence: int
    cache_bytes_per_token: int
    memory_bytes: int
    training: TrainingPlan
    generation: GenerationPlan


def plan(
    run: RunConfig,
    *,
    context: int | None = None,
    memory_bytes: int | None = None,
    dtype: Dtype | None = None,
    bits: Bits | None = None,
) -> Plan:
    """Work out what a run costs.

    Args:
        run: the configuration.
        context: tokens of a sequence; None means the training context.
        memory_bytes: memory to fit in; None means this machine's.
        dtype: of weights, convolution tail and cache when generating; None means the precision
            of training.
        bits: of the matrices when generating; None means that they are in ``dtype``.
    """
    context = run.data.context if context is None else context
    memory_bytes = machine_memory() if memory_bytes is None else memory_bytes
    dtype = widest_precision(run) if dtype is None else dtype
    return Plan(
        parameters=parameters(run.model),
        context=context,
        flops_per_token=flops_per_token(run.model, context=context),
        flops_per_next_token=flops_per_token(run.model, context=context, form="recurrent"),
        state_bytes_per_sequence=state_bytes_per_sequence(run.model, dtype),
        cache_bytes_per_token=cache_bytes_per_token(run.model, dtype),
        memory_bytes=memory_bytes,
        training=_training(run, memory_bytes),
        generation=generation_plan(
            run.model, context=context, memory_bytes=memory_bytes, dtype=dtype, bits=bits
        ),
    )


_CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def machine_memory() -> int:
    """Bytes of memory that this process may come to have: the machine's, or its container's."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in _CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # no container; "max" is no limit
            memory = min(memory, int(limit.read_text()))
    return memory


def _training(run: RunConfig, memory_bytes: int) -> TrainingPlan:
    tokens_per_step = run.data.rows * run.data.context * run.train.accumulate
    tokens = tokens_per_step * run.train.steps
    all_weights = list(weights(run.model))
    size = sum(w.size for w in all_weights)
    trained = sum(w.size for w in all_weights if w.optimizer != "none")
    by_muon = sum(w.size for w in all_weights if w.optimizer == "muon")
    moments = 2 * trained - (by_muon if run.optimizer.name == "muon" else 0)
    copies = 0 if run.train.precision == "fp32" else 2 * trained
    activations = activation_bytes(run)
    total = 4 * (size + trained + moments) + copies + activations
    return TrainingPlan(
        tokens_per_step=tokens_per_step,
        tokens=tokens,
        flops=3 * flops_per_token(run.model, context=run.data.context) * tokens,
        weight_bytes=4 * size,
        gradient_bytes=4 * trained,
        optimizer_bytes=4 * moments,
        compute_copies=copies,
        activation_bytes=activations,
        total_bytes=total,
        checkpoint_bytes=4 * (size + moments),
        fits=total <= memory_bytes,
    )


def generation_plan(
    config: ModelConfig,
    *,
    context: int,
    memory_bytes: int,
    dtype: Dtype,
    bits: Bits | None = None,
) -> GenerationPlan:
    """Work out what generating costs; the arguments are those of ``plan``."""
    sequence = state_bytes_per_sequence(config, dtype)
    sequence += context * cache_bytes_per_token(config, dtype)
    sizes = [(weight.part, stored_bytes(weight, dtype, bits)) for weight in weights(config)]
    weight_bytes = sum(size for _, size in sizes)
    all_experts = sum(size for part, size in sizes if part == "experts")
    sparse = sum(config.channel(layer) == "moe" for layer in range(config.num_layers))
    num_experts = sparse * config.moe.num_experts if config.moe else 0
    expert_bytes = all_experts // max(num_experts, 1)
    total = weight_bytes + sequence
    resident = total - all_experts + _PROGRAM_BYTES
    return GenerationPlan(
        dtype=dtype,
        bits=bits,
        weight_bytes=weight_bytes,
        expert_bytes=expert_bytes,
        num_experts=num_experts,
        resident_bytes=resident,
        cached_experts=min(num_experts, max(memory_bytes - resident, 0) // max(expert_bytes, 1)),
        sequence_bytes=sequence,
        total_bytes=total,
        sequences_that_fit=max(memory_bytes - weight_bytes, 0) // sequence if sequence else 0,
        fits=total <= memory_bytes,
    )
