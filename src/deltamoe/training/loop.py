"""The loop of a run: step, measure, save, show, until the end or until asked to stop.

What is decided here is *when*: when a checkpoint is written, when the model is validated, when a
signal is obeyed. ``Trainer`` knows how to take a step, ``run`` what a run folder is. May not import
``inference``: who wants sampled texts passes a sampler.
"""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from deltamoe.checkpoint import lock_run, prune_checkpoints
from deltamoe.config import RunConfig
from deltamoe.data import PreparedData
from deltamoe.errors import DeltamoeError, DoesNotFitError, Interrupted
from deltamoe.model import HybridLM
from deltamoe.plan import flops_per_token
from deltamoe.training.balance import max_violation, num_dead_experts
from deltamoe.training.metrics import (
    Metrics,
    Record,
    decay_half_lives,
    matmul_flops_per_s,
    read_metrics,
)
from deltamoe.training.nonfinite import StepNotFiniteError
from deltamoe.training.progress import Progress
from deltamoe.training.run import enter_run
from deltamoe.training.signals import StopRequest
from deltamoe.training.trainer import StepReport, Trainer
from deltamoe.training.validation import validate

__all__ = ["Sampler", "train"]

Sampler = Callable[[HybridLM, int], str]
"""Writes a text with the model of a step."""


