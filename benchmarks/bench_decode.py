"""How fast are tokens decoded on a CPU, beside llama.cpp on the same weights?

    python -m benchmarks.bench_decode [--rounds N] [--threads N] [--only NAMES] [--write]

Each contestant is a process of its own that holds its model and waits; in each round every one
decodes 64 tokens from an empty context, one after the other, so that all see the same machine. The
ratios are medians of the rounds' ratios. The floor is the time of reading the bytes that a token
needs at the speed of a copy, measured in the same rounds. "by bytes" is how much faster many rows
would be if a step took as long as its bytes and each row chose its experts at random.

The model: 112 M parameters of random weights, of which a token reads 31 M.
"""

import argparse
import json
import statistics
import sys

import benchmarks.machine as machine  # before torch
import torch
from benchmarks.contestants import Contestant, median_ratio, paired
from benchmarks.decoding import BARS, contest

from deltamoe.config import KdaConfig, MlaConfig, ModelConfig, MoeConfig
from deltamoe.model import Decoder, HybridLM
from deltamoe.model.quantized import quantize_model
from deltamoe.plan import state_bytes_per_sequence

MODULE = "benchmarks.bench_decode"
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
BATCHES = (8, 64)
TOKENS = 64


def build(precision: str, config: ModelConfig = MODEL) -> HybridLM:
    model = HybridLM(config)
    model.initialize(0)
    model = model.to(torch.float32 if precision == "f32" else torch.bfloat16).eval()
    if precision.endswith("bits"):
        quantize_model(model, int(precision[0]))  # type: ignore[arg-type]
    return model


def open_decoder(precision: str) -> Decoder:
    return Decoder(build(precision))


def measure(precisions: list[str], rounds: int, threads: int) -> dict[str, list[float]]:
    """Tokens per second (bytes per second for the copy), one entry a round."""
    copy = Contestant(MODULE, "copy", "", threads=threads)
    copy.wait()
    contestants = {"copy": copy, **paired(MODULE, build("f32"), precisions, threads=threads)}
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            if name == "copy":
                found.setdefault(name, []).append(2e9 / contestant.seconds(1))
                continue
            found.setdefault(name, []).append(TOKENS / contestant.seconds(1))
            if name.startswith("ours"):
                for batch in BATCHES:
                    speed = batch * TOKENS / contestant.seconds(batch)
                    found.setdefault(f"{name}, batch {batch}", []).append(speed)
    for contestant in contestants.values():
        contestant.close()
    return found


def gain_by_bytes(model: HybridLM, batch: int) -> float:
    """How many times the tokens of one row ``batch`` rows give for the bytes that they move."""
    experts = sum(x.nbytes for name, x in model.state_dict().items() if ".experts." in name)
    assert MODEL.moe is not None
    chosen = MODEL.moe.experts_per_token / MODEL.moe.num_experts
    dense = Decoder(model).bytes_per_token - experts * chosen
    state = 2 * state_bytes_per_sequence(MODEL)  # read and written

    def moved(rows: int) -> float:
        missed: float = (1 - chosen) ** rows
        return dense + experts * (1 - missed) + rows * state

    return batch * moved(1) / moved(batch)


def report(found: dict[str, list[float]], precisions: list[str], threads: int) -> str:
    median = {name: statistics.median(entries) for name, entries in found.items()}
    lines = [
        "# Decoding",
        "",
        f"{machine.describe()}; contestants with {threads} threads, {len(found['copy'])} rounds.",
        f"Copy: {median['copy'] / 1e9:.1f} GB/s, read and written together.",
        "",
        "| weights | tokens/s | llama.cpp | ratio | bar | of the floor |"
        + "".join(f" batch {batch} | to batch 1 | by bytes |" for batch in BATCHES),
        "|---" * (6 + 3 * len(BATCHES)) + "|",
    ]
    for precision in precisions:
        own, peer = (f"{side}, {precision}" for side in ("ours", "llama.cpp"))
        model = build(precision)
        needed = Decoder(model).bytes_per_token
        line = (
            f"| {precision} | {median[own]:.0f} | {median[peer]:.0f} "
            f"| {median_ratio(found[own], found[peer]):.2f} | {BARS[precision]} "
            f"| {median[own] * needed / median['copy']:.0%} |"
        )
        for batch in BATCHES:
            many = f"{own}, batch {batch}"
            line += (
                f" {median[many]:,.0f} | {median_ratio(found[many], found[own]):.2f} "
                f"| {gain_by_bytes(model, batch):.2f} |"
            )
        lines.append(line)
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        return contest(sys.argv[2:], open_decoder, MODEL.vocab_size, TOKENS)
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
        (machine.RESULTS / "decode.md").write_text(text)
        data = {"machine": machine.describe(), "threads": options.threads, "speeds": found}
        (machine.RESULTS / "decode.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
