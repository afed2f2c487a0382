"""How fast does a model of a billion parameters decode on a CPU, beside llama.cpp?

    python -m benchmarks.large FOLDER
    python -m benchmarks.bench_decode_large FOLDER [--rounds N] [--only NAMES] [--write]

One precision after the other: ours and llama.cpp each hold the same 0.98 B random weights (64
experts, top 8) in a process of their own, and in each round a copy is timed and both decode 24
tokens from an empty context. The ratios are medians of the rounds' ratios. The floor is the time of
reading the bytes that a token needs at the speed of a copy, its reading and its writing counted: a
copy of 1 GB that takes 0.1 s moves 20 GB/s. --write keeps the other precisions' rows.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import benchmarks.machine as machine  # before torch
import torch
from benchmarks.contestants import Contestant, median_ratio
from benchmarks.decoding import BARS, contest
from benchmarks.large import MODEL, PRECISIONS, gguf_path, step_path

from deltamoe.checkpoint import load, open_checkpoint
from deltamoe.model import Decoder
from deltamoe.plan import parameters

MODULE = "benchmarks.bench_decode_large"
TOKENS = 24
FLOOR = 0.7


def open_decoder(folder: str) -> Decoder:
    return Decoder(load(open_checkpoint(folder, check_hashes=False)))


def measure(folder: Path, precision: str, rounds: int, threads: int) -> dict[str, list[float]]:
    """Tokens per second of both, bytes per second of the copy, one entry a round."""
    contestants = {
        "copy": Contestant(MODULE, "copy", "", threads=threads),
        "ours": Contestant(MODULE, "ours", str(step_path(folder, precision)), threads=threads),
        "llama.cpp": Contestant(
            MODULE, "llama.cpp", str(gguf_path(folder, precision)), threads=threads
        ),
    }
    for contestant in contestants.values():
        contestant.wait()
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            done = 2e9 if name == "copy" else TOKENS
            found[name].append(done / contestant.seconds(1))
    for contestant in contestants.values():
        contestant.close()
    return found


def row(precision: str, found: dict[str, list[float]], needed: int) -> str:
    own, peer, copied = (statistics.median(found[name]) for name in ("ours", "llama.cpp", "copy"))
    ratio = median_ratio(found["ours"], found["llama.cpp"])
    share = median_ratio([speed * needed for speed in found["ours"]], found["copy"])
    return (
        f"| {precision} | {own:.1f} | {peer:.1f} | {ratio:.2f} | {BARS[precision]} "
        f"| {needed / 1e6:,.0f} MB | {copied / 1e9:.1f} GB/s | {share:.0%} | {FLOOR:.0%} |"
    )


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        return contest(sys.argv[2:], open_decoder, MODEL.vocab_size, TOKENS)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default=",".join(PRECISIONS))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    kept = machine.RESULTS / "decode_large.json"
    data: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"speeds": {}}
    for precision in options.only.split(","):
        found = measure(options.folder, precision, options.rounds, options.threads)
        needed = open_decoder(str(step_path(options.folder, precision))).bytes_per_token
        data["speeds"][precision] = {**found, "bytes_per_token": needed}
        print(row(precision, found, needed), flush=True)
    data |= {"machine": machine.describe(), "threads": options.threads}
    counted = parameters(MODEL)
    lines = [
        "# Decoding with a billion parameters",
        "",
        f"{machine.describe()}; contestants with {options.threads} threads, "
        f"{options.rounds} rounds of {TOKENS} tokens.",
        f"{counted.total:,} parameters, {counted.active:,} of them for a token; copy: read and "
        "written together.",
        "",
        "| weights | tokens/s | llama.cpp | ratio | bar | a token reads | copy | of the floor "
        "| bar |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for precision in PRECISIONS:
        if entry := dict(data["speeds"].get(precision, {})):
            needed = entry.pop("bytes_per_token")
            lines.append(row(precision, entry, needed))
    print("\n".join(lines))
    if options.write:
        (machine.RESULTS / "decode_large.md").write_text("\n".join(lines) + "\n")
        kept.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
