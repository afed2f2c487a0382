"""Training runs as the page reads them: from a run folder's own files, while training goes on.

``metrics.jsonl`` is read from where it was left, and its last line may be torn: what is not a whole
line yet waits for the next time. A run that is resumed rewrites the file up to its checkpoint;
``_Cursor`` notices. Knows nothing of models. No torch.
"""

import fcntl
import json
import math
import os
import re
import socket
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from deltamoe.checkpoint.lock import LOCK
from deltamoe.checkpoint.run_folder import load_run_config
from deltamoe.config.parse import to_dict
from deltamoe.config.strict_json import open_regular
from deltamoe.errors import ConfigError, DataError, DeltamoeError

__all__ = ["METRICS", "is_running", "list_runs", "read_run", "runs_folder"]

METRICS = "metrics.jsonl"
_MOST_BYTES = 64 << 20  # of one answer; what is left comes with the next
_TAIL_BYTES = 1 << 18
_MARK_BYTES = 4096
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
        step, config = _last_step(metrics), _config(run)
        found.append(
            {
                "name": run.name,
                "step": step,
                "steps": config and config["train"]["steps"],
                "modified": metrics.stat().st_mtime,
                "is_running": is_running(run, step, config),
                "is_open": opened is not None and run.resolve() in (opened, *opened.parents),
            }
        )
    return sorted(found, key=lambda run: -run["modified"])


def read_run(
    folder: Path, name: str, *, cursor: str | None = None, points: int = 2_000
) -> dict[str, Any]:
    """What a run wrote since an earlier answer, thinned to about ``points`` records.

    Args:
        folder: of all runs.
        name: of one.
        cursor: ``next`` of that answer; None is the beginning.
        points: 10 to 10,000.

    Raises:
        DataError: no such run, or its metrics cannot be read.
        ConfigError: ``cursor`` or ``points`` are none.
    """
    if not 10 <= points <= 10_000:
        raise ConfigError(f"points = {points}: expected 10 to 10,000")
    begin = None if cursor is None else _Cursor.parse(cursor)
    names = [run.name for run in folder.iterdir() if (run / METRICS).is_file()]
    if name not in names:  # a name is compared and never used as a path
        raise DataError(
            f"no run {name[:80]!r}; there are {', '.join(sorted(names)[:20]) or 'none'}"
        )
    run = folder / name
    with open_regular(run / METRICS, error=DataError) as file:
        is_anew = begin is None or not begin.holds(file)
        start = 0 if is_anew or begin is None else begin.offset
        file.seek(start)
        content = file.read(_MOST_BYTES)
        whole = content[: content.rfind(b"\n") + 1]
        after = _Cursor.at(file, start + len(whole))
    records, config, last = _records(whole), _config(run), _last_step(run / METRICS)
    return {
        "name": name,
        "config": config,
        "records": _thinned(records, points),
        "events": _events(run, config, records, last),
        "next": str(after),
        "is_anew": is_anew,
        "has_more": len(content) == _MOST_BYTES,
        "num_records": len(records),
        "is_running": is_running(run, last, config),
    }


class _Cursor(NamedTuple):
    """A place in a file that grows: how far it was read, and a sum of the bytes before that."""

    offset: int
    mark: int

    def __str__(self) -> str:
        return f"{self.offset}-{self.mark:08x}"

    @classmethod
    def parse(cls, text: str) -> "_Cursor":
        if not (found := re.fullmatch(r"(\d{1,15})-([0-9a-f]{8})", text, re.ASCII)):
            raise ConfigError(f"from = {text[:40]!a}: expected `next` of an earlier answer")
        return cls(int(found[1]), int(found[2], 16))

    @classmethod
    def at(cls, file: BinaryIO, offset: int) -> "_Cursor":
        begin = max(0, offset - _MARK_BYTES)
        file.seek(begin)
        return cls(offset, zlib.crc32(file.read(offset - begin)))

    def holds(self, file: BinaryIO) -> bool:
        """Whether what was read up to here is still what stands there."""
        return self == self.at(file, self.offset) and self.offset <= file.seek(0, 2)


def is_running(run: Path, last_step: int | None, config: dict[str, Any] | None) -> bool:
    """Whether somebody trains in a run folder.

    On this machine the kernel knows: the trainer holds the folder's lock. Of a run that another
    machine writes (or that was copied here) only the file is known: it grew within the last
    minute, and not up to its last step.
    """
    if (is_held := _is_locked(run / LOCK)) is not None:
        return is_held
    is_done = config is not None and last_step is not None and last_step >= config["train"]["steps"]
    return not is_done and time.time() - (run / METRICS).stat().st_mtime < _FRESH_S


def _is_locked(lock: Path) -> bool | None:
    """Whether a process of this machine holds a lock; None where nobody here ever did."""
    try:
        with open_regular(lock, error=DataError) as file:
            owner = json.loads(file.read(1000))
            if owner["host"] != socket.gethostname():
                return None
            # asked first, so that a lock that is free is not even tried, and nobody is refused
            if not _is_alive(int(owner["pid"])):
                return False
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
            return False
    except (DataError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _records(lines: bytes) -> list[dict[str, Any]]:
    """The records of whole lines; a line that is none is left out."""
    records = []
    for line in lines.split(b"\n"):
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
        tail = file.read()
    records = _records(tail[: tail.rfind(b"\n") + 1])
    return records[-1]["step"] if records else None


def _config(run: Path) -> dict[str, Any] | None:
    try:
        return to_dict(load_run_config(run))
    except DeltamoeError:
        return None


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
    run: Path, config: dict[str, Any] | None, records: list[dict[str, Any]], last: int | None
) -> list[dict[str, Any]]:
    """What these records tell, and what the folder's other files do, by step."""
    found = []
    for record in records:
        for key, kind in _EVENTS.items():
            if key in record:
                value = record[key]
                text = f"{value:.3f} bits/byte" if isinstance(value, float) else str(value)
                found.append(_Event(record["step"], kind, text))
    for step in _numbers(run.glob("checkpoints/step-*"), "step-"):
        found.append(_Event(step, "checkpoint", f"step-{step}"))
        if config is not None and _is_odd(step, config):
            found.append(_Event(step, "stop", "training was stopped here"))
            if last is not None and last > step:
                found.append(_Event(step + 1, "resume", "training went on"))
    for step in _numbers(run.glob("nonfinite-step-*.json"), "nonfinite-step-"):
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
