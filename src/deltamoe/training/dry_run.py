"""One step of a run and one checkpoint of it, to see whether the real thing will go through."""

import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from deltamoe.checkpoint import open_checkpoint
from deltamoe.config import RunConfig
from deltamoe.data import PreparedData
from deltamoe.errors import CheckpointError
from deltamoe.training.trainer import Trainer

__all__ = ["DryRun", "dry_run"]


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What the rehearsal found.

    Attributes:
        seconds_per_step: of the first step, which also warms the machine up.
        loss: of that step, in nats a token.
        peak_bytes: the most memory in use: the device's, or this process's on a CPU.
        checkpoint_bytes: on disk.
        precision: what was computed in which precision, and where.
    """

    seconds_per_step: float
    loss: float
    peak_bytes: int
    checkpoint_bytes: int
    precision: str


def dry_run(config: RunConfig, data: PreparedData, *, beside: Path) -> DryRun:
    """Build, take one step, save, load, compare; leave nothing.

    Args:
        config: of the run.
        data: prepared for it.
        beside: the run folder to be; the checkpoint is written to the same disk.

    Raises:
        CheckpointError: what was loaded is not what was saved.
        Others: whatever would end the real run.
    """
    parent = next(folder for folder in beside.absolute().parents if folder.is_dir())
    trainer = Trainer(config, data)
    started = time.perf_counter()
    report = trainer.train_step()
    seconds = time.perf_counter() - started
    peak_bytes = _peak_bytes(trainer.device)
    with tempfile.TemporaryDirectory(prefix=".deltamoe-dry-run-", dir=parent) as folder:
        saved = trainer.save(Path(folder), record={})
        loaded = Trainer(config, data, checkpoint=open_checkpoint(saved.path))
    before, after = trainer.tensors(), loaded.tensors()
    for name in before:
        if not torch.equal(before[name], after[name]):
            raise CheckpointError(f"the tensor {name} came back from the disk changed")
    return DryRun(
        seconds_per_step=seconds,
        loss=report.loss,
        peak_bytes=peak_bytes,
        checkpoint_bytes=saved.manifest.num_bytes,
        precision=trainer.precision,
    )


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
