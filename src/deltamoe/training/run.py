"""The folder of one run: what is in it, when it may be entered, what may change on resuming.

    RUN/config.json      what is trained, on what, and how
    RUN/tokenizer.json   RUN/data.json: the vocabulary, and which text (with its fingerprint)
    RUN/README.md        these lines, with the commands to go on
    RUN/metrics.jsonl    one line a step; tensorboard/: the same numbers
    RUN/checkpoints/     step-N/, each complete in itself

Knows nothing of models and optimizers.
"""

import json
import shutil
from pathlib import Path

from deltamoe.checkpoint import (
    Checkpoint,
    clean_run,
    load_run_config,
    newest_checkpoint,
    step_folders,
    write_run_config,
)
from deltamoe.checkpoint.durable import replace_file
from deltamoe.checkpoint.folder import CONFIG
from deltamoe.checkpoint.lock import LOCK
from deltamoe.checkpoint.manifest import MANIFEST
from deltamoe.config import RunConfig, check_format, read_json, to_dict
from deltamoe.config.parse import leaves
from deltamoe.data import PreparedData
from deltamoe.errors import CheckpointError, ConfigError, DoesNotFitError
from deltamoe.plan import plan
from deltamoe.version import __version__

__all__ = ["CHANGEABLE", "enter_run", "require_enterable"]

DATA = "data.json"

CHANGEABLE = frozenset(
    {
        "data.cache",
        "train.checkpoint_every",
        "train.device",
        "train.keep_checkpoints",
        "train.keep_every",
        "train.on_full_disk",
        "train.sample_every",
        "train.sample_prompt",
        "train.steps",
        "train.stop_at",
        "train.threads",
        "train.validate_every",
        "train.validation_tokens",
    }
)
"""Keys that a resumed run may set anew: they change how far it goes and what is written down."""


def require_enterable(folder: Path, config: RunConfig, *, resume: bool) -> None:
    """Refuse a folder before anything costly is done for it.

    Args:
        folder: of the run; it need not exist.
        config: what is to be trained there.
        resume: whether a run that is there may go on.

    Raises:
        ConfigError: the folder holds something and ``resume`` is false; or it holds no run; or
            its run differs in more than ``CHANGEABLE`` keys, or is already past ``train.steps``.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: this is a file; expected a folder for the run")
    if (folder / MANIFEST).exists():
        raise ConfigError(
            f"{folder}: a checkpoint and not a run: it can be used and cannot be trained on; "
            "resume the run it was made from"
        )
    if (folder / CONFIG).exists():
        if not resume:
            raise ConfigError(
                f"{folder}: holds a run already; continue it with "
                f"`deltamoe train --resume {folder}`, or choose another folder"
            )
        _require_same(folder, load_run_config(folder), config)
        done = max(
            (int(path.name.removeprefix("step-")) for path in step_folders(folder)), default=0
        )
        if config.train.steps < done:
            raise ConfigError(
                f"train.steps = {config.train.steps}, but {folder} is at step {done} already"
            )
    elif folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
        raise ConfigError(
            f"{folder}: not empty, and no run (config.json is missing); choose another folder"
        )


def enter_run(
    folder: Path, config: RunConfig, data: PreparedData, *, resume: bool
) -> Checkpoint | None:
    """Make the folder of a new run, or find where an old one goes on; its lock is held.

    Returns:
        the newest good checkpoint; None where training starts at step 0.

    Raises:
        ConfigError: as ``require_enterable``.
        CheckpointError: the run was trained on other data, or none of its checkpoints is good.
        DoesNotFitError: the disk has no room for the checkpoints to be kept and one more.
    """
    require_enterable(folder, config, resume=resume)
    _require_room(folder, config)
    if (folder / CONFIG).exists():
        _require_same_data(folder, data)
        clean_run(folder)
        write_run_config(folder, config)
        return newest_checkpoint(folder) if step_folders(folder) else None
    _write(folder / DATA, json.dumps(data.manifest, indent=2) + "\n")
    _write(folder / "README.md", _readme(folder, config))
    data.tokenizer.save(folder)
    write_run_config(folder, config)
    return None


def _require_room(folder: Path, config: RunConfig) -> None:
    num_new = max(1, config.train.keep_checkpoints + 1 - len(step_folders(folder)))
    needed = num_new * plan(config).training.checkpoint_bytes
    free = shutil.disk_usage(folder).free
    if free < needed and config.train.on_full_disk == "stop":
        raise DoesNotFitError(
            f"{folder}: {num_new} more checkpoints take about {needed:,} bytes and the disk has "
            f"{free:,} free. Free some space, write elsewhere, or lower train.keep_checkpoints."
        )


def _require_same(folder: Path, recorded: RunConfig, wanted: RunConfig) -> None:
    before, after = leaves(to_dict(recorded)), leaves(to_dict(wanted))
    for key in sorted(set(before) | set(after)):
        if key not in CHANGEABLE and before.get(key) != after.get(key):
            raise ConfigError(
                f"{key} = {after.get(key)!r}, but the run in {folder} began with "
                f"{before.get(key)!r}; a resumed run may change only "
                + ", ".join(sorted(CHANGEABLE))
            )


def _require_same_data(folder: Path, data: PreparedData) -> None:
    path = folder / DATA
    recorded = read_json(path, error=CheckpointError)
    check_format(recorded, source=str(path), error=CheckpointError)
    if recorded.get("fingerprint") != data.fingerprint:
        raise CheckpointError(
            f"{path}: the run was trained on other data (fingerprint "
            f"{str(recorded.get('fingerprint'))[:12]}, found {data.fingerprint[:12]}): the text, "
            "its split or its tokenizer has changed since. Restore it, or start a new run."
        )


def _write(path: Path, text: str) -> None:
    def write(unfinished: Path) -> None:
        unfinished.write_text(text, encoding="utf-8")

    replace_file(path, write)


def _readme(folder: Path, config: RunConfig) -> str:
    return f"""# A training run of deltamoe {__version__}

{config.model.num_layers} layers ({config.model.schedule}), {config.train.steps} steps on \
{config.data.path}.

| file | what |
|---|---|
| `config.json` | what is trained, on what, and how; `deltamoe config show {folder}` prints it |
| `tokenizer.json` | the vocabulary |
| `data.json` | which text, with the fingerprint that a resumed run must find again |
| `metrics.jsonl` | one JSON object for each step |
| `tensorboard/` | the same numbers, for `tensorboard --logdir {folder}` |
| `checkpoints/step-N/` | weights, optimizer and place in the data after step N; each is complete |

Go on after a stop, a crash, or with more steps:

    deltamoe train --resume {folder}
    deltamoe train --resume {folder} train.steps={2 * config.train.steps}

Use it:

    deltamoe generate {folder} --prompt "Once"
    deltamoe eval {folder}
"""
