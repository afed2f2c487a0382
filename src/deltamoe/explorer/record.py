"""The recorder: a model continues a prompt as ever, then reads the whole text once, watched.

The continuation is written by ``inference.Decoding`` with no hook in place, so that recording
cannot change a token. The text is then read in a single forward pass with the hooks of
``hooks.py``; every array of the trace is of that pass.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import numpy as np

from deltamoe.config.parse import to_dict
from deltamoe.errors import ConfigError
from deltamoe.explorer.format import FORMAT, KIND, Trace
from deltamoe.explorer.meters import meters
from deltamoe.explorer.quantities import MOST_TOKENS
from deltamoe.explorer.reading import Capture, Event, Reading
from deltamoe.inference import Decoding, Generation, TextState
from deltamoe.inference.sampler import SamplingOptions
from deltamoe.model import HybridLM
from deltamoe.tokenizer import Tokenizer, check_fit
from deltamoe.version import __version__

__all__ = ["Capture", "Event", "trace"]


def trace(
    model: HybridLM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 0,
    capture: Capture | None = None,
    source: dict[str, Any] | None = None,
    on_event: Callable[[Event], None] | None = None,
    **sampling: Unpack[SamplingOptions],
) -> Trace:
    """Let a model continue a prompt and record how it does.

    Args:
        model: a trained model.
        tokenizer: the one it was trained with.
        prompt: a text, which begins a new document; or token ids, everything the model is to read.
        max_new_tokens: most tokens it writes; 0 only reads.
        capture: what is recorded.
        source: where the model comes from, for people: kept as it is in the summary.
        on_event: told of every token and every layer as it is done; what it raises ends the
            recording.
        sampling: how tokens are chosen, see ``Sampler``; by default the likeliest.

    Returns:
        The trace; ``save`` writes it to a file.

    Raises:
        ConfigError: a value out of range, or a text longer than ``capture.most_tokens``.
        NonFiniteError: the model's logits are not finite.
    """
    capture = capture or Capture()
    tell = on_event or (lambda event: None)
    check_fit(tokenizer, model.config.vocab_size)
    _check_layers(capture.layers or (), model.config.num_layers)
    ids = _ids(tokenizer, prompt)
    _check_length(ids, max_new_tokens, capture)
    options: SamplingOptions = {"temperature": 0.0, **sampling}
    speller = _Speller(tokenizer)
    tell({"event": "start", "tokens": [speller.token(i) for i in ids]})

    def tell_token(number: int, i: int) -> None:
        tell({"event": "token", "position": len(ids) + number, **speller.token(i)})

    generation, timings = _continue(model, tokenizer, prompt, max_new_tokens, options, tell_token)
    text_ids = [*ids, *generation.ids]

    start = time.perf_counter()
    reading = Reading(model, tokenizer, capture, tell)
    reading.read(text_ids)
    timings["read_s"] = time.perf_counter() - start
    arrays, entries, left_out = reading.finish()
    for name in ("next.ids", "lens.ids"):
        speller.learn(np.unique(arrays[name]).tolist() if name in arrays else [])
    summary = {
        "format": FORMAT,
        "kind": KIND,
        "program": f"deltamoe {__version__}",
        "source": source or {},
        "model": {"config": to_dict(model.config), **meters(model, context=len(text_ids))},
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "end_id": tokenizer.end_id,
        },
        "prompt": prompt if isinstance(prompt, str) else tokenizer.decode(ids),
        "text": generation.text,
        "num_tokens": len(text_ids),
        "num_prompt_tokens": len(ids),
        "finish_reason": generation.finish_reason,
        "sampling": {"max_new_tokens": max_new_tokens, **options},
        "tokens": [
            {**speller.token(i), "is_prompt": at < len(ids)} for at, i in enumerate(text_ids)
        ],
        "texts": speller.texts,
        "layers": reading.layer_summaries,
        "arrays": entries,
        "left_out": left_out,
        "bytes": reading.bytes,
        "timings": timings,
        "checks": [check.to_dict() for check in reading.checks],
    }
    return Trace(summary, arrays)


def _continue(
    model: HybridLM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    sampling: SamplingOptions,
    tell_token: Callable[[int, int], None],
) -> tuple[Generation, dict[str, float]]:
    """Write on, unwatched; ``tell_token`` is told of each token's number and id."""
    is_text = isinstance(prompt, str)
    start = time.perf_counter()
    decoding = Decoding(
        model,
        tokenizer,
        [prompt if isinstance(prompt, str) else ""],
        state=None if is_text else TextState(None, _ids(tokenizer, prompt)),
        max_tokens=max_new_tokens,
        **sampling,
    )
    prefill_s = time.perf_counter() - start
    written = decoding.answers[0].ids
    while decoding.is_running:
        told = len(written)
        decoding.step()
        for i in written[told:]:
            tell_token(told, i)
    decode_s = time.perf_counter() - start - prefill_s
    timings = {
        "prefill_s": prefill_s,
        "decode_s": decode_s,
        "prefill_tokens_per_s": _rate(len(_ids(tokenizer, prompt)), prefill_s),
        "decode_tokens_per_s": _rate(len(written), decode_s),
    }
    return decoding.generation(0), timings


def _ids(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return (tokenizer.end_id, *tokenizer.encode(prompt))
    return tuple(prompt)


def _check_length(ids: Sequence[int], max_new_tokens: int, capture: Capture) -> None:
    if not ids:
        raise ConfigError("prompt: no token; give a text, or at least one id")
    total = len(ids) + max_new_tokens
    if max_new_tokens < 0 or total > capture.most_tokens:
        raise ConfigError(
            f"{len(ids):,} tokens of prompt and max_new_tokens = {max_new_tokens:,}: expected at "
            f"most {capture.most_tokens:,} together (capture.most_tokens, up to {MOST_TOKENS:,})"
        )


def _check_layers(layers: Sequence[int], num_layers: int) -> None:
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ConfigError(
                f"capture.layers: {layer}; this model has {num_layers}, counted from 0"
            )


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if tokens and seconds > 0 else 0.0


class _Speller:
    """Texts of token ids, each spelled once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {i: spelling for spelling, i in tokenizer.special_ids.items()}
        self._unused = frozenset(tokenizer.unused_ids)
        self.texts: dict[str, str] = {}

    def learn(self, ids: Sequence[int]) -> None:
        """Spell some ids."""
        for i in ids:
            if str(i) not in self.texts:
                self.texts[str(i)] = self._spell(i)

    def token(self, i: int) -> dict[str, Any]:
        """One token as plain data."""
        self.learn([i])
        return {"id": i, "text": self.texts[str(i)], "is_special": i in self._special}

    def _spell(self, i: int) -> str:
        if i in self._special:
            return self._special[i]
        if i in self._unused or i >= self._tokenizer.vocab_size:
            return ""
        return self._tokenizer.decode([i])[:1024]
