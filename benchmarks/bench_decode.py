"""How fast are tokens decoded on a CPU, beside llama.cpp on the same weights?

    python -m benchmarks.bench_decode [--rounds N] [--threads N] [--only NAMES] [--write]

Each contestant is a process of its own that holds its model and waits; in each round every one
decodes 64 tokens from an empty context, one after the other, so that all see the same machine. The
ratios are medians of the rounds' ratios. The floor is the time of reading the bytes that a token
needs at the speed of a copy, measured in the same rounds.

The model: 112 M parameters of random weights, of which a token reads 31 M. llama.cpp comes with
llama-cpp-py-sync; its files are made here by write_gguf and, at 4 bits, by llama.cpp itself.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import RESULTS, describe

from deltamoe.config import KdaConfig, MlaConfig, ModelConfig, MoeConfig
from deltamoe.model import Decoder, HybridLM, ModelState
from deltamoe.model.quantized import quantize_model

MODEL = ModelConfig(
    vocab_size=8192,
    dim=512,
    num_layers=8,
    mlp_dim=1536,
    kda=KdaConfig(num_heads=4),
    mla=MlaConfig(num_heads=4),
    moe=MoeConfig(num_experts=32, experts_per_token=4, expert_dim=256, routed_scale=2.446),
)
PRECISIONS = ("f32", "bf16", "8 bits", "4 bits")
BARS = {"f32": 1.0, "bf16": 1.3, "8 bits": 1.0, "4 bits": 1.0}
Q8_0, Q4_0 = 7, 2  # llama.cpp's numbers of these files
TOKENS = 64


def build(precision: str, config: ModelConfig = MODEL) -> HybridLM:
    model = HybridLM(config)
    model.initialize(0)
    model = model.to(torch.float32 if precision == "f32" else torch.bfloat16).eval()
    if precision.endswith("bits"):
        quantize_model(model, int(precision[0]))  # type: ignore[arg-type]
    return model


# --- contestants: each answers {"batch": B} with the seconds that TOKENS steps took ---------------


def ours(precision: str) -> Callable[[int], float]:
    decoder = Decoder(build(precision))
    generator = torch.Generator().manual_seed(0)

    def decode(batch: int) -> float:
        ids = torch.randint(MODEL.vocab_size, (TOKENS + 1, batch), generator=generator)
        state: ModelState | None = None
        _, state = decoder.step(ids[0], state)
        started = time.perf_counter()
        for step in ids[1:]:
            _, state = decoder.step(step, state)
        return time.perf_counter() - started

    return decode


def llama_cpp(file: str, threads: int) -> Callable[[int], float]:
    from tests.conversion.gguf.llama_cpp import open_library

    lib, ffi = open_library()
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
    options = lib.llama_context_default_params()
    options.n_ctx = 4 * TOKENS
    options.n_threads = options.n_threads_batch = threads
    context = lib.llama_init_from_model(model, options)
    generator = torch.Generator().manual_seed(0)
    token = ffi.new("llama_token[1]")

    def decode(batch: int) -> float:
        ids = torch.randint(MODEL.vocab_size, (TOKENS + 1,), generator=generator).tolist()
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        started = 0.0
        for at, id_ in enumerate(ids):
            if at == 1:
                started = time.perf_counter()
            token[0] = id_
            if lib.llama_decode(context, lib.llama_batch_get_one(token, 1)):
                raise SystemExit("llama_decode refused")
            lib.llama_get_logits_ith(context, -1)
        return time.perf_counter() - started

    return decode


def copying() -> Callable[[int], float]:
    """Seconds for copying 1 GB, that is reading one and writing one."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)

    def copy(batch: int) -> float:
        started = time.perf_counter()
        for _ in range(4):
            target.copy_(source)
        return (time.perf_counter() - started) * 1e9 / (4 * source.nbytes)

    return copy


