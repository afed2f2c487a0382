"""The watched pass: a model reads a text once, and every array of a trace is made from it.

Layer by layer, so that only one layer's tensors are held at a time. Knows nothing of how the text
came about.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltamoe.errors import ConfigError
from deltamoe.explorer.format import Array, describe
from deltamoe.explorer.hooks import Captured, watching
from deltamoe.explorer.measure import Check, as_array, measure_layer
from deltamoe.explorer.meters import sequence_bytes
from deltamoe.explorer.quantities import (
    MOST_TOKENS,
    NUM_CANDIDATES,
    NUM_LENS_CANDIDATES,
    QUANTITIES,
)
from deltamoe.inference.text_state import evaluating
from deltamoe.model import HybridLM
from deltamoe.tokenizer import Tokenizer

__all__ = ["Capture", "Event", "Reading"]

Event = dict[str, Any]
"""What happens while a run is recorded: ``event`` ("start", "token", "layer_summary") and more."""

_SLICE = 256  # tokens whose logits over the whole vocabulary are held at once


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What is recorded.

    Attributes:
        layers: whose bulky arrays are kept (docs/explorer.md says which are); None keeps those of
            as many layers as ``most_bytes`` allows, from the first on.
        has_lens: ask the head after every layer what it would answer.
        most_tokens: longest text, 1 to 2,048 tokens.
        most_bytes: of all arrays, about.
    """

    layers: tuple[int, ...] | None = None
    has_lens: bool = True
    most_tokens: int = 512
    most_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if not 1 <= self.most_tokens <= MOST_TOKENS:
            raise ConfigError(
                f"capture.most_tokens = {self.most_tokens}: expected 1 to {MOST_TOKENS:,}"
            )
        if self.most_bytes < 1:
            raise ConfigError(f"capture.most_bytes = {self.most_bytes}: expected at least 1")


