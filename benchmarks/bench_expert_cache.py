"""How fast does a model decode whose experts do not fit into memory?

    python -m benchmarks.bench_expert_cache [--memory 12Gi] [--layers 27] [--tokens 32] [--folder F]

Writes a file of random weights in the geometry of Kimi Linear 48B-A3B at 4 bits (26.5 GiB with all
27 layers), reads random tokens one at a time within the budget, as decoding does, and deletes the
file. Random weights choose experts evenly, which is the hardest case for a cache: a trained model's
favourites are found more often.
Prints tokens a second, the bytes read, the share of experts found in memory and the peak of
resident memory, and writes results/expert_cache.{json,md}.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import benchmarks.machine as machine  # before torch
import torch

from deltamoe.checkpoint import Checkpoint, load
from deltamoe.checkpoint.folder import CONFIG, WEIGHTS
from deltamoe.checkpoint.header import TensorSpec
from deltamoe.checkpoint.manifest import Manifest, record_file
from deltamoe.checkpoint.quantized import quantized_metadata, stored_tensors
from deltamoe.checkpoint.tensors import DTYPES, write_pieces
from deltamoe.config import ModelConfig, RunConfig, preset, to_json, whole_number
from deltamoe.layers.expert_cache import CachedExperts

_BITS: Literal[4] = 4
_BLOCK = 1 << 26  # bytes written at a time


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def write_random(folder: Path, config: ModelConfig) -> Checkpoint:
    """A quantised checkpoint of random weights, streamed."""
    specs = [spec for _, spec in stored_tensors(config, _BITS, dtype="BF16")]
    specs.sort(key=lambda spec: spec.dtype != "F32")  # the widest first: aligned
    generator = _seeded()
    # around their middles, 128 and 8: a mean would make all tokens alike
    codes = torch.randint(1, 256, (2 * _BLOCK,), dtype=torch.uint8, generator=generator)
    halves = torch.randint(1, 16, (2, 2 * _BLOCK), dtype=torch.uint8, generator=generator)
    of_bits = {8: codes, 4: halves[0] | halves[1] << 4}
    floats = torch.randn(2 * _BLOCK, generator=generator) * 0.02

    def pieces(spec: TensorSpec) -> Iterator[torch.Tensor]:
        left, begin = spec.num_bytes, 0
        while left:
            size = min(left, _BLOCK)
            begin = (begin + 7_919_111) % _BLOCK  # another part of the same block each time
            if spec.dtype == "U8":
                yield of_bits[8 if spec.shape[-1] == 512 else 4][begin : begin + size]
            elif spec.dtype == "F16":  # times codes of 4 this gives weights of about 0.02
                yield (floats[begin : begin + size // 2].abs() * 0.1 + 0.003).half()
            elif spec.name.endswith("norm.weight"):
                yield torch.ones(size // 2, dtype=torch.bfloat16)
            else:
                dtype = DTYPES[spec.dtype]
                yield floats[begin : begin + size // dtype.itemsize].to(dtype)
            left -= size

    write_pieces(folder / WEIGHTS, specs, pieces, quantized_metadata(_BITS))
    with open(folder / WEIGHTS, "rb") as file:  # what is read later comes from the disk
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    (folder / CONFIG).write_text(to_json(RunConfig(model=config)))
    names = (WEIGHTS, CONFIG)  # not hashed: half a minute for nothing
    return Checkpoint(
        folder, Manifest(0, {name: record_file(folder / name, hashed=False) for name in names})
    )


def measure(checkpoint: Checkpoint, memory: int, tokens: int) -> dict[str, float]:
    """Decode within the budget."""
    begin = time.perf_counter()
    model = load(checkpoint, memory=memory)
    loaded = time.perf_counter()
    cache = next(m.cache for m in model.modules() if isinstance(m, CachedExperts))
    seconds, read, hits, misses = [], [], [], []
    with torch.inference_mode():
        state = model.initial_state(1)
        text = torch.randint(0, model.config.vocab_size, (tokens,), generator=_seeded())
        for token_id in text:
            before = time.perf_counter(), cache.bytes_read, cache.num_hits, cache.num_misses
            logits, state = model(token_id.view(1, 1), state)
            assert logits.isfinite().all()
            seconds.append(time.perf_counter() - before[0])
            read.append(cache.bytes_read - before[1])
            hits.append(cache.num_hits - before[2])
            misses.append(cache.num_misses - before[3])
    late = tokens // 2  # by then the slots are full, or all that is chosen is there
    return {
        "load_seconds": loaded - begin,
        "first_token_seconds": seconds[0],
        "tokens_per_second": 1 / statistics.median(seconds[late:]),
        "bytes_per_token": statistics.mean(read[late:]),
        "bytes_read": sum(read),
        "found": sum(hits[late:]) / (sum(hits[late:]) + sum(misses[late:])),
        "slots": cache.num_slots,
        "experts": cache.num_experts,
        "cache_bytes": cache.nbytes,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=whole_number, default=12 << 30)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    config = preset("kimi-linear-48b-a3b").model
    if given.layers != config.num_layers:
        config = replace(config, num_layers=given.layers)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        begin = time.perf_counter()
        checkpoint = write_random(Path(folder), config)
        file_bytes = checkpoint.manifest.num_bytes
        print(
            f"{file_bytes / 1e9:.1f} GB written in {time.perf_counter() - begin:.0f} s", flush=True
        )
        found = measure(checkpoint, given.memory, given.tokens)
    gib = 1 << 30
    rows = [
        ("file", f"{file_bytes / gib:.1f} GiB, {config.num_layers} layers at {_BITS} bits"),
        ("budget", f"{given.memory / gib:.1f} GiB"),
        ("peak of resident memory", f"{found['peak_bytes'] / gib:.2f} GiB"),
        (
            "experts in memory",
            f"{found['slots']:,} of {found['experts']:,}, {found['cache_bytes'] / gib:.1f} GiB",
        ),
        ("opened in", f"{found['load_seconds']:.2f} s"),
        ("first token in", f"{found['first_token_seconds']:.2f} s"),
        ("then", f"{found['tokens_per_second']:.2f} tokens/s"),
        ("read for a token", f"{found['bytes_per_token'] / 1e6:,.0f} MB"),
        ("read in all", f"{found['bytes_read'] / 1e9:.1f} GB for {given.tokens} tokens"),
        ("experts found in memory", f"{found['found']:.0%}"),
    ]
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    note = "Random weights; the medians and means are over the second half of the tokens."
    text = "\n".join([machine.describe(), "", note, "", *lines])
    print(text)
    (machine.RESULTS / "expert_cache.md").write_text(
        f"# Decoding within a budget of memory\n\n{text}\n"
    )
    record = {
        "machine": machine.describe(),
        "file_bytes": file_bytes,
        "memory": given.memory,
        **found,
    }
    (machine.RESULTS / "expert_cache.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
