"""``deltamoe chat``: write a text together with a base model, line by line."""

from pathlib import Path
from typing import Any, Literal

import click

from deltamoe.cli.sampling import model_options, sampling_options

__all__ = ["command"]


@click.command("chat")
@model_options
@sampling_options
def command(path: Path, device: str, dtype: Literal["fp32", "bf16"] | None, **options: Any) -> None:
    """Write a text together with the model in RUN, a run folder or a step folder.

    The model was trained to continue text, not to obey: begin something and it goes on. Lines may
    come from a terminal or a pipe; /help lists what else can be typed.
    """
    from deltamoe.cli.conversation import Conversation
    from deltamoe.inference.opened import open_model

    Conversation(open_model(path, device=device, dtype=dtype), options).run()
