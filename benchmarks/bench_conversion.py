"""How much memory does a conversion take?

    python -m benchmarks.bench_conversion [FOLDER]

Writes a synthetic checkpoint of three full-width layers of the 48B (9 GB in bf16) under FOLDER (or
the folder for temporary files), converts it to a published folder and back, each in a process of
its own, and compares the bytes. Needs 28 GB of disk. Prints results/conversion.md and writes it.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import benchmarks.machine as machine  # before torch
import torch
from torch import Tensor

from deltamoe.checkpoint import Checkpoint, open_checkpoint
from deltamoe.checkpoint.folder import CONFIG, WEIGHTS, write_new_folder
from deltamoe.checkpoint.header import TensorSpec
from deltamoe.checkpoint.tensors import DTYPES, write_pieces
from deltamoe.config import RunConfig, preset, to_json
from deltamoe.plan import weights

MODEL = replace(preset("kimi-linear-48b-a3b").model, num_layers=3)
CONVERT = """
import re, sys
from pathlib import Path
from deltamoe.conversion import convert
convert(sys.argv[1], sys.argv[2], to=sys.argv[3])
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def synthetic(folder: Path) -> Checkpoint:
    """A step folder of random weights, drawn piece by piece."""
    generator = torch.Generator().manual_seed(0)

    def pieces(spec: TensorSpec) -> Iterator[Tensor]:
        rows = max(1, (8 << 20) * spec.shape[0] // (spec.num_bytes + 1))
        for first in range(0, spec.shape[0], rows):
            shape = (min(rows, spec.shape[0] - first), *spec.shape[1:])
            yield torch.randn(shape, generator=generator).to(DTYPES[spec.dtype])

    specs = [
        TensorSpec(weight.name, "F32" if weight.is_fp32 else "BF16", weight.shape)
        for weight in sorted(weights(MODEL), key=lambda weight: not weight.is_fp32)
    ]

    def fill(path: Path) -> None:
        (path / CONFIG).write_text(to_json(RunConfig(model=MODEL)))
        write_pieces(path / WEIGHTS, specs, pieces)

    return write_new_folder(folder, fill, expected_bytes=sum(spec.num_bytes for spec in specs))


def converted(source: Path, out: Path, to: str) -> tuple[str, int]:
    """Convert in another process; a row of the table, and the peak in bytes."""
    started = time.perf_counter()
    command = [sys.executable, "-c", CONVERT, str(source), str(out), to]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak = int(printed) * 1024
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in out.iterdir())
    row = f"| {to} | {size / 1e9:.2f} GB | {seconds:.0f} s | {peak / 2**30:.2f} GiB |"
    return row, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        root = Path(folder)
        before = synthetic(root / "ours")
        there, there_peak = converted(root / "ours", root / "hf", "hf")
        back, back_peak = converted(root / "hf", root / "back", "deltamoe")
        largest = max(w.size * (4 if w.is_fp32 else 2) for w in weights(MODEL) if len(w.shape) < 3)
        after = open_checkpoint(root / "back", check_hashes=False)
        assert after.weights_sha256 == before.weights_sha256, "other bytes came back"
    bound = (2 << 30) + largest
    assert max(there_peak, back_peak) < bound, "more than 2 GiB and the largest tensor"
    lines = [
        "# A conversion's memory",
        "",
        machine.describe(),
        "",
        f"{before.manifest.num_bytes / 1e9:.2f} GB of random bf16 weights: the 48B's embedding, "
        f"head and first {MODEL.num_layers} layers ({MODEL.schedule}, 2 x 256 experts), to a "
        "published folder and back. The bytes that came back are those that went. Peak is the "
        "process's resident memory with Python, torch and the pages it has mapped; the largest "
        f"tensor takes {largest / 2**30:.2f} GiB. The time includes SHA-256 of the source and of "
        "what was written.",
        "",
        "| to | written | time | peak memory |",
        "|---|---|---|---|",
        there,
        back,
    ]
    (machine.RESULTS / "conversion.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
