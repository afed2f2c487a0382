"""``deltamoe generate``: continue a text, or many.

The text goes to standard output as it is written; what is said about it goes to standard error.
"""

import json
import time
from pathlib import Path
from typing import Any, Literal

import click

from deltamoe.cli.sampling import cache_report, model_options, sampling_options
from deltamoe.config import parse_json
from deltamoe.errors import DataError
from deltamoe.plan import Bits

__all__ = ["command"]

_ROWS = 16  # prompts of a file that are decoded together


@click.command("generate")
@model_options
@click.option("--prompt", default="", help="The text to continue; empty begins a new document.")
@click.option(
    "--prompts",
    "prompts_from",
    type=click.File("rb"),
    help="A file of prompts (- is standard input): plain lines, or JSON lines with a prompt in "
    "each if the first begins with {. Answers with a line of JSON each.",
)
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.option("--save-state", type=click.Path(path_type=Path), help="Keep the text's state here.")
@click.option("--load-state", type=click.Path(path_type=Path), help="Go on from a kept state.")
def command(
    path: Path,
    prompt: str,
    prompts_from: Any,
    device: str,
    dtype: Literal["fp32", "bf16"] | None,
    quantize: Bits | None,
    memory: int | None,
    as_json: bool,
    save_state: Path | None,
    load_state: Path | None,
    **options: Any,
) -> None:
    """Continue a text with the model in RUN: a run folder, a step folder or a published one.

    The JSON object holds prompt, text, ids and finish_reason: "stop" (a --stop text came),
    "length" (--max-tokens) or "end" (the model ended the document).
    """
    if prompts_from is not None and (prompt or save_state):
        raise click.UsageError("--prompts goes with neither --prompt nor --save-state")
    prompts = None if prompts_from is None else _prompts(prompts_from.read(), prompts_from.name)

    from deltamoe.inference.generation import Decoding, generate
    from deltamoe.inference.opened import open_model
    from deltamoe.inference.text_state import load_text_state, save_text_state

    opened = open_model(path, device=device, dtype=dtype, quantize=quantize, memory=memory)
    model, tokenizer = opened.model, opened.tokenizer
    weights = opened.checkpoint.weights_sha256
    if load_state is not None:
        options["state"] = load_text_state(load_state, model, weights_sha256=weights)
    if prompts is not None:
        for start in range(0, len(prompts), _ROWS):
            for generation in generate(model, tokenizer, prompts[start : start + _ROWS], **options):
                click.echo(json.dumps(generation.to_dict()))
        if report := cache_report(opened):
            click.echo(report, err=True)
        return

    decoding = Decoding(model, tokenizer, [prompt], **options)
    begin = time.perf_counter()
    for piece in decoding.pieces():
        if not as_json:
            click.echo(piece, nl=False)
    seconds = max(time.perf_counter() - begin, 1e-9)
    generation = decoding.generation(0)
    click.echo(json.dumps(generation.to_dict()) if as_json else "")
    written = len(generation.ids)
    click.echo(
        f"{written} tokens, {written / seconds:.0f} tokens/s, {generation.finish_reason}", err=True
    )
    if report := cache_report(opened):
        click.echo(report, err=True)
    if save_state is not None:
        save_text_state(save_state, generation.state, model, weights_sha256=weights)


def _prompts(content: bytes, source: str) -> list[str]:
    """The prompts of a file; blank lines are left out.

    Raises:
        DataError: not UTF-8, or a line of JSON without a prompt.
    """
    try:
        lines = [line for line in content.decode().splitlines() if line.strip()]
    except UnicodeDecodeError as fault:
        raise DataError(f"{source}: not UTF-8 text at byte {fault.start}") from None
    if not lines or not lines[0].startswith("{"):
        return lines
    return [_prompt(line, f"{source}, prompt {number}") for number, line in enumerate(lines, 1)]


def _prompt(line: str, source: str) -> str:
    match parse_json(line, source=source, error=DataError):
        case {"prompt": str(prompt)}:
            return prompt
    raise DataError(f'{source}: expected an object such as {{"prompt": "Once upon"}}')
