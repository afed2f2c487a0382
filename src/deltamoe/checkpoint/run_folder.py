"""A run folder on disk: its config, its checkpoints, which of them to trust and which to drop.

    RUN/config.json  tokenizer.json  run.lock  metrics.jsonl  …
    RUN/checkpoints/step-250/   step-500/   …          (folder.py)

``find_checkpoint`` accepts a run folder (its newest good checkpoint) or one step folder; every
reader of models goes through it. Knows nothing of how a run is trained. No torch.
"""

import logging
import os
import re
import shutil
from pathlib import Path

from deltamoe.checkpoint.durable import replace_file, storage_faults
from deltamoe.checkpoint.folder import (
    CONFIG,
    WEIGHTS,
    Checkpoint,
    checkpoint_entries,
    open_checkpoint,
    step_folders,
    step_of,
)
from deltamoe.checkpoint.manifest import MANIFEST
from deltamoe.checkpoint.published import (
    is_published,
    is_published_config,
    published_checkpoint,
    read_published_config,
)
from deltamoe.config.model import ModelConfig
from deltamoe.config.parse import FORMAT, from_dict, read_config, to_json
from deltamoe.config.run import RunConfig
from deltamoe.config.strict_json import check_format, read_json
from deltamoe.errors import CheckpointError, ConfigError

__all__ = [
    "clean_run",
    "find_checkpoint",
    "load_config",
    "load_run_config",
    "newest_checkpoint",
    "prune_checkpoints",
    "read_any_config",
    "write_run_config",
]

_LOG = logging.getLogger("deltamoe")
_STRAY = re.compile(r"\.(?P<step>step-[0-9]+)\.(?P<fate>writing|old|discarded)")


def newest_checkpoint(run: Path | str, *, check_hashes: bool = True) -> Checkpoint:
    """Open the newest good checkpoint of a run.

    A bad one is reported at WARNING on the "deltamoe" logger and the one before it is tried. A
    checkpoint of another model than the run's config.json describes counts as bad. What is never
    done is to go on without a checkpoint: a fresh start is right only if ``step_folders`` is
    empty, and that is the caller's decision.

    Raises:
        CheckpointError: there is no checkpoint, or none is good (lists each with its reason), or
            the run's own config.json is damaged.
    """
    folders = step_folders(run)
    if not folders:
        raise CheckpointError(f"{run}: no checkpoint yet; expected checkpoints/step-N in it")
    model = load_config(run) if (Path(run) / CONFIG).exists() else None
    reasons = []
    for folder in reversed(folders):
        try:
            checkpoint = open_checkpoint(folder, check_hashes=check_hashes)
            _check_model(checkpoint, model)
        except CheckpointError as fault:
            _LOG.warning("BAD CHECKPOINT, falling back to the one before it: %s", fault)
            reasons.append(str(fault))
        else:
            return checkpoint
    listed = "".join(f"\n  {reason}" for reason in reasons)
    raise CheckpointError(
        f"{run}: none of its {len(folders)} checkpoints is good:{listed}\n"
        "Restore one from a copy, or start a new run in another folder."
    )


def find_checkpoint(path: Path | str, *, check_hashes: bool = True) -> Checkpoint:
    """Open what a person points at: a step folder, a run folder's newest good one, or published.

    Raises:
        CheckpointError: none of the three, or no good checkpoint in it.
    """
    path = _existing_folder(path)
    if is_published(path):
        return published_checkpoint(path, check_hashes=check_hashes)
    if (path / MANIFEST).exists() or step_of(path) is not None or (path / WEIGHTS).exists():
        _refuse_foreign(path)
        return open_checkpoint(path, check_hashes=check_hashes)
    if (path / "checkpoints").is_dir():
        return newest_checkpoint(path, check_hashes=check_hashes)
    _refuse_foreign(path)
    raise CheckpointError(
        f"{path}: neither a run folder (checkpoints/ is missing) nor a step folder "
        f"({MANIFEST} is missing)"
    )


