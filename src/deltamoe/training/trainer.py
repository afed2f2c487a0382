"""A model, its optimizer and its data at one step of a run; and how to get to the next step.

``Trainer`` is everything that decides the future of a run, and nothing else: built from a
configuration or from a checkpoint it goes on in exactly the same way, bit for bit. No state of a
random generator has to be kept, since the randomness of a step is a function of (seed, step).
Knows nothing of folders, clocks on the wall or people.
"""

import hashlib
import json
import math
import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltamoe.checkpoint import (
    Checkpoint,
    read_tensors,
    require_finite,
    write_checkpoint,
    write_tensors,
)
from deltamoe.checkpoint.folder import CONFIG, OPTIMIZER, TOKENIZER, TRAIN_STATE, WEIGHTS
from deltamoe.config import ModelConfig, RunConfig, check_format, read_json, to_json
from deltamoe.data import NO_TARGET, Batch, Loader, PreparedData
from deltamoe.errors import CheckpointError, ConfigError
from deltamoe.layers import Mlp, RMSNorm, StreamNorm
from deltamoe.model import HybridLM, Routing
from deltamoe.model.device import choose_device
from deltamoe.plan import plan
from deltamoe.training.balance import (
    load_balance_loss,
    sequence_balance_loss,
    update_balance_bias,
    z_loss,
)
from deltamoe.training.loss import next_token_loss
from deltamoe.training.metrics import MemoryWatch, Record
from deltamoe.training.nonfinite import (
    StepNotFiniteError,
    first_bad_gradient,
    first_bad_output,
)
from deltamoe.training.optimizer import MuonAdamW, fastest_dtype
from deltamoe.training.schedule import learning_rate_factor
from deltamoe.version import __version__

__all__ = ["StepReport", "Trainer"]


@dataclass
class StepReport:
    """What one step found, summed over its micro-batches.

    Attributes:
        loss: nats a token, before the update.
        balance_loss: the weighted sum of the balance losses.
        grad_norm: global norm before clipping.
        num_tokens: tokens read.
        learning_rate_factor: the schedule's.
        counts: layer -> [E], tokens that chose each expert.
        num_dropped: assignments turned away for capacity.
        memory_norms: KDA layer -> mean norm of a head's memory at the end of a sequence.
    """

    loss: float = 0.0
    balance_loss: float = 0.0
    grad_norm: float = 0.0
    num_tokens: int = 0
    learning_rate_factor: float = 0.0
    counts: dict[int, Tensor] = field(default_factory=dict)
    num_dropped: int = 0
    memory_norms: dict[int, float] = field(default_factory=dict)


