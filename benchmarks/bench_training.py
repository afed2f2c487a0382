"""How fast does a training step run, and how much memory does it take?

    python benchmarks/bench_training.py

1. The demo's model (`nano`) with KDA's best backend, and with its definition, token by token.
2. Peak memory of a 4,096-token step of `mini`, in a process of its own.
"""

import resource
import subprocess
import sys
from typing import Any
from unittest.mock import patch

import torch
from machine import describe, median_seconds

from deltamoe.config import RunConfig, preset
from deltamoe.model import HybridLM
from deltamoe.ops.kda import kda_recurrent
from deltamoe.training.loss import next_token_loss


def build(config: RunConfig) -> HybridLM:
    model = HybridLM(config.model)
    model.initialize(0)
    return model.train()


def step(model: HybridLM, ids: torch.Tensor, borders: torch.Tensor) -> None:
    """Forward and backward over one packed batch that predicts itself."""
    model.zero_grad(set_to_none=True)
    hidden = model.hidden(ids[None], cu_seqlens=borders).hidden
    loss = next_token_loss(hidden[0], ids, model.head_weight, num_targets=len(ids))
    loss.backward()


def recurrent_reference(*tensors: Any, **options: Any) -> Any:
    """The definition of KDA, in the place of its chunk form."""
    return kda_recurrent(*tensors, **{**options, "backend": "reference"})


def batch(config: RunConfig, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    context = config.data.context
    ids = torch.randint(0, config.model.vocab_size, (rows * context,))
    return ids, torch.arange(0, rows * context + 1, context)


def speed() -> None:
    config = preset("nano")
    model = build(config)
    rows = config.data.rows
    print(f"\nnano, {rows} x {config.data.context} tokens a step, fp32, without the optimizer")
    fast = batch(config, rows)
    rate = len(fast[0]) / median_seconds(lambda: step(model, *fast), 5)
    print(f"chunk, best backend       {rate:8.0f} tokens/s")
    with patch("deltamoe.layers.kda.kda_chunk", recurrent_reference):
        slow = batch(config, 1)
        slow_rate = len(slow[0]) / median_seconds(lambda: step(model, *slow), 1)
    print(f"recurrent, reference      {slow_rate:8.0f} tokens/s")
    print(f"ratio {rate / slow_rate:.1f}")


def memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = preset("mini")
    model = build(config)
    ids, borders = batch(config, 4096 // config.data.context)
    step(model, ids, borders)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"mini, {len(ids)} tokens, forward and backward: peak {after / 2**20:.2f} GiB resident, "
        f"{(after - before) / 2**20:.2f} GiB of it the model and the step"
    )


def main() -> None:
    torch.manual_seed(0)
    if sys.argv[1:] == ["memory"]:
        memory()
        return
    print(describe())
    speed()
    sys.stdout.flush()
    print()
    subprocess.run([sys.executable, __file__, "memory"], check=True)


if __name__ == "__main__":
    main()
