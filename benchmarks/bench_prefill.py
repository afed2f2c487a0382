"""How fast is a prompt read on a CPU, beside llama.cpp on the same weights?

    python -m benchmarks.bench_prefill [--rounds N] [--threads N] [--only NAMES] [--write]

Each contestant is a process of its own that holds the model of bench_decode (112 M parameters, of
which a token visits 35.5 M) and waits; in each round every one reads a prompt of 512 tokens and one
of 2,048 from an empty context, up to the scores of the next token. llama.cpp reads 512 tokens at a
time, with its flash attention on or off, whichever is quicker here. The ratios are medians of the
rounds' ratios. The floor is the time of the operations that a prompt needs at the rate of a square
matrix product, measured in the same rounds.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import benchmarks.machine as machine  # before torch
import torch
from benchmarks.bench_decode import MODEL, PRECISIONS, build
from benchmarks.contestants import (
    FLASH_ATTENTION,
    Contestant,
    LlamaCpp,
    median_ratio,
    paired,
    serve,
)

from deltamoe.plan import flops_per_token

MODULE = "benchmarks.bench_prefill"
PROMPTS = (512, 2048)
BARS = {"f32": 1.5, "bf16": 5.0}
RECORDED = {  # llama.cpp's best builds for machines of this kind, 512 tokens; AVX-512 and repacking
    "f32": "1,190 to 1,470",
    "bf16": "1,260 to 1,310",
    "8 bits": "1,250 to 1,320",
    "4 bits": "1,250 to 1,680",
}
_SIDE = 2048


def prompt(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(MODEL.vocab_size, (1, length), generator=generator)


def ours(precision: str) -> Callable[[int], float]:
    model = build(precision)

    def read(length: int) -> float:
        ids = prompt(length)
        started = time.perf_counter()
        model.logits(model.hidden(ids).hidden[:, -1:])
        return time.perf_counter() - started

    return read


def llama_cpp(file: str, threads: int) -> Callable[[int], float]:
    def reader(flash_attention: str) -> Callable[[int], float]:
        size = max(PROMPTS)
        peer = LlamaCpp(file, context=size, threads=threads, flash_attention=flash_attention)

        def read(length: int) -> float:
            ids = prompt(length)[0].tolist()
            peer.forget()
            started = time.perf_counter()
            peer.read(ids)
            return time.perf_counter() - started

        return read

    readers = [reader(flash_attention) for flash_attention in FLASH_ATTENTION]
    for read in readers:
        read(min(PROMPTS))
    return min(readers, key=lambda read: read(max(PROMPTS)))


def product(precision: str) -> Callable[[int], float]:
    a = torch.randn(_SIDE, _SIDE).to(torch.float32 if precision == "f32" else torch.bfloat16)

    def multiply(length: int) -> float:
        started = time.perf_counter()
        for _ in range(4):
            a @ a
        return (time.perf_counter() - started) / 4

    return multiply


def contest(arguments: list[str]) -> None:
    kind, what, threads = arguments
    torch.set_num_threads(int(threads))
    with torch.inference_mode():
        if kind == "ours":
            run = ours(what)
        elif kind == "llama.cpp":
            run = llama_cpp(what, int(threads))
        else:
            run = product(what)
        for length in PROMPTS:
            run(length)
    serve(run)


def measure(precisions: list[str], rounds: int, threads: int) -> dict[str, list[float]]:
    """Tokens per second (operations per second for the products), one entry a round."""
    contestants = {
        f"product, {kind}": Contestant(MODULE, "product", kind, threads=threads)
        for kind in ("f32", "bf16")
    }
    for contestant in contestants.values():
        contestant.wait()
    contestants |= paired(MODULE, build("f32"), precisions, threads=threads)
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            if name.startswith("product"):
                found.setdefault(name, []).append(2 * _SIDE**3 / contestant.seconds(0))
                continue
            for length in PROMPTS:
                speed = length / contestant.seconds(length)
                found.setdefault(f"{name}, {length}", []).append(speed)
    for contestant in contestants.values():
        contestant.close()
    return found


def report(found: dict[str, list[float]], precisions: list[str], threads: int) -> str:
    median = {name: statistics.median(entries) for name, entries in found.items()}
    peaks = {kind: median[f"product, {kind}"] for kind in ("f32", "bf16")}
    rounds = len(found["product, f32"])
    lines = [
        "# Prefill",
        "",
        f"{machine.describe()}; contestants with {threads} threads, {rounds} rounds.",
        f"Matrix product: {peaks['f32'] / 1e9:.0f} GFLOP/s in fp32, {peaks['bf16'] / 1e9:.0f} in "
        "bf16; of the peak: of the fp32 product for f32, of the bf16 product for the others.",
        "",
        "| weights | prompt | tokens/s | llama.cpp | ratio | bar | of the peak "
        "| llama.cpp's best builds, recorded |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for precision in precisions:
        for length in PROMPTS:
            own, peer = (f"{side}, {precision}, {length}" for side in ("ours", "llama.cpp"))
            peak = peaks["f32" if precision == "f32" else "bf16"]
            scores = 2 * MODEL.vocab_size * MODEL.dim  # only those behind the last token are made
            operations = flops_per_token(MODEL, context=length) - scores * (1 - 1 / length)
            lines.append(
                f"| {precision} | {length:,} | {median[own]:,.0f} | {median[peer]:,.0f} "
                f"| {median_ratio(found[own], found[peer]):.2f} | {BARS.get(precision, '')} "
                f"| {median[own] * operations / peak:.0%} "
                f"| {RECORDED[precision] if length == 512 else ''} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        return contest(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default=",".join(PRECISIONS))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    precisions = options.only.split(",")
    found = measure(precisions, options.rounds, options.threads)
    text = report(found, precisions, options.threads)
    print(text)
    if options.write:
        (machine.RESULTS / "prefill.md").write_text(text)
        data = {"machine": machine.describe(), "threads": options.threads, "speeds": found}
        (machine.RESULTS / "prefill.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