class Trainer:
    """One run at one step.

    Args:
        config: of the run.
        data: its tokens.
        checkpoint: where to go on; None starts with step 0.

    Raises:
        ConfigError: the tokenizer has more ids than the model has rows.
        CheckpointError: the checkpoint is of another model.
    """

    def __init__(
        self, config: RunConfig, data: PreparedData, *, checkpoint: Checkpoint | None = None
    ) -> None:
        _require_vocabulary(config.model, data)
        self.config = config
        self.data = data
        self.device = choose_device(config.train.device)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        saved = _read_train_state(checkpoint) if checkpoint else {}
        self.step: int = saved.get("step", 0)
        self.num_tokens: int = saved.get("num_tokens", 0)
        self.saved = saved
        fastest = _name_of(fastest_dtype(self.device))
        wanted = config.train.precision
        self.forward_dtype = _DTYPES[
            saved.get("forward_dtype", fastest if wanted == "auto" else wanted)
        ]
        self._newton_schulz_dtype = _DTYPES[saved.get("newton_schulz_dtype", fastest)]
        self.loader = Loader(
            data,
            context=config.data.context,
            rows=config.data.rows,
            seed=config.train.seed,
            position=saved.get("loader"),
        )
        with self.device:
            self.model = HybridLM(config.model)
        self.optimizer = MuonAdamW(
            self.model.named_parameters(),
            config.optimizer,
            newton_schulz_dtype=self._newton_schulz_dtype,
        )
        if checkpoint:
            self._restore(checkpoint)
        else:
            self.model.initialize(config.train.seed)
        self.model.checkpoint_activations = config.train.checkpoint_activations
        if config.train.compile:
            self._compile()

    @property
    def precision(self) -> str:
        """What is computed in which precision, and where, for people."""
        threads = torch.get_num_threads()
        where = f"on the CPU with {threads} threads" if self.device.type == "cpu" else "on CUDA"
        muon = _name_of(self._newton_schulz_dtype)
        return (
            f"weights, gradients and moments fp32, forward {_name_of(self.forward_dtype)}"
            + (f", Muon's iterations {muon}" if self.config.optimizer.name == "muon" else "")
            + f"; {where}"
        )

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of forward passes: bf16 where the model allows it, or none."""
        is_enabled = self.forward_dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_enabled)

    def train_step(self) -> StepReport:
        """Read ``accumulate`` micro-batches and update every parameter once.

        Raises:
            StepNotFiniteError: the loss or a gradient is; nothing was updated.
        """
        config = self.config
        batches = [self.loader.next_batch() for _ in range(config.train.accumulate)]
        factor = learning_rate_factor(self.step, steps=config.train.steps, config=config.optimizer)
        self.optimizer.scale_learning_rates(factor)
        self.optimizer.zero_grad()
        self.model.train()
        # A distributed run sums num_targets over its ranks before, and the gradients and the
        # report's loss, counts and tokens after the micro-batches; nothing else is shared.
        num_targets = sum(int((batch.targets != NO_TARGET).sum()) for batch in batches)
        self._seed()
        report = StepReport(learning_rate_factor=factor)
        with MemoryWatch(self.model) as memory:
            for batch in batches:
                self._forward_backward(batch, num_targets, report)
        report.memory_norms = memory.norms
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        report.grad_norm = norm.item()
        if not math.isfinite(report.loss + report.balance_loss + report.grad_norm):
            raise self._not_finite(batches, num_targets, report)
        if 0 < config.optimizer.clip_norm < report.grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.optimizer.clip_norm, norm)
        self.optimizer.step()
        self._update_balance_biases(report.counts)
        self.step += 1
        self.num_tokens += report.num_tokens
        return report

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint holds in tensors: weights, balance biases, optimizer state."""
        return {**self.model.state_dict(), **self.optimizer.named_state()}

    def save(self, run: Path, *, record: Record) -> Checkpoint:
        """Write a checkpoint of this step into a run folder, whole or not at all.

        Args:
            run: the run folder, its lock held.
            record: of this step; the checkpoint carries it, so that a run killed before the
                record reached metrics.jsonl loses nothing.

        Raises:
            DoesNotFitError: the disk is full.
            CheckpointError: the disk refused otherwise, or a weight is not finite.
        """
        require_finite(self.model.state_dict(), source=f"the weights of step {self.step}")
        state = {
            "format": 1,
            "step": self.step,
            "num_tokens": self.num_tokens,
            "loader": self.loader.position,
            "data": self.data.fingerprint,
            "forward_dtype": _name_of(self.forward_dtype),
            "newton_schulz_dtype": _name_of(self._newton_schulz_dtype),
            "threads": torch.get_num_threads(),
            "versions": {
                "deltamoe": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "record": record,
        }
        text = json.dumps(state, indent=2, allow_nan=False) + "\n"
        config = to_json(self.config)
        return write_checkpoint(
            run,
            self.step,
            {
                WEIGHTS: lambda path: write_tensors(path, self.model.state_dict()),
                OPTIMIZER: lambda path: write_tensors(path, self.optimizer.named_state()),
                TRAIN_STATE: lambda path: _write_text(path, text),
                CONFIG: lambda path: _write_text(path, config),
                TOKENIZER: lambda path: self.data.tokenizer.save(path.parent),
            },
            expected_bytes=plan(self.config).training.checkpoint_bytes,
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        weights = checkpoint.file(WEIGHTS)
        self.model.load_state_dict(read_tensors(weights, expected=self.model.state_dict()))
        self.optimizer.load_named_state(read_tensors(checkpoint.file(OPTIMIZER)))

    def _compile(self) -> None:
        # What stands between the operators. Those have kernels of their own, and their loops over
        # chunks and experts would take minutes to compile.
        for module in self.model.modules():
            if isinstance(module, RMSNorm | StreamNorm | Mlp):
                module.compile(dynamic=True)

    def _seed(self) -> None:
        words = f"deltamoe {self.config.train.seed} {self.step}"
        digest = hashlib.sha256(words.encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little"))

    def _forward_backward(self, batch: Batch, num_targets: int, report: StepReport) -> None:
        loss, balance_loss, routings = self._forward(batch, num_targets)
        (loss + balance_loss).backward()
        report.loss += loss.item()
        report.balance_loss += balance_loss.item()
        report.num_tokens += len(batch.ids)
        for layer, routing in enumerate(routings):
            if routing is not None:
                counts = report.counts.get(layer, torch.zeros_like(routing.counts))
                report.counts[layer] = counts + routing.counts
                report.num_dropped += int(routing.num_dropped)

    def _forward(
        self, batch: Batch, num_targets: int
    ) -> tuple[Tensor, Tensor, tuple[Routing | None, ...]]:
        """The two losses of one micro-batch, each its share of the step's, and the routings."""
        cu_seqlens = batch.cu_seqlens.to(self.device)
        with self.autocast():
            out = self.model.hidden(batch.ids.to(self.device)[None], cu_seqlens=cu_seqlens)
            loss = next_token_loss(
                out.hidden[0],
                batch.targets.to(self.device),
                self.model.head_weight,
                num_targets=max(1, num_targets),
            )
        balance_loss = self._balance_loss(out.routings, cu_seqlens)
        return loss, balance_loss / self.config.train.accumulate, out.routings

    def _balance_loss(self, routings: Sequence[Routing | None], cu_seqlens: Tensor) -> Tensor:
        config = self.config.balance
        total = torch.zeros((), device=self.device)
        for routing in routings:
            if routing is None:
                continue
            if config.load_balance_loss:
                total = total + config.load_balance_loss * load_balance_loss(routing)
            if config.sequence_balance_loss:
                loss = sequence_balance_loss(routing, cu_seqlens)
                total = total + config.sequence_balance_loss * loss
            if config.z_loss:
                total = total + config.z_loss * z_loss(routing)
        return total

    def _update_balance_biases(self, counts: dict[int, Tensor]) -> None:
        moe, balance = self.config.model.moe, self.config.balance
        if moe is None or not moe.has_balance_bias:
            return
        for layer, layer_counts in counts.items():
            bias = self.model.get_buffer(f"blocks.{layer}.channel.router.balance_bias")
            update_balance_bias(
                bias, layer_counts, rule=balance.bias_update, rate=balance.bias_rate
            )

    def _not_finite(
        self, batches: Sequence[Batch], num_targets: int, report: StepReport
    ) -> StepNotFiniteError:
        self._seed()
        culprit = None
        for index, batch in enumerate(batches):
            if name := first_bad_output(self.model, partial(self._forward, batch, num_targets)):
                culprit = f"the output of {name} (micro-batch {index})"
                break
        else:
            if name := first_bad_gradient(self.model):
                culprit = f"the gradient of {name}"
        what = culprit or "the loss, though no module's output,"
        return StepNotFiniteError(
            f"step {self.step + 1}: {what} is not finite (loss {report.loss}, gradient norm "
            f"{report.grad_norm}). Training stopped before the update and the checkpoints are "
            "untouched. Lower optimizer.lr and optimizer.muon_lr, or clip harder, and resume.",
            {
                "format": 1,
                "step": self.step + 1,
                "first_not_finite": culprit,
                "batches": [batch.fingerprint for batch in batches],
                "loss": str(report.loss),
                "balance_loss": str(report.balance_loss),
                "grad_norm": str(report.grad_norm),
                "seed": self.config.train.seed,
            },
        )


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, known in _DTYPES.items() if known == dtype)


def _require_vocabulary(config: ModelConfig, data: PreparedData) -> None:
    if data.tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.vocab_size}, but the tokenizer {data.tokenizer.name} "
            f"has {data.tokenizer.vocab_size} ids: expected at least as many rows"
        )


def _read_train_state(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.file(TRAIN_STATE)
    state = read_json(path, error=CheckpointError)
    check_format(state, source=str(path), error=CheckpointError)
    missing = {"step", "num_tokens", "loader", "data", "newton_schulz_dtype", "record"} - set(state)
    dtypes = {state.get("newton_schulz_dtype"), state.get("forward_dtype", "fp32")}
    if missing or not dtypes <= set(_DTYPES):
        raise CheckpointError(f"{path}: not a training state of this program; use another one")
    return state


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
