"""What does a token cost behind 1,000 tokens, and what behind 64,000?

    python -m benchmarks.bench_depth [--rounds N] [--threads N] [--write]

The model of bench_decode, as it is (one layer in four is MLA) and with KDA alone. Each round reads
32 tokens behind a text of every length, from a state of random numbers: what it costs does not
depend on what they are. A latent cache is read once for each token and KDA's memory never grows, so
the hybrid should take longer by the time that its latents take to be read. A reading is timed in
the same rounds: a matrix-vector product of 256 MiB. llama.cpp reads as many tokens of its own
beside, up to 4,096.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import benchmarks.machine as machine  # before torch
import torch
from benchmarks.bench_decode import MODEL, build
from benchmarks.contestants import Contestant, LlamaCpp, gguf_file, serve
from benchmarks.decoding import peer_seconds, step_seconds

from deltamoe.layers import MlaState
from deltamoe.model import Decoder, ModelState

MODULE = "benchmarks.bench_depth"
DEPTHS = (1024, 4096, 16_384, 65_536)
PEER_DEPTHS = (1024, 4096)
TOKENS = 32
MODELS = {"hybrid": MODEL, "all KDA": replace(MODEL, mixers=("kda",) * MODEL.num_layers)}
PRECISIONS = {"f32": torch.float32, "bf16": torch.bfloat16}


def latent_bytes(precision: str) -> int:
    """Of one token, in all MLA layers."""
    assert MODEL.mla is not None
    layers = sum(MODEL.mixer(i) == "mla" for i in range(MODEL.num_layers))
    return layers * (MODEL.mla.latent_dim + MODEL.mla.rope_dim) * PRECISIONS[precision].itemsize


def ours(name: str, precision: str) -> Callable[[int], float]:
    model = build(precision, MODELS[name])
    decoder = Decoder(model)

    def at_depth(depth: int) -> ModelState:
        def filled(layer: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            if not isinstance(layer, MlaState):
                return layer
            return MlaState(*(torch.randn(1, depth, x.shape[2]).to(x.dtype) for x in layer))

        state = model.initial_state(1)
        layers = tuple(map(filled, state.layers))
        return ModelState(layers, state.lengths + depth)  # type: ignore[arg-type]

    states = {depth: at_depth(depth) for depth in DEPTHS}

    def decode(depth: int) -> float:
        ids = torch.randint(MODEL.vocab_size, (TOKENS + 1, 1))
        return step_seconds(decoder, ids, states[depth])

    return decode


def llama_cpp(file: str, threads: int) -> Callable[[int], float]:
    context = max(PEER_DEPTHS) + 64
    peer = LlamaCpp(file, context=context, threads=threads, flash_attention="off")

    def decode(depth: int) -> float:
        ids = torch.randint(MODEL.vocab_size, (depth + TOKENS,)).tolist()
        return peer_seconds(peer, ids[:depth], ids[depth:])

    return decode


def reading() -> Callable[[int], float]:
    """Seconds for reading 1 GB."""
    matrix, vector = torch.ones(1 << 14, 1 << 12), torch.ones(1 << 12)

    def read(_: int) -> float:
        started = time.perf_counter()
        for _ in range(4):
            matrix @ vector
        return (time.perf_counter() - started) * 1e9 / (4 * matrix.nbytes)

    return read


def contest(arguments: list[str]) -> None:
    kind, what, precision, threads = arguments
    torch.set_num_threads(int(threads))
    if kind == "ours":
        run = ours(what, precision)
    elif kind == "llama.cpp":
        run = llama_cpp(what, int(threads))
    else:
        run = reading()
    if kind != "llama.cpp":
        run(DEPTHS[0])
    serve(run)


def measure(rounds: int, threads: int) -> dict[str, list[float]]:
    """Milliseconds a token (bytes per second of the reading), one entry a round."""
    from tests.conversion.gguf.exported import save

    contestants = {"reading": Contestant(MODULE, "reading", "", "", threads=threads)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = gguf_file(save(folder / "it", build("f32")), folder / "it.gguf", "f32")
        contestants["llama.cpp, f32"] = Contestant(
            MODULE, "llama.cpp", str(file), "f32", threads=threads
        )
        for name in MODELS:
            for precision in PRECISIONS:
                contestants[f"{name}, {precision}"] = Contestant(
                    MODULE, "ours", name, precision, threads=threads
                )
        for contestant in contestants.values():
            contestant.wait()
    found: dict[str, list[float]] = {}
    for at in range(rounds):
        for name, contestant in contestants.items():
            if name == "reading":
                found.setdefault(name, []).append(1e9 / contestant.seconds(0))
            elif not name.startswith("llama.cpp"):
                for depth in DEPTHS:
                    took = contestant.seconds(depth) * 1e3 / TOKENS
                    found.setdefault(f"{name}, {depth}", []).append(took)
            elif at < 3:  # its prompts take long
                for depth in PEER_DEPTHS:
                    took = contestant.seconds(depth) * 1e3 / TOKENS
                    found.setdefault(f"{name}, {depth}", []).append(took)
    for contestant in contestants.values():
        contestant.close()
    return found


def report(found: dict[str, list[float]], threads: int) -> str:
    median = {name: statistics.median(entries) for name, entries in found.items()}
    lines = [
        "# Decoding behind long texts",
        "",
        f"{machine.describe()}; contestants with {threads} threads, {len(found['reading'])} "
        "rounds.",
        f"Reading: {median['reading'] / 1e9:.1f} GB/s. Milliseconds a token; the hybrid's slope is "
        f"from {DEPTHS[0]:,} to {DEPTHS[-1]:,} tokens, its latents' what they take at that speed.",
        "",
        f"| | {' | '.join(f'{depth:,}' for depth in DEPTHS)} | last to first | slope "
        "| its latents' | ratio |",
        "|---|" + "---|" * (len(DEPTHS) + 4),
    ]
    for name in MODELS:
        for precision in PRECISIONS:
            times = [median[f"{name}, {precision}, {depth}"] for depth in DEPTHS]
            cells = [f"{name}, {precision}", *(f"{took:.2f}" for took in times)]
            cells.append(f"{times[-1] / times[0]:.2f}")
            if name == "hybrid":
                slope = (times[-1] - times[0]) / (DEPTHS[-1] - DEPTHS[0])  # ms a token of depth
                explained = latent_bytes(precision) / median["reading"] * 1e3
                cells += [f"{slope * 1e6:.0f} ns", f"{explained * 1e6:.0f} ns"]
                cells.append(f"{slope / explained:.2f}")
            else:
                cells += ["", "", ""]
            lines.append(f"| {' | '.join(cells)} |")
    peer = [median[f"llama.cpp, f32, {depth}"] for depth in PEER_DEPTHS]
    slope = (peer[-1] - peer[0]) / (PEER_DEPTHS[-1] - PEER_DEPTHS[0])
    lines.append(
        f"| llama.cpp, f32 | {peer[0]:.2f} | {peer[1]:.2f} | | | {peer[1] / peer[0]:.2f} "
        f"| {slope * 1e6:.0f} ns | | |"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        return contest(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    found = measure(options.rounds, options.threads)
    text = report(found, options.threads)
    print(text)
    if options.write:
        (machine.RESULTS / "depth.md").write_text(text)
        data = {"machine": machine.describe(), "threads": options.threads, "found": found}
        (machine.RESULTS / "depth.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