class Reading:
    """What one watched pass finds.

    Args:
        model: the reader.
        tokenizer: says which ids a text can have.
        capture: what is kept.
        tell: told of every layer as it is done.

    Attributes:
        layer_summaries: each layer in a dozen numbers.
        checks: what was found in two ways.
        bytes: of the state after the last token.
    """

    def __init__(
        self,
        model: HybridLM,
        tokenizer: Tokenizer,
        capture: Capture,
        tell: Callable[[Event], None],
    ) -> None:
        self._model, self._capture, self._tell = model, capture, tell
        self._vocab_size = tokenizer.vocab_size
        self._unused = torch.tensor(tokenizer.unused_ids, dtype=torch.int64)
        self._by_layer: dict[str, dict[int, Array]] = {}
        self._whole: dict[str, Array] = {}
        self._left_out: dict[int, list[str]] = {}
        self._nbytes = 0
        self.layer_summaries: list[dict[str, Any]] = []
        self.checks: list[Check] = []
        self.bytes: dict[str, Any] = {}

    def read(self, ids: Sequence[int]) -> None:
        """Read the text, watched, and measure everything."""
        model = self._model
        device = model.embedding.weight.device
        row = torch.tensor([list(ids)], device=device)
        with evaluating(model):
            with watching(model, self._layer_is_done):
                out = model.hidden(row)
            assert out.state is not None
            self._measure_next(out.hidden[0], row[0])
        self.bytes, check = sequence_bytes(model, out.state)
        self.checks.append(check)

    def finish(
        self,
    ) -> tuple[dict[str, Array], list[dict[str, Any]], list[dict[str, Any]]]:
        """The arrays, their descriptions, and what was left out and why."""
        arrays, entries = {}, []
        for name, quantity in QUANTITIES.items():
            if name in self._whole:
                arrays[name] = self._whole[name]
                entries.append(describe(name, arrays[name], None))
            elif name in self._by_layer:
                assert quantity.over is not None
                layers = tuple(sorted(self._by_layer[name]))
                arrays[name] = np.stack([self._by_layer[name][layer] for layer in layers])
                entries.append(describe(name, arrays[name], layers))
        return arrays, entries, self._reasons()

    def _reasons(self) -> list[dict[str, Any]]:
        if not self._left_out:
            return []
        layers = sorted(self._left_out)
        names = sorted({name for left in self._left_out.values() for name in left})
        if self._capture.layers is not None:
            reason = "Only the layers that were asked for are recorded in full."
        else:
            reason = (
                f"All layers together would exceed {self._capture.most_bytes:,} bytes: record "
                "again and name the layers you want."
            )
        return [{"arrays": names, "layers": layers, "reason": reason}]

    def _layer_is_done(self, layer: int, captured: Captured) -> None:
        arrays, checks = measure_layer(self._model, layer, captured)
        if self._capture.has_lens:
            ids, probabilities = self._lens(captured["after"][0])
            arrays |= {"lens.ids": ids, "lens.probabilities": probabilities}
        self.checks += checks
        for name in self._bulky_to_leave_out(layer, arrays):
            del arrays[name]
            self._left_out.setdefault(layer, []).append(name)
        for name, array in arrays.items():
            self._by_layer.setdefault(name, {})[layer] = array
            self._nbytes += array.nbytes
        summary = _summarize(self._model, layer, arrays)
        self.layer_summaries.append(summary)
        self._tell({"event": "layer_summary", **summary})

    def _bulky_to_leave_out(self, layer: int, arrays: dict[str, Array]) -> list[str]:
        bulky = [name for name in arrays if QUANTITIES[name].is_bulky]
        if self._capture.layers is not None:
            return [] if layer in self._capture.layers else bulky
        total = self._nbytes + sum(array.nbytes for array in arrays.values())
        return bulky if total > self._capture.most_bytes else []

    def _lens(self, x: Tensor) -> tuple[Array, Array]:
        ids, probabilities = [], []
        for part in x.split(_SLICE):
            best = self._log_probabilities(self._model.norm(part)).topk(
                min(NUM_LENS_CANDIDATES, self._model.config.vocab_size), dim=-1
            )
            ids.append(best.indices)
            probabilities.append(best.values.exp())
        return (
            as_array("lens.ids", torch.cat(ids)),
            as_array("lens.probabilities", torch.cat(probabilities)),
        )

    def _measure_next(self, hidden: Tensor, ids: Tensor) -> None:
        """What may follow each token, and how the one that did was foreseen."""
        found: dict[str, list[Tensor]] = {}
        follows = torch.cat([ids[1:], ids[:1]])  # the last one's is not used
        for part, after in zip(hidden.split(_SLICE), follows.split(_SLICE), strict=True):
            log_p = self._log_probabilities(part)
            best = log_p.topk(min(NUM_CANDIDATES, log_p.shape[-1]), dim=-1)
            own = log_p.gather(-1, after[:, None])
            for name, tensor in {
                "next.ids": best.indices,
                "next.probabilities": best.values.exp(),
                "next.entropy": -(log_p.exp() * log_p).sum(dim=-1).clamp(max=0.0),
                "tokens.surprise": -own[:, 0],
                "tokens.ranks": (log_p > own).sum(dim=-1),
            }.items():
                found.setdefault(name, []).append(tensor)
        for name, parts in found.items():
            whole = torch.cat(parts)
            if name.startswith("tokens."):
                whole = torch.cat([whole.new_zeros(1), whole[:-1]])
            self._whole[name] = as_array(name, whole)
        self._whole["tokens.ids"] = as_array("tokens.ids", ids)

    def _log_probabilities(self, normed: Tensor) -> Tensor:
        """Over the model's rows; those that no text has are as good as impossible."""
        logits = self._model.logits(normed).float()
        least = torch.finfo(logits.dtype).min
        logits[:, self._vocab_size :] = least
        return logits.index_fill(1, self._unused.to(logits.device), least).log_softmax(dim=-1)


def _summarize(model: HybridLM, layer: int, arrays: dict[str, Array]) -> dict[str, Any]:
    """A layer in a dozen numbers."""
    config = model.config
    summary: dict[str, Any] = {
        "layer": layer,
        "mixer": config.mixer(layer),
        "channel": config.channel(layer),
        "residual_after": float(arrays["residual.after"].mean()),
    }
    if config.mixer(layer) == "kda":
        summary |= {
            "half_life": float(np.median(arrays["kda.half_life"])),
            "beta": float(arrays["kda.beta"].mean()),
            "memory_norm": arrays["kda.memory_norm"][-1].tolist(),
        }
    if config.channel(layer) == "moe":
        counts = arrays["experts.counts"]
        summary |= {
            "counts": counts.tolist(),
            "entropy": float(arrays["router.entropy"].mean()),
            "max_vio": float(counts.max() / counts.mean() - 1.0),
            "dormant_experts": int((counts == 0).sum()),
        }
    return summary
