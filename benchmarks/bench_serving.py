"""What does a conversation cost as it grows, and what does a shared beginning save?

    python -m benchmarks.bench_serving [--write]

The demo's geometry (one layer in four is MLA) beside the same with MLA everywhere, random weights,
fp32. First a token's time and a sequence's bytes behind 1k to 128k tokens, from states of random
numbers: what it costs does not depend on what they are. Then an engine that is asked 32 questions
about one document of 4,000 tokens: the time to the first token of a question when the document has
never been read, when one question after the other comes, and when all come at once.
--write keeps tables and figures in results/ and the plot in docs/serving.png.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmarks.machine as machine  # before torch
import torch

from deltamoe.config import ModelConfig, preset
from deltamoe.engine import Engine, EngineOptions, Request
from deltamoe.layers import MlaState
from deltamoe.model import Decoder, HybridLM, ModelState
from deltamoe.tokenizer import ByteTokenizer

NANO = preset("nano").model
MODELS = {"hybrid": NANO, "all MLA": replace(NANO, mixers=("mla",) * NANO.num_layers)}
DEPTHS = (1024, 4096, 16_384, 65_536, 131_072)
TOKENS = 16
DOCUMENT, QUESTION, QUESTIONS = 4000, 8, 32
PLOT = Path(__file__).parent.parent / "docs" / "serving.png"


def build(config: ModelConfig) -> HybridLM:
    model = HybridLM(config)
    model.initialize(0)
    return model.eval()


def at_depth(model: HybridLM, depth: int) -> ModelState:
    def filled(layer: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if not isinstance(layer, MlaState):
            return layer
        return MlaState(*(torch.randn(1, depth, part.shape[2]) for part in layer))

    state = model.initial_state(1)
    layers = tuple(map(filled, state.layers))
    return ModelState(layers, state.lengths + depth)  # type: ignore[arg-type]


def growth(rounds: int) -> dict[str, list[dict[str, float]]]:
    """For each model and depth: milliseconds a token, bytes a sequence."""
    decoders = {name: Decoder(build(config)) for name, config in MODELS.items()}
    times: dict[tuple[str, int], list[float]] = {}
    sizes: dict[tuple[str, int], int] = {}
    ids = torch.zeros(1, dtype=torch.int64)
    for depth in DEPTHS:
        states = {name: at_depth(build(config), depth) for name, config in MODELS.items()}
        for name, state in states.items():
            sizes[name, depth] = state.nbytes
            _, states[name] = decoders[name].step(ids, state)  # copies the cache
        for _ in range(rounds):
            for name, decoder in decoders.items():
                state = states[name]
                started = time.perf_counter()
                for _ in range(TOKENS):
                    _, state = decoder.step(ids, state)
                taken = (time.perf_counter() - started) / TOKENS
                times.setdefault((name, depth), []).append(1e3 * taken)
                states[name] = state
    return {
        name: [
            {
                "depth": depth,
                "ms": statistics.median(times[name, depth]),
                "bytes": sizes[name, depth],
            }
            for depth in DEPTHS
        ]
        for name in MODELS
    }


def reuse(config: ModelConfig) -> dict[str, Any]:
    """Seconds to the first token, cold and with a document that is known."""
    chance = torch.Generator().manual_seed(0)

    def words(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(256, (count,), generator=chance).tolist())

    def ask(prompt: tuple[int, ...]) -> Request:
        return Request(prompt=prompt, max_tokens=4, ignore_end=True, keep_state=True)

    options = EngineOptions(context=16_384, state_bytes=1 << 30, cache_bytes=1 << 30)
    with Engine(build(config), ByteTokenizer(), options) as engine:
        engine.generate([ask(words(600))])  # to warm up
        cold, kept = [], 0
        for _ in range(5):
            document = words(DOCUMENT)
            (result,) = engine.generate([ask(document + words(QUESTION))])
            cold.append(result.timings.first_token_s)
            assert result.choices[0].state is not None
            kept = result.choices[0].state.nbytes
        # the first question after the cold one marks where the texts part
        engine.generate([ask(document + words(QUESTION))])
        single = [
            engine.generate([ask(document + words(QUESTION))])[0].timings.first_token_s
            for _ in range(QUESTIONS)
        ]
        results = engine.generate([ask(document + words(QUESTION)) for _ in range(QUESTIONS)])
        together = [result.timings.first_token_s for result in results]
        cached = min(result.num_cached_tokens for result in results)
    return {
        "cold": statistics.median(cold),
        "one by one": statistics.median(single),
        "together": statistics.median(together),
        "together, last": max(together),
        "cached": cached,
        "kept": kept,
    }


def table(found: dict[str, Any]) -> str:
    lines = [
        *("# Conversations that grow, and beginnings that are shared", "", machine.describe(), ""),
        "The demo's geometry in fp32, random weights; medians.",
        "",
        "| tokens behind | hybrid, ms a token | all MLA | hybrid, MB a sequence | all MLA |",
        "|---|---|---|---|---|",
    ]
    rows = zip(found["growth"]["hybrid"], found["growth"]["all MLA"], strict=True)
    for hybrid, mla in rows:
        lines.append(
            f"| {hybrid['depth']:,} | {hybrid['ms']:.2f} | {mla['ms']:.2f} "
            f"| {hybrid['bytes'] / 1e6:.2f} | {mla['bytes'] / 1e6:.2f} |"
        )
    lines += [
        "",
        f"{QUESTIONS} questions of {QUESTION} tokens about a document of {DOCUMENT:,}: time to "
        "the first token.",
        "",
        "| | cold | one by one | ratio | all at once: median, last | tokens not read again "
        "| state a conversation |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, times in found["reuse"].items():
        lines.append(
            f"| {name} | {1e3 * times['cold']:.0f} ms | {1e3 * times['one by one']:.1f} ms "
            f"| {times['cold'] / times['one by one']:.0f} "
            f"| {1e3 * times['together']:.0f}, {1e3 * times['together, last']:.0f} ms "
            f"| {times['cached']:,} | {times['kept'] / 1e6:.2f} MB |"
        )
    return "\n".join(lines) + "\n"


def plot(found: dict[str, list[dict[str, float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for (name, rows), color in zip(found.items(), ("#b8420f", "#5b7083"), strict=True):
        depths = [row["depth"] for row in rows]
        left.plot(depths, [row["ms"] for row in rows], "o-", color=color, label=name)
        right.plot(depths, [row["bytes"] / 1e6 for row in rows], "o-", color=color, label=name)
    for axes, title in ((left, "milliseconds a token"), (right, "megabytes a sequence")):
        axes.set(xscale="log", yscale="log", xlabel="tokens behind", title=title)
        axes.set_xticks(DEPTHS, [f"{depth // 1024}k" for depth in DEPTHS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    found: dict[str, Any] = {
        "growth": growth(given.rounds),
        "reuse": {name: reuse(config) for name, config in MODELS.items()},
    }
    text = table(found)
    sys.stdout.write(text)
    if given.write:
        (machine.RESULTS / "serving.md").write_text(text)
        (machine.RESULTS / "serving.json").write_text(json.dumps(found, indent=1) + "\n")
        plot(found["growth"])


if __name__ == "__main__":
    main()
