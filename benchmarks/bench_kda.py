"""How fast is the chunk form of KDA on a CPU, beside its definition, its peers and the floor?

    python -m benchmarks.bench_kda              # all of it
    python -m benchmarks.bench_kda precisions   # bf16 against fp32 alone

Each row runs in a process of its own, which also measures the machine's fp32 matrix product (the
floor), what the row adds to the process's peak memory, and how far its outputs are from the
definition in fp64 (RMS of the difference to RMS of the outputs). The ratios are of one run. Useful
operations forward: T H (640 K + 6 K V). Peers: transformers' torch path, and flash-linear-
attention's naive chunk form, which is skipped where fla-core is not installed. It needs neither a
GPU nor Triton:

    pip install --no-deps --target build/fla fla-core==0.5.2 einops
    PYTHONPATH=build/fla python -m benchmarks.bench_kda
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import benchmarks.machine as machine  # before torch
import torch
from torch import Tensor
from torch.nn.functional import normalize

from deltamoe.ops.kda import kda_chunk, kda_recurrent

T, H, K, V = 2048, 8, 128, 128
USEFUL = T * H * (640 * K + 6 * K * V)
OURS, NARROW, PEER = "chunk, native", "chunk, native, bf16", "transformers, torch path"


def inputs(time: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random inputs at the 48B's head size; gradients are wanted for all."""
    q = normalize(torch.randn(1, time, H, K), dim=-1) * K**-0.5
    k = normalize(torch.randn(1, time, H, K), dim=-1)
    v = torch.randn(1, time, H, V)
    log_decay = -torch.rand(1, time, H, K)
    beta = torch.rand(1, time, H)
    halves = [x.to(dtype) for x in (q, k, v)]
    return [x.requires_grad_() for x in (*halves, log_decay, beta)]


def transformers_chunk() -> Callable[..., Any]:
    from transformers.models.kimi_linear import modeling_kimi_linear as peer

    def function(q: Tensor, *others: Tensor) -> Any:
        return peer.chunk_kimi_delta_attention(q * K**0.5, *others)  # it brings the scale itself

    return function


