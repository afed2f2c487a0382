"""What a configuration costs before anything is built: parameters, FLOPs, bytes.

Lives here: the list of every tensor a model will have, the arithmetic of what a token and a
sequence cost, and what a run costs as a whole. A test holds the list against the real modules.
May import: errors, config. Knows nothing of torch.
Read first: ``inventory.py``.
"""

from deltamoe.plan.budget import (
    GenerationPlan,
    Plan,
    TrainingPlan,
    generation_plan,
    machine_memory,
    plan,
)
from deltamoe.plan.costs import (
    activation_bytes,
    cache_bytes_per_token,
    flops_per_token,
    state_bytes_per_sequence,
)
from deltamoe.plan.inventory import (
    BITS,
    PARTS,
    Bits,
    Parameters,
    Weight,
    parameters,
    quantized_bits,
    quantized_shapes,
    weights,
)

__all__ = [
    "BITS",
    "PARTS",
    "Bits",
    "GenerationPlan",
    "Parameters",
    "Plan",
    "TrainingPlan",
    "Weight",
    "activation_bytes",
    "cache_bytes_per_token",
    "flops_per_token",
    "generation_plan",
    "machine_memory",
    "parameters",
    "plan",
    "quantized_bits",
    "quantized_shapes",
    "state_bytes_per_sequence",
    "weights",
]
