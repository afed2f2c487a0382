"""How fast does a training step run, and how much memory does it take?

    python -m benchmarks.bench_training [peer]

1. Peak memory of a 4,096-token step of `mini`, in a process of its own.
2. The demo's model (`nano`) in fp32 and in bf16, and with KDA's definition, token by token.
3. `mini` in fp32 and bf16, as a share of the same run's matrix product.
4. `mini` with its optimizer (Muon) beside transformers' own implementation of the same weights
   with AdamW, both in fp32, in processes that take turns ("peer": this alone).

Without the optimizer but for 4. The variants take turns, so that a slow minute hits them all.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import benchmarks.machine as machine  # before torch
import torch

from deltamoe.checkpoint.folder import CONFIG, WEIGHTS, write_new_folder
from deltamoe.checkpoint.tensors import write_tensors
from deltamoe.config import RunConfig, preset, to_json
from deltamoe.conversion import convert
from deltamoe.model import HybridLM
from deltamoe.ops.kda import kda_recurrent
from deltamoe.plan import flops_per_token
from deltamoe.training.loss import next_token_loss
from deltamoe.training.optimizer import MuonAdamW, fastest_dtype

PEER_ROUNDS, PEER_ROWS = 2, 2


def build(config: RunConfig) -> HybridLM:
    model = HybridLM(config.model)
    model.initialize(0)
    return model.train()


def step(model: HybridLM, ids: torch.Tensor, borders: torch.Tensor, *, bf16: bool = False) -> None:
    """Forward and backward over one packed batch that predicts itself."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
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


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a square product."""
    a = torch.randn(2048, 2048).to(dtype)
    return 2 * 2048**3 / machine.median_seconds(lambda: a @ a)


def rates(config: RunConfig, repeats: int) -> dict[str, float]:
    """Tokens a second in fp32 and bf16, medians of turns, and each one's share of the peak."""
    model = build(config)
    tokens = batch(config, max(1, 4096 // config.data.context))
    runs = {"fp32": partial(step, model, *tokens), "bf16": partial(step, model, *tokens, bf16=True)}
    seconds = machine.interleaved_seconds(runs, repeats)
    flops = 3 * flops_per_token(config.model, context=config.data.context) * len(tokens[0])
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        share = flops / seconds[name] / matmul_rate(dtype)
        print(
            f"{name:24s} {len(tokens[0]) / seconds[name]:8.0f} tokens/s, "
            f"{share:.0%} of the {name} matrix product"
        )
    return {name: len(tokens[0]) / took for name, took in seconds.items()}


def speed() -> None:
    config = preset("nano")
    print(f"\nnano, 4,096 tokens a step in rows of {config.data.context}")
    ours = rates(config, 9)
    with patch("deltamoe.layers.kda.kda_chunk", recurrent_reference):
        model = build(config)
        slow = batch(config, 1)
        slow_rate = len(slow[0]) / machine.median_seconds(lambda: step(model, *slow), 1)
    print(f"{'KDA token by token, fp32':24s} {slow_rate:8.0f} tokens/s")
    for name, rate in ours.items():
        print(f"ratio in {name}: {rate / slow_rate:.1f}")
    config = preset("mini")
    print(f"\nmini, 4,096 tokens a step in rows of {config.data.context}")
    ours = rates(config, 3)
    print(f"bf16 is {ours['bf16'] / ours['fp32']:.2f} x fp32")


def our_step() -> Callable[[], object]:
    """Two rows of `mini`'s context: forward, backward and Muon as a run takes it."""
    config = preset("mini")
    model = build(config)
    tokens = batch(config, PEER_ROWS)
    optimizer = MuonAdamW(
        model.named_parameters(),
        config.optimizer,
        newton_schulz_dtype=fastest_dtype(torch.device("cpu")),
    )

    def run() -> None:
        step(model, *tokens)
        optimizer.step()

    return run


def their_step(folder: str) -> Callable[[], object]:
    """The same rows in transformers with AdamW, from the folder that ``convert`` wrote."""
    import transformers

    model = transformers.KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = batch(preset("mini"), PEER_ROWS)[0].view(PEER_ROWS, -1)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    return run


def one_side(folder: str) -> None:
    """Print what the steps of one implementation take; ours without a folder."""
    seconds = (
        machine.median_seconds(their_step(folder), 1)
        if folder
        else machine.median_seconds(our_step())
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))


def against_transformers() -> None:
    config = preset("mini")
    with tempfile.TemporaryDirectory() as temporary:
        ours, theirs = Path(temporary) / "ours", Path(temporary) / "theirs"

        def fill(path: Path) -> None:
            (path / CONFIG).write_text(to_json(config))
            write_tensors(path / WEIGHTS, dict(build(config).state_dict()))

        write_new_folder(ours, fill, expected_bytes=1 << 29)
        convert(ours, theirs, to="hf")
        found: dict[str, list[dict[str, float]]] = {"deltamoe": [], "transformers": []}
        for _ in range(PEER_ROUNDS):
            for name, folder in (("deltamoe", ""), ("transformers", str(theirs))):
                command = [sys.executable, "-m", "benchmarks.bench_training", "side", folder]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    tokens = PEER_ROWS * config.data.context
    print(f"\nmini, {tokens:,} tokens a step, fp32, forward, backward and optimizer")
    median = {
        name: {key: statistics.median(entry[key] for entry in entries) for key in entries[0]}
        for name, entries in found.items()
    }
    for name, entry in median.items():
        print(
            f"{name:24s} {entry['seconds']:8.2f} s, {tokens / entry['seconds']:8.0f} tokens/s, "
            f"peak {entry['peak'] / 2**30:.2f} GiB"
        )
    own, peer = median["deltamoe"], median["transformers"]
    print(
        f"ratio: {peer['seconds'] / own['seconds']:.1f} in time, "
        f"{peer['peak'] / own['peak']:.1f} in memory"
    )


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
    if sys.argv[1:2] == ["side"]:
        one_side(sys.argv[2])
        return
    print(machine.describe(), flush=True)
    if sys.argv[1:] == ["peer"]:
        against_transformers()
        return
    # before this process grows: a child's peak begins with its parent's
    subprocess.run([sys.executable, "-m", "benchmarks.bench_training", "memory"], check=True)
    against_transformers()
    speed()


if __name__ == "__main__":
    main()
