"""The learning rate as a pure function of the step.

A factor in [0, 1] multiplies the peak learning rate of every optimizer group. Steps are counted
from 0; the last step of a run is ``steps - 1``. Knows nothing of optimizers or of time.

Source: MiniCPM (arXiv 2404.06395) for warm-up, stable, decay; Hägele et al. (arXiv 2405.18392)
for the 1 - sqrt shape of the decay.
"""

import math

from deltamoe.config.run import OptimizerConfig

__all__ = ["learning_rate_factor"]


def learning_rate_factor(step: int, *, steps: int, config: OptimizerConfig) -> float:
    """The share of the peak learning rate that step ``step`` of ``steps`` uses.

    Warm-up rises linearly and reaches 1 at step ``warmup_steps - 1``. "wsd" then stays at 1 until
    the last ``decay_fraction`` of the run; "cosine" falls from the warm-up on; "constant" never
    falls. What falls ends at ``final_lr_fraction`` at the last step.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return warmup
    share = config.decay_fraction if config.schedule == "wsd" else 1.0
    decay_start = max(config.warmup_steps, steps - round(share * steps))
    if step < decay_start:
        return warmup
    # The first falling step has already left 1, so that the fall is as long as it was asked to be.
    progress = min(1.0, (step - decay_start + 1) / max(1, steps - decay_start))
    if config.schedule == "cosine":
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        remaining = 1.0 - math.sqrt(progress)
    return config.final_lr_fraction + (1.0 - config.final_lr_fraction) * remaining