def serve(arguments: list[str]) -> None:
    kind, *rest = arguments
    torch.set_num_threads(int(rest[-1]))
    if kind == "ours":
        run = ours(rest[0])
    elif kind == "llama.cpp":
        run = llama_cpp(rest[0], int(rest[-1]))
    else:
        run = copying()
    run(1)
    print("ready", flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            print(run(int(line)), flush=True)


class Contestant:
    """A process that holds a model and decodes when it is told to."""

    def __init__(self, *arguments: str, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.bench_decode", "--serve", *arguments]
        self._process = subprocess.Popen(
            [*command, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        if self._answer() != "ready":
            raise SystemExit(f"{' '.join(arguments)} did not start")

    def seconds(self, batch: int = 1) -> float:
        """Let it decode once."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{batch}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        """Let it go."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


# --- llama.cpp's files ----------------------------------------------------------------------------


def gguf_files(folder: Path, precisions: list[str]) -> dict[str, Path]:
    from tests.conversion.gguf.exported import save

    from deltamoe.conversion import open_source
    from deltamoe.conversion.gguf import write_gguf

    source = open_source(save(folder / "checkpoint", build("f32")))
    types = {"f32": "f32", "bf16": "bf16", "8 bits": "q8_0", "4 bits": "f32"}
    files = {}
    for precision in precisions:
        file = folder / f"{precision.replace(' ', '-')}.gguf"
        if precision != "4 bits":
            write_gguf(source, file, dtype=types[precision])
        else:
            wide = folder / "wide.gguf"
            write_gguf(source, wide, dtype="f32")
            command = [sys.executable, "-m", "benchmarks.bench_decode", "--quantize"]
            subprocess.run([*command, str(wide), str(file)], check=True, stderr=subprocess.DEVNULL)
        files[precision] = file
    return files


def quantize_file(source: str, target: str) -> None:
    from tests.conversion.gguf.llama_cpp import open_library

    lib, ffi = open_library()
    options = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
    options.ftype = Q4_0
    if lib.llama_model_quantize(source.encode(), target.encode(), options):
        raise SystemExit("llama.cpp refuses to quantise the file")


# --- the comparison -------------------------------------------------------------------------------


def measure(precisions: list[str], rounds: int, threads: int) -> dict[str, list[float]]:
    """Tokens per second (bytes per second for the copy), one entry a round."""
    found: dict[str, list[float]] = {}
    contestants: dict[str, Contestant] = {"copy": Contestant("copy", threads=threads)}
    with tempfile.TemporaryDirectory() as temporary:
        for precision, file in gguf_files(Path(temporary), precisions).items():
            contestants[f"ours, {precision}"] = Contestant("ours", precision, threads=threads)
            contestants[f"llama.cpp, {precision}"] = Contestant(
                "llama.cpp", str(file), threads=threads
            )
    for _ in range(rounds):
        for name, contestant in contestants.items():
            if name == "copy":
                found.setdefault(name, []).append(2e9 / contestant.seconds())
                continue
            for batch in (1, 8) if name.startswith("ours") else (1,):
                entry = name if batch == 1 else f"{name}, batch {batch}"
                speed = batch * TOKENS / contestant.seconds(batch)
                found.setdefault(entry, []).append(speed)
    for contestant in contestants.values():
        contestant.close()
    return found


def report(found: dict[str, list[float]], precisions: list[str], threads: int) -> str:
    def ratio(one: str, other: str) -> float:
        pairs = zip(found[one], found[other], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    copied = statistics.median(found["copy"])
    lines = [
        "# Decoding",
        "",
        f"{describe()}; contestants with {threads} threads, {len(found['copy'])} rounds.",
        f"Copy: {copied / 1e9:.1f} GB/s, read and written together.",
        "",
        "| weights | tokens/s | llama.cpp | ratio | bar | of the floor | batch 8 | to batch 1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for precision in precisions:
        name = f"ours, {precision}"
        own, peer, many = (
            statistics.median(found[entry])
            for entry in (name, f"llama.cpp, {precision}", f"{name}, batch 8")
        )
        needed = Decoder(build(precision)).bytes_per_token
        lines.append(
            f"| {precision} | {own:.0f} | {peer:.0f} | {ratio(name, f'llama.cpp, {precision}'):.2f}"
            f" | {BARS[precision]} | {own * needed / copied:.0%} | {many:.0f}"
            f" | {ratio(f'{name}, batch 8', name):.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        return serve(sys.argv[2:])
    if sys.argv[1:2] == ["--quantize"]:
        return quantize_file(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default=",".join(PRECISIONS))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    precisions = options.only.split(",")
    found = measure(precisions, options.rounds, options.threads)
    text = report(found, precisions, options.threads)
    print(text)
    if options.write:
        (RESULTS / "decode.md").write_text(text)
        data: dict[str, Any] = {"machine": describe(), "threads": options.threads, "speeds": found}
        (RESULTS / "decode.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
