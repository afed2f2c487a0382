"""``deltamoe chat``: talk to a model, or write a text together with a base model."""

from pathlib import Path
from typing import Any, Literal

import click

from deltamoe.cli.sampling import model_options, sampling_options
from deltamoe.plan import Bits

__all__ = ["command"]


@click.command("chat")
@model_options
@sampling_options
@click.option("--system", default="", metavar="TEXT", help="What the system says first.")
def command(
    path: Path,
    device: str,
    dtype: Literal["fp32", "bf16"] | None,
    quantize: Bits | None,
    memory: int | None,
    system: str,
    **options: Any,
) -> None:
    """Talk to the model in RUN: a run folder, a step folder or a published one.

    A model with a chat template answers turn by turn. Any other was trained to continue text, not
    to obey: begin something and it goes on. Lines may come from a terminal or a pipe; /help lists
    what else can be typed.
    """
    from deltamoe.cli.conversation import Conversation
    from deltamoe.inference.opened import open_model

    opened = open_model(path, device=device, dtype=dtype, quantize=quantize, memory=memory)
    Conversation(opened, options, system=system).run()
