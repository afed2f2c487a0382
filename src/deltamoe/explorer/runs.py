"""Training runs as the page reads them: from a run folder's own files, while training goes on.

``metrics.jsonl`` is append-only and its last line may be torn; what is not a whole line yet is left
for the next time. Knows nothing of models. No torch.
"""

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from deltamoe.checkpoint.run_folder import load_run_config
from deltamoe.config.parse import to_dict
from deltamoe.config.strict_json import open_regular
from deltamoe.errors import ConfigError, DataError, DeltamoeError

__all__ = ["METRICS", "list_runs", "read_run", "runs_folder"]

METRICS = "metrics.jsonl"
_MOST_BYTES = 256 << 20
_TAIL_BYTES = 1 << 18
_FRESH_S = 60.0
_EVENTS = {"validation_bits_per_byte": "validation", "sample": "sample"}


def runs_folder(path: Path) -> Path | None:
    """The folder whose runs are shown beside what a person opened; None if it is no run's."""
    path = path.resolve()
    for folder in (path, path.parent.parent):
        if (folder / METRICS).is_file():
            return folder.parent
    return None


def list_runs(folder: Path, opened: Path | None = None) -> list[dict[str, Any]]:
    """The runs in a folder, newest first."""
    found = []
    for run in sorted(folder.iterdir()):
        metrics = run / METRICS
        if run.name.startswith(".") or not metrics.is_file():
            continue
        found.append(
            {
                "name": run.name,
                "step": _last_step(metrics),
                "steps": _planned(run),
                "modified": metrics.stat().st_mtime,
                "is_open": opened is not None and run.resolve() in (opened, *opened.parents),
            }
        )
    return sorted(found, key=lambda run: -run["modified"])


def read_run(folder: Path, name: str, *, after: int = 0, points: int = 2_000) -> dict[str, Any]:
    """The records of one run after a step, thinned to about ``points``.

    Raises:
        DataError: no such run, or its metrics cannot be read.
        ConfigError: ``after`` or ``points`` out of range.
    """
    if not 10 <= points <= 10_000:
        raise ConfigError(f"points = {points}: expected 10 to 10,000")
    if after < 0:
        raise ConfigError(f"after = {after}: expected a step >= 0")
    names = [run.name for run in folder.iterdir() if (run / METRICS).is_file()]
    if name not in names:  # a name is compared and never used as a path
        raise DataError(
            f"no run {name[:80]!r}; there are {', '.join(sorted(names)[:20]) or 'none'}"
        )
    run = folder / name
    records = [record for record in _records(run / METRICS) if record["step"] > after]
    config = _config(run)
    age = time.time() - (run / METRICS).stat().st_mtime
    return {
        "name": name,
        "config": config,
        "records": _thinned(records, points),
        "events": _events(run, config, records, after),
        "next": records[-1]["step"] if records else after,
        "num_records": len(records),
        "is_running": age < _FRESH_S,
    }


def _records(metrics: Path) -> list[dict[str, Any]]:
    with open_regular(metrics, error=DataError) as file:
        content = file.read(_MOST_BYTES)
    return _whole_lines(content)


def _whole_lines(content: bytes) -> list[dict[str, Any]]:
    """The records of all whole lines; a line that is none is left out."""
    records = []
    for line in content[: content.rfind(b"\n") + 1].splitlines():
        try:
            record = json.loads(line, parse_constant=lambda name: None)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
    return records


def _last_step(metrics: Path) -> int | None:
    with open_regular(metrics, error=DataError) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        records = _whole_lines(file.read())
    return records[-1]["step"] if records else None


def _config(run: Path) -> dict[str, Any] | None:
    try:
        return to_dict(load_run_config(run))
    except DeltamoeError:
        return None


def _planned(run: Path) -> int | None:
    config = _config(run)
    return None if config is None else config["train"]["steps"]


def _thinned(records: list[dict[str, Any]], points: int) -> list[dict[str, Any]]:
    """Of each stretch the records of least and greatest loss, and all with an event."""
    if len(records) <= points:
        return records
    kept = {0, len(records) - 1}
    kept |= {at for at, record in enumerate(records) if any(key in record for key in _EVENTS)}
    width = math.ceil(2 * len(records) / points)
    for start in range(0, len(records), width):
        stretch = range(start, min(start + width, len(records)))
        losses = {at: _loss(records[at]) for at in stretch}
        kept |= {min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)}
    return [records[at] for at in sorted(kept)]


def _loss(record: dict[str, Any]) -> float:
    loss = record.get("loss")
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else math.inf


class _Event(NamedTuple):
    step: int
    kind: str
    text: str


def _events(
    run: Path, config: dict[str, Any] | None, records: list[dict[str, Any]], after: int
) -> list[dict[str, Any]]:
    """What happened behind a step, as the folder's own files tell it."""
    found = []
    for record in records:
        for key, kind in _EVENTS.items():
            if key in record:
                value = record[key]
                text = f"{value:.3f} bits/byte" if isinstance(value, float) else str(value)
                found.append(_Event(record["step"], kind, text))
    newest = records[-1]["step"] if records else after
    for step in _numbers(run.glob("checkpoints/step-*"), "step-"):
        if after < step <= newest:
            found.append(_Event(step, "checkpoint", f"step-{step}"))
            if config is not None and _is_odd(step, config):
                found.append(_Event(step, "stop", "training was stopped here"))
                if newest > step:
                    found.append(_Event(step + 1, "resume", "training went on"))
    for step in _numbers(run.glob("nonfinite-step-*.json"), "nonfinite-step-"):
        if step > after:
            found.append(_Event(step, "nan", "training met a number that is not finite"))
    return [event._asdict() for event in sorted(found)]


def _numbers(paths: Iterable[Path], prefix: str) -> list[int]:
    """The numbers behind a prefix in some files' names."""
    texts = [path.name.removeprefix(prefix).removesuffix(".json") for path in paths]
    return sorted(int(text) for text in texts if text.isdecimal() and len(text) < 16)


def _is_odd(step: int, config: dict[str, Any]) -> bool:
    """Whether no plan asks for a checkpoint at this step."""
    every, steps = config["train"]["checkpoint_every"], config["train"]["steps"]
    return step != steps and (not every or step % every != 0)
