"""How fast is the chunk form of KDA beside its definition, and does its cost grow linearly?

    python benchmarks/bench_kda.py

Prints medians and ratios of one run. The floor is the same run's fp32 matrix product, with
T H (640 K + 6 K V) useful operations forward (64-row tiles).
"""

from functools import partial

import torch
from machine import describe, median_seconds
from torch import Tensor
from torch.nn.functional import normalize

from deltamoe.ops.kda import kda_chunk, kda_recurrent

H, K, V = 8, 128, 128


def inputs(T: int) -> list[Tensor]:
    """Random inputs at the 48B's head size; gradients are wanted for all."""
    q = normalize(torch.randn(1, T, H, K), dim=-1) * K**-0.5
    k = normalize(torch.randn(1, T, H, K), dim=-1)
    v = torch.randn(1, T, H, V)
    log_decay = -torch.rand(1, T, H, K)
    beta = torch.rand(1, T, H)
    return [x.requires_grad_() for x in (q, k, v, log_decay, beta)]


def forward(function, tensors: list[Tensor], **options: str) -> None:
    with torch.no_grad():
        function(*tensors, **options)


def both(function, tensors: list[Tensor], **options: str) -> None:
    out, _ = function(*tensors, **options)
    torch.autograd.grad(out.sum(), tensors)


def main() -> None:
    torch.manual_seed(0)
    print(describe())
    a = torch.randn(2048, 2048)
    peak = 2 * 2048**3 / median_seconds(lambda: a @ a)
    print(f"fp32 matrix product {peak / 1e9:.0f} GFLOP/s")

    T = 2048
    tensors = inputs(T)
    print(f"\nH={H} K={K} V={V} T={T}, fp32         forward    forward + backward")
    rows = {
        "recurrent, reference": (kda_recurrent, "reference", 1),
        "chunk, reference": (kda_chunk, "reference", 1),
        "chunk, dyadic": (kda_chunk, "dyadic", 5),
    }
    seconds = {}
    for name, (function, backend, repeats) in rows.items():
        seconds[name] = [
            median_seconds(partial(run, function, tensors, backend=backend), repeats)
            for run in (forward, both)
        ]
        one, two = seconds[name]
        print(f"{name:28s} {one * 1e3:10.1f} ms {two * 1e3:17.1f} ms", flush=True)
    ours, slow = seconds["chunk, dyadic"], seconds["recurrent, reference"]
    useful = T * H * (640 * K + 6 * K * V)
    print(
        f"dyadic is {slow[0] / ours[0]:.1f} x the recurrence forward, {slow[1] / ours[1]:.1f} x "
        f"both ways, and runs at {useful / ours[0] / peak:.0%} of the matrix product forward"
    )

    print("\nprefill, dyadic: the cost of a token must not grow with the length")
    for T in (1024, 2048, 4096, 8192, 16384):
        tensors = [x.detach() for x in inputs(T)]
        each = median_seconds(partial(forward, kda_chunk, tensors), 3) / T
        print(f"T = {T:6d}: {each * 1e6:7.2f} us a token")


if __name__ == "__main__":
    main()
