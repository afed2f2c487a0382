"""A model of about a billion random weights, written to a folder once for several benchmarks.

    python -m benchmarks.large FOLDER          16 GB of disk, some minutes

FOLDER then holds step folders of ours (f32, bf16, 8-bits, 4-bits) and llama.cpp's files of the same
weights beside them (f32.gguf, …).
"""

import argparse
import tempfile
from pathlib import Path

import torch
from benchmarks.contestants import gguf_file

from deltamoe.config import KdaConfig, MlaConfig, ModelConfig, MoeConfig
from deltamoe.conversion import open_source
from deltamoe.conversion.quantized import write_quantized
from deltamoe.model import HybridLM

__all__ = ["MODEL", "PRECISIONS", "gguf_path", "step_path", "write"]

MODEL = ModelConfig(
    vocab_size=32_768,
    dim=1024,
    num_layers=12,
    mlp_dim=4096,
    kda=KdaConfig(num_heads=8),
    mla=MlaConfig(num_heads=8),
    moe=MoeConfig(num_experts=64, experts_per_token=8, expert_dim=384, routed_scale=2.446),
)
PRECISIONS = ("f32", "bf16", "8 bits", "4 bits")


def step_path(folder: Path, precision: str) -> Path:
    return folder / precision.replace(" ", "-")


def gguf_path(folder: Path, precision: str) -> Path:
    return folder / f"{precision.replace(' ', '-')}.gguf"


def write(folder: Path) -> None:
    """Write what is not there yet."""
    from tests.conversion.gguf.exported import save

    folder.mkdir(parents=True, exist_ok=True)
    wide = step_path(folder, "f32")
    if not wide.exists():
        model = HybridLM(MODEL)
        model.initialize(0)
        with tempfile.TemporaryDirectory(dir=folder) as runs:
            narrow = save(Path(runs) / "bf16", model, dtype=torch.bfloat16)
            narrow.rename(step_path(folder, "bf16"))
            save(Path(runs) / "f32", model).rename(wide)
        del model
    for precision in PRECISIONS:
        if not (out := step_path(folder, precision)).exists():
            source = open_source(step_path(folder, "bf16"))
            write_quantized(source, out, bits=8 if precision == "8 bits" else 4)
        if not (file := gguf_path(folder, precision)).exists():
            gguf_file(wide, file, precision)
        print(precision, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
