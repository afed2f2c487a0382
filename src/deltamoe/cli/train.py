"""``deltamoe train``: train a model in a run folder, or go on with one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deltamoe.cli.format import count, size
from deltamoe.config import RunConfig, resolve
from deltamoe.errors import Interrupted
from deltamoe.plan import plan

if TYPE_CHECKING:
    from deltamoe.data import PreparedData
    from deltamoe.training.loop import Sampler
    from deltamoe.training.progress import Progress
    from deltamoe.training.signals import StopRequest

__all__ = ["command"]

_SAMPLE_TOKENS = 100

_EXAMPLES = """\b
Examples:
  deltamoe train nano --out runs/nano
  deltamoe train nano --out runs/long train.steps=2k optimizer.lr=2e-3
  deltamoe train --resume runs/nano
  deltamoe train --resume runs/nano train.steps=2k
  deltamoe train nano --dry-run
"""


@click.command("train", epilog=_EXAMPLES)
@click.argument("source", metavar="PRESET|FILE|RUN")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", type=click.Path(path_type=Path), help="The run folder; new or empty.")
@click.option("--resume", is_flag=True, help="Go on with the run in the folder, if there is one.")
@click.option("--dry-run", is_flag=True, help="One step and one checkpoint; leaves nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the last step's record at the end.")
def command(
    source: str,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train a model, or go on training one; what happens is told on standard error.

    SIGTERM and Ctrl-C write a checkpoint and exit with 75; a second one exits at once.
    With --out, --resume goes on with the run there or starts it: the same command can be repeated.
    """
    config, _ = resolve(source, overrides)
    if out is None and resume:
        out = Path(source)
    if out is None and not dry_run:
        raise click.UsageError("where to? give the run folder: --out runs/NAME")
    folder = out or Path("run")

    from deltamoe.data import prepare
    from deltamoe.training.dry_run import dry_run as rehearse
    from deltamoe.training.loop import train
    from deltamoe.training.progress import Progress
    from deltamoe.training.run import require_enterable
    from deltamoe.training.signals import StopRequest

    if not dry_run:
        require_enterable(folder, config, resume=resume)
    with StopRequest() as stop, Progress() as progress:
        _tell_plan(config, progress)
        tell = _preparation(stop, progress)
        data = prepare(config.data, progress=tell)
        _tell_data(data, progress)
        if dry_run:
            found = rehearse(config, data, beside=folder)
            progress.say(
                f"precision: {found.precision}\n"
                f"dry run: a step took {found.seconds_per_step:.2f} s (loss {found.loss:.3f}), "
                f"{size(found.peak_bytes)} of memory at most; a checkpoint of "
                f"{size(found.checkpoint_bytes)} was written, read back and found equal"
            )
            return
        to_beat = _baselines(data, tell)
        for line in to_beat:
            progress.say(line)
        record = train(
            config,
            folder,
            data,
            stop=stop,
            progress=progress,
            resume=resume,
            sampler=_sampler(config, data, stop),
        )
        if reached := record.get("validation_bits_per_byte"):
            progress.say(f"on text it has never seen: {reached:.3f} bits/byte")
            for line in to_beat:
                progress.say(line)
        progress.say(f"done: deltamoe generate {folder} --prompt '…'")
    if as_json:
        click.echo(json.dumps(record))


def _tell_plan(config: RunConfig, progress: "Progress") -> None:
    costs = plan(config)
    training, counted = costs.training, costs.parameters
    model = config.model
    progress.say(
        f"model: {count(counted.total)} parameters, {count(counted.active)} active; "
        f"{model.num_layers} layers {model.schedule}, width {model.dim}"
    )
    progress.say(
        f"plan: {config.train.steps:,} steps of {training.tokens_per_step:,} tokens = "
        f"{count(training.tokens)} tokens, {count(training.flops)}FLOP; about "
        f"{size(training.total_bytes)} of memory, {size(training.checkpoint_bytes)} a checkpoint"
    )
    if not training.fits:
        progress.say(
            f"warning: this machine has {size(costs.memory_bytes)}; lower data.rows or set "
            "train.checkpoint_activations=true"
        )


def _tell_data(data: "PreparedData", progress: "Progress") -> None:
    train, validation = data.train, data.validation
    progress.say(
        f"data: {count(train.num_tokens)} tokens ({size(train.num_bytes)}) to train on, "
        f"{count(validation.num_tokens)} held out; {data.tokenizer.name} tokenizer"
    )


def _baselines(data: "PreparedData", tell: Callable[..., None]) -> list[str]:
    """What a 5-gram and xz make of each source's held-out text, a line each."""
    from deltamoe.data import measure_baselines

    lines = []
    for source in data.sources:
        found = measure_baselines(data.tokenizer, source, tell)
        lines.append(
            f"to beat on {source.name}: 5-gram {found.ngram:.3f} bits/byte, "
            f"xz {found.xz:.3f}, xz that has read the training text {found.xz_given_train:.3f}"
        )
    return lines


def _preparation(stop: "StopRequest", progress: "Progress") -> Callable[..., None]:
    """Tell once what is being prepared, and leave it when a signal comes."""
    told = ""

    def update(what: str, done: int = 0, total: int | None = None) -> None:
        nonlocal told
        if stop.is_requested:
            raise Interrupted(f"stopped by {stop.name} while {what}; nothing was trained yet")
        if what != told:
            told = what
            progress.say(f"{what} …")

    return update


def _sampler(config: RunConfig, data: "PreparedData", stop: "StopRequest") -> "Sampler":
    from deltamoe.inference.generation import Decoding
    from deltamoe.model import HybridLM

    def sample(model: HybridLM, step: int) -> str:
        prompt = config.train.sample_prompt
        decoding = Decoding(model, data.tokenizer, [prompt], max_tokens=_SAMPLE_TOKENS, seed=step)
        while decoding.is_running and not stop.is_requested:
            decoding.step()
        return prompt + decoding.generation(0).text

    return sample
