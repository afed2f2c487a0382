"""Character-level tiny Shakespeare against nanoGPT's published figure, same budget, three seeds.

    python -m benchmarks.bench_quality input.txt [--large]

The file is karpathy/char-rnn's input.txt (1,115,394 bytes). Each seed is one `deltamoe train` of
quality.toml (--large: quality-large.toml, meant for a GPU). The figure is the loss on the whole
validation split: windows of 256 characters, none overlapping, state reset at each; on the way a
part of it is read. The time is the whole command's, from start to that figure. Writes
results/quality.json and .md with the curve.
"""

import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import benchmarks.machine as machine

from deltamoe.config import resolve
from deltamoe.plan import plan

SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SEEDS = (0, 1, 2)
PUBLISHED = {"quality": 1.88, "quality-large": 1.4697}


def train(recipe: Path, text: Path, seed: int, folder: Path) -> tuple[list[dict[str, Any]], float]:
    """Train one seed; return the records that hold a validation, and the command's seconds."""
    command = [
        *(sys.executable, "-m", "deltamoe", "train", str(recipe), "--out", str(folder)),
        *(f"data.path={text}", f"train.seed={seed}"),
    ]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    took = time.perf_counter() - started
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [r for r in records if "validation_bits_per_byte" in r], took


def main() -> None:
    arguments = [a for a in sys.argv[1:] if not a.startswith("--")]
    if len(arguments) != 1:
        sys.exit("which text? make bench-quality TEXT=input.txt (karpathy/char-rnn's)")
    text = Path(arguments[0]).resolve()
    if hashlib.sha256(text.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{text} is not tiny Shakespeare: its sha256 should be {SHA256}")
    name = "quality-large" if "--large" in sys.argv else "quality"
    recipe = Path(__file__).parent / f"{name}.toml"
    costs = plan(resolve(str(recipe))[0])
    curves, seconds = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            curves[seed], took = train(recipe, text, seed, Path(folder) / f"seed-{seed}")
            seconds.append(took)
    # one byte a character: nats a character are bits a byte times ln 2
    losses = {
        seed: [(r["step"], r["validation_bits_per_byte"] * math.log(2)) for r in curve]
        for seed, curve in curves.items()
    }
    last = [curve[-1][1] for curve in losses.values()]
    lines = [
        f"# Tiny Shakespeare, {name}.toml",
        "",
        machine.describe(),
        "",
        f"{costs.parameters.active:,} active of {costs.parameters.total:,} parameters; "
        f"{costs.training.tokens:,} training characters.",
        f"Published (nanoGPT): {PUBLISHED[name]}. A 5-gram: 1.669.",
        "",
        f"**Validation loss, mean of {len(SEEDS)} seeds: {mean(last):.4f} nats a character** "
        f"({', '.join(f'{x:.4f}' for x in last)})",
        "",
        f"Seconds for each seed: {', '.join(f'{took:.0f}' for took in seconds)}",
        "",
        "| step | " + " | ".join(f"seed {seed}" for seed in losses) + " |",
        "|---|" + "---|" * len(losses),
    ]
    for rows in zip(*losses.values(), strict=True):
        lines.append(f"| {rows[0][0]} | " + " | ".join(f"{loss:.4f}" for _, loss in rows) + " |")
    machine.RESULTS.mkdir(exist_ok=True)
    (machine.RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    (machine.RESULTS / f"{name}.json").write_text(
        json.dumps({"machine": machine.describe(), "loss": losses, "seconds": seconds})
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
