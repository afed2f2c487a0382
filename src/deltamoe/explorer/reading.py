"""The watched pass: a model reads a text once, and every array of a trace is made from it.

Layer by layer, so that only one layer's tensors are held at a time. Knows nothing of how the text
came about.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from deltamoe.config.model import ModelConfig
from deltamoe.errors import ConfigError
from deltamoe.explorer.format import MOST_BYTES, Array, describe
from deltamoe.explorer.hooks import Captured, watching
from deltamoe.explorer.measure import Check, as_array, measure_layer
from deltamoe.explorer.meters import sequence_bytes
from deltamoe.explorer.quantities import (
    MOST_TOKENS,
    NUM_CANDIDATES,
    NUM_LENS_CANDIDATES,
    QUANTITIES,
    Keep,
    Over,
    layers_of,
    sizes,
)
from deltamoe.inference.text_state import evaluating
from deltamoe.model import HybridLM
from deltamoe.tokenizer import Tokenizer

__all__ = ["Capture", "Event", "Reading"]

Event = dict[str, Any]
"""What happens while a run is recorded: ``event`` ("start", "token", "layer_summary") and more."""

_MOST_ASKED = MOST_BYTES - (16 << 20)  # of layers that were asked for; the rest is the summary's
_SLICE = 256  # tokens whose logits over the whole vocabulary are held at once


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What is recorded.

    Attributes:
        layers: whose bulky and inner arrays are kept (docs/explorer.md says which those are); None
            keeps the bulky ones of as many layers as ``most_bytes`` allows, from the first on, and
            the inner ones of as many as are left room for.
        has_lens: ask the head after every layer what it would answer.
        most_tokens: longest text, 1 to 2,048 tokens.
        most_bytes: of all arrays, about; where layers are named, a file's 256 MiB count.
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
        self._left_out: list[dict[str, Any]] = []
        self.layer_summaries: list[dict[str, Any]] = []
        self.checks: list[Check] = []
        self.bytes: dict[str, Any] = {}

    def read(self, ids: Sequence[int]) -> None:
        """Read the text, watched, and measure everything."""
        model = self._model
        self._left_out = _too_much(model.config, len(ids), self._capture)
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
        return arrays, entries, self._left_out

    def _layer_is_done(self, layer: int, captured: Captured) -> None:
        arrays, checks = measure_layer(self._model, layer, captured)
        if self._capture.has_lens:
            ids, probabilities = self._lens(captured["after"][0])
            arrays |= {"lens.ids": ids, "lens.probabilities": probabilities}
        self.checks += checks
        for left in self._left_out:
            if layer in left["layers"]:
                arrays = {name: a for name, a in arrays.items() if name not in left["arrays"]}
        for name, array in arrays.items():
            self._by_layer.setdefault(name, {})[layer] = array
        summary = _summarize(self._model, layer, arrays)
        self.layer_summaries.append(summary)
        self._tell({"event": "layer_summary", **summary})

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


def _too_much(config: ModelConfig, num_tokens: int, capture: Capture) -> list[dict[str, Any]]:
    """What is not kept of which layers, and why, from the sizes of the model and the text."""
    lengths = sizes(config, num_tokens)
    members = {over: set(layers_of(config, over)) for over in get_args(Over)}
    every = range(config.num_layers)
    asked = every if capture.layers is None else sorted(set(capture.layers))
    most = capture.most_bytes if capture.layers is None else _MOST_ASKED

    def cost(keep: Keep, layer: int) -> int:
        return sum(
            4 * math.prod(lengths[axis] for axis in quantity.axes)
            for quantity in QUANTITIES.values()
            if quantity.keep == keep and quantity.over and layer in members[quantity.over]
        )

    left_out: list[dict[str, Any]] = []

    def leave(keep: Keep, layers: list[int], reason: str) -> None:
        names = [
            quantity.name
            for quantity in QUANTITIES.values()
            if quantity.keep == keep and quantity.over and members[quantity.over] & set(layers)
        ]
        for entry in left_out:
            if (entry["layers"], entry["reason"]) == (layers, reason):
                entry["arrays"] += names
                return
        if layers:
            left_out.append({"arrays": names, "layers": layers, "reason": reason})

    total = sum(cost("always", layer) for layer in every)
    classes: tuple[Keep, ...] = ("bulky", "inner")
    for keep in classes:
        kept = 0
        while kept < len(asked) and total + cost(keep, asked[kept]) <= most:
            total += cost(keep, asked[kept])
            kept += 1
        unasked = [layer for layer in every if layer not in asked]
        leave(keep, unasked, "Only the layers that were asked for are recorded in full.")
        too_much = (
            f"More would exceed {most:,} bytes: record again and name the layers you want, or "
            "a shorter text."
        )
        leave(keep, list(asked[kept:]), too_much)
    return left_out


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