def train(
    config: RunConfig,
    folder: Path,
    data: PreparedData,
    *,
    stop: StopRequest,
    progress: Progress,
    resume: bool = False,
    sampler: Sampler | None = None,
) -> Record:
    """Train in a run folder until ``train.steps``, ``train.stop_at`` or a signal.

    Args:
        config: of the run.
        folder: of the run; new, or to be resumed.
        data: prepared for ``config.data``.
        stop: polled everywhere; obeyed after the step at hand.
        progress: where people read how it goes.
        resume: go on with a run that is there.
        sampler: called every ``train.sample_every`` steps.

    Returns:
        the last step's record.

    Raises:
        Interrupted: a signal asked to stop; a checkpoint was written.
        NonFiniteError: a step met a NaN or an infinity; nothing was updated.
        RunInUseError: another process trains in this folder.
        ConfigError, CheckpointError, DoesNotFitError: see ``enter_run`` and ``Trainer``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock_run(folder):
        checkpoint = enter_run(folder, config, data, resume=resume)
        if resume and checkpoint is None:
            progress.say(f"{folder}: no checkpoint yet, so training starts at step 0")
        trainer = Trainer(config, data, checkpoint=checkpoint)
        return _Loop(trainer, folder, stop, progress, sampler).run()


class _Loop:
    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        stop: StopRequest,
        progress: Progress,
        sampler: Sampler | None,
    ) -> None:
        config = trainer.config
        self.trainer = trainer
        self.config = config.train
        self.folder = folder
        self.stop = stop
        self.progress = progress
        self.sampler = sampler
        self.saved_step = trainer.step if trainer.saved else None
        self.flops_per_token = 3 * flops_per_token(config.model, context=config.data.context)
        self.peak = matmul_flops_per_s(trainer.device, trainer.forward_dtype)
        # A stop_at that the run has reached has served its purpose.
        self.end = config.train.steps
        if config.train.stop_at is not None and config.train.stop_at > trainer.step:
            self.end = min(self.end, config.train.stop_at)

    def run(self) -> Record:
        self._greet()
        record, is_complete = self._resumed_record()
        step = self.trainer.step
        self.metrics = Metrics(
            self.folder, step=step if is_complete else step - 1, warn=self.progress.say
        )
        try:
            if not is_complete:
                self._conclude(record)
            while self.trainer.step < self.end:
                started = time.perf_counter()
                report = self._step()
                record = self._record(report, seconds=time.perf_counter() - started)
                self._conclude(record)
        finally:
            self.metrics.close()
        return record

    def _resumed_record(self) -> tuple[Record, bool]:
        """The restored step's record, and whether metrics.jsonl has it with all it should."""
        step = self.trainer.step
        if step == 0:
            return {}, True
        written = [r for r in read_metrics(self.folder / "metrics.jsonl") if r["step"] == step]
        is_complete = bool(written) and (
            step < self.config.steps or "validation_bits_per_byte" in written[-1]
        )
        return written[-1] if is_complete else dict(self.trainer.saved["record"]), is_complete

    def _step(self) -> StepReport:
        try:
            return self.trainer.train_step()
        except StepNotFiniteError as error:
            dump = self.folder / f"nonfinite-step-{error.details['step']}.json"
            with contextlib.suppress(OSError):  # the error itself says the most important part
                dump.write_text(json.dumps(error.details, indent=2) + "\n", encoding="utf-8")
                self.progress.say(f"what is known about the bad step: {dump}")
            raise
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise DoesNotFitError(
                f"step {self.trainer.step + 1} ran out of memory ({error}). Lower data.rows "
                "(and raise train.accumulate by as much), lower data.context, or set "
                "train.checkpoint_activations=true; `deltamoe plan` estimates what fits."
            ) from error

    def _record(self, report: StepReport, *, seconds: float) -> Record:
        optimizer = self.trainer.config.optimizer
        tokens_per_s = report.num_tokens / seconds
        loads = {str(layer): counts for layer, counts in report.counts.items()}
        return {
            "step": self.trainer.step,
            "loss": report.loss,
            "balance_loss": report.balance_loss,
            "lr": optimizer.lr * report.learning_rate_factor,
            "muon_lr": optimizer.muon_lr * report.learning_rate_factor,
            "grad_norm": report.grad_norm,
            "tokens": self.trainer.num_tokens,
            "seconds": seconds,
            "tokens_per_s": tokens_per_s,
            "matmul_fraction": tokens_per_s * self.flops_per_token / self.peak,
            "num_dropped": report.num_dropped,
            "load": {layer: counts.tolist() for layer, counts in loads.items()},
            "max_vio": {layer: max_violation(counts) for layer, counts in loads.items()},
            "dead_experts": {layer: num_dead_experts(counts) for layer, counts in loads.items()},
            "half_life": {str(k): v for k, v in decay_half_lives(self.trainer.model).items()},
            "memory_norm": {str(layer): norm for layer, norm in report.memory_norms.items()},
        }

    def _conclude(self, record: Record) -> None:
        """All that follows a step; the order makes every crash resumable without a gap."""
        config, step = self.config, self.trainer.step
        is_due = step == self.end or step % config.checkpoint_every == 0
        if (is_due or self.stop.is_requested) and self.saved_step != step:
            self._save(record)
        is_final = step == config.steps
        if is_final or (config.validate_every and step % config.validate_every == 0):
            self._validate(record, None if is_final else config.validation_tokens)
        if self.sampler and config.sample_every and step % config.sample_every == 0:
            self._sample(record)
        self.metrics.write(record)
        self.progress.update(record, end=self.end)
        if self.stop.is_requested and not (step == self.end and self._is_finished(record)):
            if self.saved_step != step:
                self._save(record)
            raise Interrupted(self._farewell())

    def _is_finished(self, record: Record) -> bool:
        return record["step"] < self.config.steps or "validation_bits_per_byte" in record

    def _validate(self, record: Record, max_tokens: int | None) -> None:
        trainer = self.trainer
        with trainer.autocast():
            found = validate(
                trainer.model,
                trainer.data.validation,
                trainer.data.tokenizer,
                context=trainer.config.data.context,
                rows=trainer.config.data.rows,
                max_tokens=max_tokens,
                stop=self.stop,
            )
        if found:
            record["validation_bits_per_byte"] = found.bits_per_byte
            record["validation_loss"] = found.loss
            record["validation_tokens"] = found.num_tokens

    def _sample(self, record: Record) -> None:
        assert self.sampler is not None
        if self.stop.is_requested:
            return
        self.trainer.model.eval()
        try:
            with torch.no_grad():
                record["sample"] = self.sampler(self.trainer.model, self.trainer.step)
            self.progress.say(f"step {self.trainer.step} writes: {record['sample']}")
        except DeltamoeError as error:  # a text less is no reason to stop training
            self.progress.say(f"warning: no sample: {error}")

    def _save(self, record: Record) -> None:
        try:
            self.trainer.save(self.folder, record=record)
            self.saved_step = self.trainer.step
            prune_checkpoints(
                self.folder,
                keep=self.config.keep_checkpoints,
                keep_every=self.config.keep_every,
            )
        except DoesNotFitError as error:
            if self.config.on_full_disk == "stop":
                raise
            self.progress.say(
                f'warning: {error} Training goes on without it (train.on_full_disk = "warn").'
            )

    def _greet(self) -> None:
        trainer = self.trainer
        self.progress.say(f"precision: {trainer.precision}")
        if trainer.saved:
            self.progress.say(f"resuming {self.folder} at step {trainer.step}")
            threads = trainer.saved.get("threads")
            if threads != torch.get_num_threads():
                self.progress.say(
                    f"warning: the run used {threads} threads, this process uses "
                    f"{torch.get_num_threads()}: sums round differently, so the result will not "
                    "be bit-equal to an uninterrupted run (train.threads sets the number)"
                )
        if trainer.step >= self.end:
            self.progress.say(f"{self.folder} is at step {trainer.step} of {self.end} already")

    def _farewell(self) -> str:
        step = self.trainer.step
        saved = (
            f"step {step} is saved"
            if self.saved_step == step
            else f"step {step} could not be saved; the newest checkpoint is of {self.saved_step}"
        )
        return f"stopped by {self.stop.name}: {saved}. Go on: deltamoe train --resume {self.folder}"


def _is_out_of_memory(error: Exception) -> bool:
    # torch's CPU allocator raises a plain RuntimeError
    is_named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_named or "can't allocate memory" in str(error)