def load_run_config(path: Path | str) -> RunConfig:
    """Read the config.json of a run folder or a step folder.

    Raises:
        CheckpointError: missing, damaged, newer, or of a published model.
    """
    return _read_config(_existing_folder(path) / CONFIG)


def load_config(path: Path | str) -> ModelConfig:
    """The model's geometry out of a run folder, a step folder or a published one.

    Raises:
        CheckpointError: missing, damaged, newer, or a published one of another kind of model.
    """
    path = _existing_folder(path)
    return read_published_config(path) if is_published(path) else load_run_config(path).model


def read_any_config(file: Path) -> RunConfig:
    """Read the config.json of a run, a step or a published folder.

    Of a published model everything but the geometry is what it is by default.

    Raises:
        CheckpointError: a published model that cannot be read here.
        ConfigError: anything else that is wrong with the file.
    """
    if is_published(file.parent) and file.name == CONFIG:
        return RunConfig(model=read_published_config(file.parent))
    return read_config(file)


def write_run_config(run: Path | str, config: RunConfig) -> None:
    """Write the run's config.json, in one step."""
    text = to_json(config)
    replace_file(Path(run) / CONFIG, lambda path: _write_text(path, text))


def prune_checkpoints(run: Path | str, *, keep: int, keep_every: int = 0) -> list[Path]:
    """Delete old checkpoints; call it after a new one has been written.

    Kept are the newest ``keep``, and for good every step that is a multiple of ``keep_every``.
    All others go. A folder vanishes from sight in one step before its files are deleted.

    Args:
        run: the run folder, its lock held.
        keep: how many of the newest stay, >= 1.
        keep_every: multiples of this many steps stay; 0 keeps none so.

    Returns:
        the folders that are gone.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: at least one checkpoint must stay")
    old = step_folders(run)[:-keep]
    doomed = [folder for folder in old if not keep_every or (step_of(folder) or 0) % keep_every]
    for folder in doomed:
        discarded = folder.with_name(f".{folder.name}.discarded")
        with storage_faults(folder, Path(run), reassurance="It stays; the run is not harmed."):
            os.rename(folder, discarded)
        shutil.rmtree(discarded, ignore_errors=True)
    return doomed


def clean_run(run: Path | str) -> None:
    """Remove what a crash left behind; call it when training starts, the run's lock held.

    A checkpoint that a crash caught while it was being replaced gets its name back.
    """
    for stray in checkpoint_entries(run):
        if match := _STRAY.fullmatch(stray.name):
            final = stray.with_name(match["step"])
            with storage_faults(stray, Path(run)):
                if match["fate"] == "old" and not final.exists():
                    os.rename(stray, final)
                else:
                    shutil.rmtree(stray)


def _existing_folder(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_dir():
        found = "this is a file" if path.exists() else "there is nothing there"
        raise CheckpointError(f"{path}: expected a run folder or a step folder; {found}")
    return path


def _read_config(path: Path) -> RunConfig:
    data = read_json(path, error=CheckpointError)
    if is_published_config(data):
        raise CheckpointError(
            f"{path}: a published model (model_type {ascii(data['model_type'])[:60]}), not a run "
            "of deltamoe; `deltamoe convert` makes a checkpoint of ours out of it"
        )
    check_format(data, source=str(path), known=FORMAT, error=CheckpointError)
    del data["format"]
    try:
        return from_dict(data, RunConfig)
    except ConfigError as fault:
        raise CheckpointError(f"{path}: {fault}") from fault


def _refuse_foreign(folder: Path) -> None:
    if not (folder / MANIFEST).exists() and (folder / CONFIG).exists():
        _read_config(folder / CONFIG)


def _check_model(checkpoint: Checkpoint, expected: ModelConfig | None) -> None:
    if expected is None or CONFIG not in checkpoint.manifest.files:
        return
    if load_config(checkpoint.path) != expected:
        raise CheckpointError(
            f"{checkpoint.path / CONFIG}: describes another model than the run's {CONFIG}; "
            "was the checkpoint copied in from another run?"
        )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
