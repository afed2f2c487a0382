"""Do more experts help at equal active FLOPs and equal tokens?

    python -m benchmarks.bench_experts [--steps N] [--runs FOLDER]

Trains experts.toml with a dense channel and with 4, 16 and 64 experts, top 2, each as wide as half
the dense channel: what a token passes through costs the same. Prints a table and writes
results/experts.{json,md} and docs/experts.png. The runs stay in FOLDER (runs/experts): interrupted,
the same command goes on where it was.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import benchmarks.machine as machine
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from deltamoe.config import resolve
from deltamoe.plan import plan

HERE = Path(__file__).parent
VARIANTS = {
    "dense": ["model.first_dense_layers=4"],
    "4 experts": ["model.moe.num_experts=4"],
    "16 experts": ["model.moe.num_experts=16"],
    "64 experts": ["model.moe.num_experts=64"],
}


def train(name: str, steps: int, folder: Path) -> dict[str, Any]:
    """Train one variant on one thread and return its row of the table."""
    overrides = [*VARIANTS[name], "train.threads=1", f"train.steps={steps}"]
    costs = plan(resolve(str(HERE / "experts.toml"), overrides)[0])
    run = folder / name.replace(" ", "-")
    command = [sys.executable, "-m", "deltamoe", "train", str(HERE / "experts.toml")]
    subprocess.run([*command, "--out", str(run), "--resume", *overrides], check=True)
    records = [json.loads(r) for r in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "channel": name,
        "total": costs.parameters.total,
        "active": costs.parameters.active,
        "flops_per_token": costs.flops_per_token,
        "validation_bits_per_byte": records[-1]["validation_bits_per_byte"],
        "max_vio": max(records[-1]["max_vio"].values(), default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "experts")
    given = parser.parse_args()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # one variant a core, the longest first
        rows = list(pool.map(lambda name: train(name, given.steps, given.runs), reversed(VARIANTS)))
    rows.reverse()
    table = [
        "| channel | total parameters | active | FLOPs a token | validation bits/byte |"
        " MaxVio at the end |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        table.append(
            f"| {r['channel']} | {r['total']:,} | {r['active']:,} | {r['flops_per_token']:,} | "
            f"{r['validation_bits_per_byte']:.4f} | {r['max_vio']:.2f} |"
        )
    tokens = f"{given.steps * 8 * 256:,} bytes of training text each, one seed."
    text = "\n".join([machine.describe(), "", tokens, "", *table]) + "\n"
    (machine.RESULTS / "experts.md").write_text("# More experts at equal active FLOPs\n\n" + text)
    (machine.RESULTS / "experts.json").write_text(
        json.dumps({"machine": machine.describe(), "rows": rows})
    )
    figure, axes = plt.subplots(figsize=(6, 3.6))
    axes.plot([r["total"] / 1e6 for r in rows], [r["validation_bits_per_byte"] for r in rows], "o-")
    for r in rows:
        at = (r["total"] / 1e6, r["validation_bits_per_byte"])
        axes.annotate(r["channel"], at, xytext=(6, 6), textcoords="offset points")
    axes.set(
        xscale="log",
        xlabel="total parameters (millions)",
        ylabel="validation bits per byte",
        title="Equal active FLOPs, equal tokens",
    )
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs" / "experts.png", dpi=120)
    print(text)


if __name__ == "__main__":
    main()
