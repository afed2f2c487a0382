"""``deltamoe plan``: what a configuration costs, before anything is built or read."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import click

from deltamoe.checkpoint.folder import WEIGHTS
from deltamoe.checkpoint.header import read_header
from deltamoe.checkpoint.quantized import quantization_of
from deltamoe.checkpoint.run_folder import read_any_config
from deltamoe.cli.format import COUNT, count, flops, size, table
from deltamoe.cli.sampling import BITS
from deltamoe.config import PRESETS, RunConfig, resolve
from deltamoe.errors import CheckpointError
from deltamoe.plan import Bits, Plan, plan

__all__ = ["command"]

_EXAMPLES = """\b
Examples:
  deltamoe plan nano
  deltamoe plan kimi-linear-48b-a3b --context 1Mi --memory 141G
  deltamoe plan small model.moe.num_experts=64 train.precision=bf16 --json
"""


@click.command("plan", epilog=_EXAMPLES)
@click.argument("config", metavar="PRESET|FILE|FOLDER")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--context", type=COUNT, help="Tokens of a sequence (8k, 128Ki) [default: data.context]."
)
@click.option("--memory", type=COUNT, help="Bytes to fit in (32G, 24Gi) [default: this machine's].")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16"]),
    help="Of weights and cache when generating [default: train.precision].",
)
@click.option(
    "--quantize",
    "bits",
    type=BITS,
    help="Bits of the matrices when generating [default: those of FOLDER, else none].",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    config: str,
    overrides: tuple[str, ...],
    context: int | None,
    memory: int | None,
    dtype: Literal["fp32", "bf16"] | None,
    bits: Bits | None,
    as_json: bool,
) -> None:
    """Parameters, FLOPs and bytes of a configuration, and whether they fit."""
    run, _ = resolve(config, overrides, read=read_any_config)
    bits = bits or _bits_of(Path(config))
    costs = plan(run, context=context, memory_bytes=memory, dtype=dtype, bits=bits)
    preset = PRESETS.get(config)
    assumptions = preset.assumptions if preset else ()
    if as_json:
        click.echo(json.dumps(asdict(costs) | {"assumptions": assumptions}, indent=2))
        return
    model = run.model
    click.echo(f"{config}: {model.num_layers} layers {model.schedule}, width {model.dim}\n")
    click.echo(_parameters(costs))
    if preset and preset.published_active:
        difference = costs.parameters.active_without_embeddings / preset.published_active - 1
        click.echo(
            f"  published: {count(preset.published_active)} active without embedding and head "
            f"(here {difference:+.2%})"
        )
    click.echo(f"\none token, forward\n{_token(costs)}")
    click.echo(f"\none sequence in {costs.generation.dtype}\n{_sequence(costs)}")
    click.echo(f"\ntraining\n{_training(run, costs)}")
    matrices = f", matrices in {bits} bits" if bits else ""
    click.echo(f"\ngenerating in {costs.generation.dtype}{matrices}\n{_generation(costs)}")
    if assumptions:
        click.echo("\nassumptions")
        for sentence in assumptions:
            click.echo(click.wrap_text(sentence, 96, "  - ", "    "))


def _parameters(costs: Plan) -> str:
    counted = costs.parameters
    rows = [("parameters", "total", "active")]
    for part, total in counted.by_part.items():
        rows.append((f"  {part}", f"{total:,}", f"{counted.active_by_part[part]:,}"))
    rows.append(("  all", f"{counted.total:,}", f"{counted.active:,}"))
    rows.append(("  all but embedding and head", "", f"{counted.active_without_embeddings:,}"))
    return table(rows, right=(1, 2))


def _token(costs: Plan) -> str:
    rows = [
        (f"mean of {costs.context:,} read at once", flops(costs.flops_per_token)),
        (f"the next after {costs.context:,}", flops(costs.flops_per_next_token)),
    ]
    return table(rows, right=(1,), indent=2)


def _sequence(costs: Plan) -> str:
    state, cache = costs.state_bytes_per_sequence, costs.cache_bytes_per_token
    rows = [
        ("fixed state", size(state), f"{state:,} bytes, at any length"),
        ("cache", size(cache), f"{cache:,} bytes, for each token"),
        ("together", size(state + costs.context * cache), f"at {costs.context:,} tokens"),
    ]
    if state and cache:
        rows.append(("", "", f"the cache outgrows the state after {state // cache:,} tokens"))
    return table(rows, right=(1,), indent=2)


def _training(run: RunConfig, costs: Plan) -> str:
    cost = costs.training
    rows = [
        ("weights", size(cost.weight_bytes), "fp32"),
        ("gradients", size(cost.gradient_bytes), "fp32"),
        ("optimizer", size(cost.optimizer_bytes), run.optimizer.name),
    ]
    if cost.compute_copies:
        rows.append(("copies", size(cost.compute_copies), "of the weights, in bf16"))
    rows += [
        (
            "activations",
            f"~{size(cost.activation_bytes)}",
            f"of {run.data.rows} rows of {run.data.context:,} tokens",
        ),
        ("together", f"~{size(cost.total_bytes)}", _verdict(cost.total_bytes, costs.memory_bytes)),
        ("checkpoint", size(cost.checkpoint_bytes), "on disk, each"),
        (
            "compute",
            flops(cost.flops),
            f"{run.train.steps:,} steps of {cost.tokens_per_step:,} tokens: {count(cost.tokens)}",
        ),
    ]
    return table(rows, right=(1,), indent=2)


def _generation(costs: Plan) -> str:
    cost = costs.generation
    rows = [
        ("weights", size(cost.weight_bytes), ""),
        (
            "with one sequence",
            size(cost.total_bytes),
            _verdict(cost.total_bytes, costs.memory_bytes),
        ),
        ("sequences", f"{cost.sequences_that_fit:,}", f"of {costs.context:,} tokens fit beside"),
    ]
    if cost.bits is not None and cost.num_experts and not cost.fits:
        rows.append(
            (
                "experts",
                f"{cost.cached_experts:,}",
                f"of {cost.num_experts:,} stay in memory, {size(cost.expert_bytes)} each, "
                f"under --memory {costs.memory_bytes:,}",
            )
        )
    return table(rows, right=(1,), indent=2)


def _bits_of(folder: Path) -> Bits | None:
    """What a folder's weights are quantised to, as far as it has weights."""
    try:
        return quantization_of(read_header(folder / WEIGHTS))
    except CheckpointError:
        return None


def _verdict(needed: int, memory: int) -> str:
    if needed <= memory:
        return f"fits in {size(memory)}"
    return f"does not fit in {size(memory)}: {size(needed - memory)} too much"
