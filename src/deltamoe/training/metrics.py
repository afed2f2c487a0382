"""What training measures, and where the numbers go.

One record is written for every step: to ``metrics.jsonl``, one JSON object a line, and to
TensorBoard if it is installed. A sink that fails (a full disk) is announced once and never stops
training. The measurements of a model are cheap enough for every step; they read parameters and
states that exist anyway.

A record holds ``step`` (updates done, from 1), ``loss`` (nats a token), ``balance_loss``, ``lr``,
``muon_lr``, ``grad_norm``, ``num_dropped``, ``tokens`` (seen since step 0), ``seconds`` (of the
step), ``tokens_per_s``, ``matmul_fraction`` (the model's FLOPs over what the machine's matmul can
do); by layer ``load`` (tokens of each expert), ``max_vio``, ``dead_experts``, ``half_life`` (in
tokens) and ``memory_norm``; and, at their steps, ``validation_bits_per_byte``,
``validation_loss``, ``validation_tokens`` and ``sample``.
"""

import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltamoe.checkpoint.durable import replace_file
from deltamoe.model import HybridLM, KdaState
from deltamoe.ops.kda import kda_decay

__all__ = [
    "JsonLines",
    "MemoryWatch",
    "Metrics",
    "Record",
    "decay_half_lives",
    "matmul_flops_per_s",
    "read_metrics",
]

Record = dict[str, Any]


class Sink(Protocol):
    """Somewhere a record goes."""

    def write(self, record: Record) -> None:
        """Keep one record."""

    def close(self) -> None:
        """Write out what is still held."""


class Metrics:
    """The sinks of one run folder, opened to continue after ``step``.

    Args:
        folder: of the run.
        step: the last step whose record is kept; later lines are of a future that a resumed run
            lives again.
        warn: called with one sentence for each sink that fails or is missing.
    """

    def __init__(self, folder: Path, *, step: int, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._sinks: list[Sink] = []
        self._has_failed: set[str] = set()
        for open_sink in (JsonLines, TensorBoard):
            try:
                self._sinks.append(open_sink(folder, step=step))
            except ImportError:
                warn(
                    "TensorBoard is not installed; metrics.jsonl holds the same numbers "
                    "(pip install 'deltamoe[tensorboard]' adds it)"
                )
            except Exception as error:
                self._tell(open_sink.__name__, error)

    def write(self, record: Record) -> None:
        """Hand one record to every sink; never raises."""
        self._each(lambda sink: sink.write(record))

    def close(self) -> None:
        """Close every sink; never raises."""
        self._each(lambda sink: sink.close())

    def _each(self, act: Callable[[Sink], None]) -> None:
        for sink in self._sinks:
            try:
                act(sink)
            except Exception as error:
                self._tell(type(sink).__name__, error)

    def _tell(self, name: str, error: Exception) -> None:
        if name not in self._has_failed:
            self._has_failed.add(name)
            self._warn(f"metrics: {name} failed ({error}); training goes on without its records")


class JsonLines:
    """``metrics.jsonl``: a line is written whole or taken back."""

    def __init__(self, folder: Path, *, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [line for line, record in _parsed_lines(self.path) if record["step"] <= step]
        replace_file(self.path, lambda path: _write_bytes(path, b"".join(kept)))
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  (open as long as the run)
        self._size = self._file.tell()

    def write(self, record: Record) -> None:
        """Append one line."""
        line = json.dumps({"format": 1, **record}, allow_nan=False).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size += len(line)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """The same numbers for TensorBoard; an expert's load is drawn as a histogram."""

    def __init__(self, folder: Path, *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Add every number of the record under its name."""
        for name, value in _flatten(record):
            if isinstance(value, list):
                self._writer.add_histogram(name, torch.tensor(value), record["step"])
            elif isinstance(value, int | float):
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Write out and close."""
        self._writer.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of a ``metrics.jsonl``; a torn last line, as a crash leaves it, is left out."""
    return [record for _, record in _parsed_lines(path)]


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _parsed_lines(path: Path) -> Iterable[tuple[bytes, Record]]:
    if not path.exists():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(record, dict) and "step" in record:
            yield line, record


def _flatten(record: Record, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


@torch.no_grad()
def decay_half_lives(model: HybridLM) -> dict[int, dict[str, float]]:
    """For each KDA layer, in how many tokens a key channel's memory fades to a half.

    Read from A_log and dt_bias at decay logits of zero: what the layer does when the token has
    nothing to say about forgetting. Tokens move it either way.

    Returns:
        layer -> the median, min and max over heads and channels, in tokens, at most 1e9.
    """
    lives = {}
    for layer in range(model.config.num_layers):
        if model.config.mixer(layer) != "kda":
            continue
        kda = model.config.kda
        assert kda is not None
        log_decay = kda_decay(
            torch.zeros(1, 1, kda.value_heads, kda.key_dim, device=model.norm.weight.device),
            model.get_parameter(f"blocks.{layer}.mixer.A_log"),
            model.get_parameter(f"blocks.{layer}.mixer.dt_bias"),
            lower_bound=kda.decay_lower_bound if kda.decay == "bounded" else None,
        )
        tokens = (math.log(2) / -log_decay.double()).clamp(max=1e9)
        lives[layer] = {
            "median": tokens.median().item(),
            "min": tokens.min().item(),
            "max": tokens.max().item(),
        }
    return lives


class MemoryWatch:
    """Context in which the KDA mixers' memories are measured as they pass by.

    ``norms`` is, for each KDA layer, the mean Frobenius norm of a head's memory at the end of the
    sequences of the last forward pass.
    """

    def __init__(self, model: HybridLM) -> None:
        self._model = model
        self._found: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "MemoryWatch":
        for layer, block in enumerate(self._model.blocks):
            if self._model.config.mixer(layer) == "kda":
                mixer = block.get_submodule("mixer")
                self._handles.append(mixer.register_forward_hook(self._hook(layer)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer: int) -> Callable[[nn.Module, object, tuple[Tensor, KdaState]], None]:
        def measure(module: nn.Module, inputs: object, output: tuple[Tensor, KdaState]) -> None:
            memory = output[1].memory.detach()
            self._found[layer] = torch.linalg.matrix_norm(memory).mean()

        return measure

    @property
    def norms(self) -> dict[int, float]:
        """Layer -> norm; waits for the device."""
        return {layer: norm.item() for layer, norm in sorted(self._found.items())}


def matmul_flops_per_s(
    device: torch.device, dtype: torch.dtype, *, size: int = 1024, seconds: float = 0.2
) -> float:
    """What this machine's matmul reaches now: the best of square products for ``seconds``.

    The ceiling that ``matmul_fraction`` is a share of. Other work on the machine lowers it.
    """
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best = math.inf
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or best == math.inf:
        start = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for an asynchronous device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