def fla_naive() -> Callable[..., Any]:
    """The file alone: the package around it needs Triton."""
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        raise ImportError("fla-core is not installed; the docstring says how")
    path = Path(package.submodule_search_locations[0]) / "ops" / "kda" / "naive.py"
    spec = importlib.util.spec_from_file_location("fla_naive_kda", path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return partial(module.naive_chunk_kda, scale=1.0)


# name: (what makes the function, dtype of q, k and v, repeats)
ROWS: dict[str, tuple[Callable[[], Callable[..., Any]], torch.dtype, int]] = {
    OURS: (lambda: partial(kda_chunk, backend="native"), torch.float32, 11),
    NARROW: (lambda: partial(kda_chunk, backend="native"), torch.bfloat16, 11),
    "chunk, dyadic (PyTorch)": (lambda: partial(kda_chunk, backend="dyadic"), torch.float32, 5),
    "recurrent, reference": (
        lambda: partial(kda_recurrent, backend="reference"),
        torch.float32,
        1,
    ),
    PEER: (transformers_chunk, torch.float32, 1),
    "fla, naive_chunk": (fla_naive, torch.float32, 1),
}


def resident() -> int:
    """Peak bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str) -> dict[str, float]:
    make, dtype, repeats = ROWS[name]
    function = make()
    a = torch.randn(2048, 2048)
    peak = 2 * 2048**3 / machine.median_seconds(lambda: a @ a)
    tensors = inputs(T, dtype)
    before = resident()

    def forward() -> None:
        with torch.no_grad():
            function(*tensors)

    def both() -> None:
        out = function(*tensors)[0]
        torch.autograd.grad(out, tensors, torch.ones_like(out))

    return {
        "forward": machine.median_seconds(forward, repeats),
        "both": machine.median_seconds(both, repeats),
        "extra_bytes": resident() - before,
        "peak": peak,
        "error": error(function, tensors),
    }


@torch.no_grad()
def error(function: Callable[..., Any], tensors: list[Tensor]) -> float:
    """RMS of the difference to the definition in fp64, as a share of its RMS."""
    exact = kda_recurrent(*(x.double() for x in tensors), backend="reference")[0]
    difference = function(*tensors)[0].double() - exact
    return float(difference.norm() / exact.norm())


def run(tensors: list[Tensor], *, has_gradient: bool) -> None:
    """The native chunk form, forward or both ways."""
    with torch.set_grad_enabled(has_gradient):
        out = kda_chunk(*tensors, backend="native")[0]
        if has_gradient:
            torch.autograd.grad(out, tensors, torch.ones_like(out))


def precisions() -> None:
    """What bf16 gains, in turns with fp32, beside what it gains in a square matrix product."""
    a = torch.randn(2048, 2048)
    narrow = a.bfloat16()
    wide_inputs, narrow_inputs = inputs(T), inputs(T, torch.bfloat16)
    everything = torch.get_num_threads()
    print("\nfp32 / bf16, in turns       forward       both ways     matrix product")
    for threads in sorted({1, everything}):
        torch.set_num_threads(threads)
        runs: dict[str, Callable[[], object]] = {
            "forward fp32": partial(run, wide_inputs, has_gradient=False),
            "forward bf16": partial(run, narrow_inputs, has_gradient=False),
            "both fp32": partial(run, wide_inputs, has_gradient=True),
            "both bf16": partial(run, narrow_inputs, has_gradient=True),
            "product fp32": partial(torch.mm, a, a),
            "product bf16": partial(torch.mm, narrow, narrow),
        }
        seconds = machine.interleaved_seconds(runs, 11)
        pairs = [
            (seconds[f"{what} fp32"], seconds[f"{what} bf16"])
            for what in ("forward", "both", "product")
        ]
        columns = [f"{x * 1e3:5.1f} / {y * 1e3:5.1f} = {x / y:.2f}" for x, y in pairs]
        print(f"{threads} threads, ms         ", "   ".join(columns), flush=True)
    torch.set_num_threads(everything)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=["precisions", *ROWS])
    what = parser.parse_args().what
    torch.manual_seed(0)
    if what == "precisions":
        return precisions()
    if what:
        return print(json.dumps(measure(what)))
    print(machine.describe())
    columns = "forward   of fp32 peak   both ways   extra memory     error"
    print(f"\nH={H} K={K} V={V} T={T}      {columns}")
    rows = {}
    for name in ROWS:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.bench_kda", name],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            print(f"{name:26s} not measured: {done.stderr.strip().splitlines()[-1]}")
            continue
        row = rows[name] = json.loads(done.stdout.splitlines()[-1])
        share = USEFUL / row["forward"] / row["peak"]
        print(
            f"{name:26s} {row['forward'] * 1e3:6.1f} ms {share:14.1%} "
            f"{row['both'] * 1e3:8.1f} ms {row['extra_bytes'] / 2**20:10.0f} MiB "
            f"{row['error']:9.1e}",
            flush=True,
        )
    ours = rows[OURS]
    print("\nnative in fp32 against        forward   both ways   memory")
    for name, row in rows.items():
        if name != OURS:
            print(
                f"{name:26s} {row['forward'] / ours['forward']:8.2f} x "
                f"{row['both'] / ours['both']:8.2f} x "
                f"{row['extra_bytes'] / ours['extra_bytes']:7.1f} x"
            )
    if (peer := rows.get(PEER)) and (narrow := rows.get(NARROW)):
        print("native in bf16 against")
        print(
            f"{PEER:26s} {peer['forward'] / narrow['forward']:8.2f} x "
            f"{peer['both'] / narrow['both']:8.2f} x "
            f"{peer['extra_bytes'] / narrow['extra_bytes']:7.1f} x"
        )

    precisions()
    print("\nprefill: the cost of a token must not grow with the length")
    for time in (1024, 2048, 4096, 8192, 16384):
        tensors = [x.detach() for x in inputs(time)]
        each = machine.median_seconds(partial(kda_chunk, *tensors), 5) / time
        print(f"T = {time:6d}: {each * 1e6:7.2f} us a token")


if __name__ == "__main__":
    main()
