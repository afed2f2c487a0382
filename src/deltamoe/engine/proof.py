"""One prompt, read and continued in every way the engine knows: is it always the same text?

Every way gets the same prompt and greedy decoding, and its logits are compared with those of the
plainest: alone, nothing shared, nothing kept. Where a ``Decoder`` keeps rows apart, ways that read
the prompt by the same steps must be equal to the last bit. The others, among them the model's own
forward pass over the whole text, differ by the order of sums, for which ``rounding`` allows.
Knows nothing of checkpoints or command lines.
"""

import tempfile
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deltamoe.engine.core import Core
from deltamoe.engine.options import EngineOptions
from deltamoe.engine.request import Piece, Request, Result
from deltamoe.engine.sampling import Sampling
from deltamoe.engine.sequence import Job, Sequence
from deltamoe.errors import ConfigError, DeltamoeError
from deltamoe.inference import TextState, load_text_state, save_text_state
from deltamoe.inference.text_state import evaluating
from deltamoe.model import HybridLM
from deltamoe.tokenizer import Tokenizer

__all__ = ["Proof", "Way", "prove"]

_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
_NUM_NEIGHBOURS = 7
_NUM_CHOICES = 3
_CHUNKS = (1, 3, 16, 64)
_PREEMPTED_AFTER = (2, 3, 9, 15)
"""Steps between one interruption and the next: within the prompt, at its end, in the answer."""
_LEAST_PROMPT = 8


class Way(NamedTuple):
    """One way of running the request, beside the plain one.

    Attributes:
        name: what was done.
        difference: largest difference of a logit up to the first diverging token.
        diverges_at: the first token drawn that differs, from 0; None if none does.
        margin: how far the plain way's two likeliest tokens were apart there.
        must_be_equal: whether every bit has to agree.
        is_right: whether they do, or differ by no more than rounding can explain.
    """

    name: str
    difference: float
    diverges_at: int | None
    margin: float | None
    must_be_equal: bool
    is_right: bool


@dataclass(frozen=True)
class Proof:
    """What came out.

    Attributes:
        num_prompt_tokens: tokens of the prompt.
        num_tokens: tokens drawn.
        dtype: of the model.
        has_decoder: whether rows were kept from touching each other's bits.
        rounding: the largest difference of a logit that is put down to the order of sums.
        ways: one a way, the plain one left out.
    """

    num_prompt_tokens: int
    num_tokens: int
    dtype: str
    has_decoder: bool
    rounding: float
    ways: tuple[Way, ...]

    @property
    def is_right(self) -> bool:
        """Whether no way answered otherwise."""
        return all(way.is_right for way in self.ways)


class _Trace(NamedTuple):
    """What one run drew, and from which logits."""

    ids: tuple[int, ...]
    logits: Tensor


def prove(
    model: HybridLM,
    tokenizer: Tokenizer,
    ids: Rows[int],
    *,
    num_tokens: int = 32,
    on_way: Callable[[Way], None] | None = None,
) -> Proof:
    """Continue one prompt in every way and compare.

    Args:
        model: a trained model.
        tokenizer: the one it was trained with.
        ids: the prompt, 8 tokens or more; a few hundred show more than a few.
        num_tokens: tokens to draw.
        on_way: is told of every way as it is done.

    Raises:
        ConfigError: a shorter prompt.
    """
    if len(ids) < _LEAST_PROMPT:
        raise ConfigError(f"a prompt of {len(ids)} tokens: expected {_LEAST_PROMPT} or more")
    with evaluating(model):
        return _Trial(model, tokenizer, tuple(ids), num_tokens).run(on_way)


class _Trial:
    def __init__(
        self, model: HybridLM, tokenizer: Tokenizer, ids: tuple[int, ...], num_tokens: int
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        # Several chunks and pages, whatever the prompt's length.
        chunk = max(min(len(ids) // 4, 128), 2)
        self.plain = EngineOptions(
            prefill_chunk=chunk,
            step_tokens=chunk,
            page_tokens=max(chunk // 3, 1),
            context=4 * len(ids) + 8 * num_tokens,
            max_sequences=_NUM_NEIGHBOURS + 1,
            cache_bytes=0,
        )
        self.keeping = replace(self.plain, cache_bytes=None)
        self.request = Request(prompt=ids, max_tokens=num_tokens, ignore_end=True)
        # Beginnings of the same text, so that they have prefixes in common with it.
        self.neighbours = [
            replace(self.request, prompt=(*ids[: len(ids) // 2 + at], ids[at]), max_tokens=at + 2)
            for at in range(_NUM_NEIGHBOURS)
        ]

    def run(self, on_way: Callable[[Way], None] | None) -> Proof:
        core = self._core(self.plain)
        has_decoder = core.reader.has_decoder
        plain = _alone(core, self.request)
        dtype = self.model.embedding.weight.dtype
        largest = float(plain.logits.abs().max())
        rounding = _ROUNDING.get(dtype, _ROUNDING[torch.bfloat16]) * max(largest, 1.0)
        ways = []
        for name, is_cut_alike, run in self._ways(plain):
            must_be_equal = is_cut_alike and has_decoder
            for trace in run():
                way = _compared(name, plain, trace, must_be_equal, rounding)
                ways.append(way)
                if on_way is not None:
                    on_way(way)
        return Proof(
            num_prompt_tokens=len(self.request.prompt),
            num_tokens=len(plain.ids),
            dtype=str(dtype).removeprefix("torch."),
            has_decoder=has_decoder,
            rounding=rounding,
            ways=tuple(ways),
        )

    def _ways(self, plain: _Trace) -> list[tuple[str, bool, Callable[[], list[_Trace]]]]:
        """(name, whether the prompt is cut as in the plain way, how)."""
        return [
            ("again", True, lambda: [_alone(self._core(self.plain), self.request)]),
            ("the model's forward pass", False, lambda: [self._forward(plain.ids)]),
            *(
                (f"chunks of {chunk}", False, lambda chunk=chunk: [self._chunked(chunk)])
                for chunk in _CHUNKS
            ),
            ("among neighbours", True, lambda: [self._among_neighbours(self.plain)]),
            ("prefix: the whole prompt", True, self._whole_prefix),
            ("prefix: half the prompt", False, self._half_prefix),
            ("prefix: among neighbours", False, lambda: [self._among_neighbours(self.keeping)]),
            ("put aside", True, lambda: [self._preempted(self.keeping)]),
            ("lost and read again", True, lambda: [self._preempted(self.plain)]),
            ("forked", True, self._forked),
            ("from a state file", False, self._from_file),
        ]

    def _core(self, options: EngineOptions) -> Core:
        return Core(self.model, self.tokenizer, options)

    def _forward(self, ids: tuple[int, ...]) -> _Trace:
        text = torch.tensor([[*self.request.prompt, *ids[:-1]]])
        hidden = self.model.hidden(text.to(self.model.embedding.weight.device)).hidden[0]
        logits = self.model.logits(hidden[len(self.request.prompt) - 1 :])
        logits = logits[:, : self.tokenizer.vocab_size].cpu()
        usable = logits.clone()
        usable[:, list(self.tokenizer.unused_ids)] = -torch.inf
        return _Trace(tuple(usable.argmax(-1).tolist()), logits)

    def _chunked(self, chunk: int) -> _Trace:
        return _alone(self._core(replace(self.plain, prefill_chunk=chunk)), self.request)

    def _among_neighbours(self, options: EngineOptions) -> _Trace:
        core = self._core(options)
        half = len(self.neighbours) // 2
        recorder = _Recorder(core)
        for request in self.neighbours[:half]:
            recorder.add(request)
        core.step()
        own = recorder.add(self.request)
        for request in self.neighbours[half:]:
            recorder.add(request)
        return recorder.traces(own)[0]

    def _whole_prefix(self) -> list[_Trace]:
        core = self._core(replace(self.keeping, exact_reuse=True))
        return [_alone(core, self.request) for _ in range(2)][1:]

    def _half_prefix(self) -> list[_Trace]:
        core = self._core(self.keeping)
        half = self.request.prompt[: len(self.request.prompt) // 2]
        _alone(core, replace(self.request, prompt=half, max_tokens=1))
        return [_alone(core, self.request)]

    def _preempted(self, options: EngineOptions) -> _Trace:
        core = self._core(replace(options, exact_reuse=True))
        recorder = _Recorder(core)
        own = recorder.add(replace(self.request, reuse=False))
        for number in _PREEMPTED_AFTER:
            for _ in range(number):
                core.step()
            if core.scheduler.running:
                core.preempt(core.scheduler.youngest())
        return recorder.traces(own)[0]

    def _forked(self) -> list[_Trace]:
        recorder = _Recorder(self._core(self.keeping))
        own = recorder.add(replace(self.request, n=_NUM_CHOICES, reuse=False))
        return recorder.traces(own)[1:]

    def _from_file(self) -> list[_Trace]:
        half = len(self.request.prompt) // 2
        head = replace(self.request, prompt=self.request.prompt[:half], max_tokens=0)
        recorder = _Recorder(self._core(self.keeping))
        own = recorder.add(replace(head, keep_state=True))
        recorder.traces(own)
        text = recorder.result(own).choices[0].state
        assert text is not None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            save_text_state(path, text, self.model)
            loaded: TextState = load_text_state(path, self.model)
        tail = replace(self.request, prompt=self.request.prompt[half:], state=loaded)
        return [_alone(self._core(self.keeping), tail)]


def _alone(core: Core, request: Request) -> _Trace:
    recorder = _Recorder(core)
    own = recorder.add(request)
    return recorder.traces(own)[0]


class _Recorder:
    """Runs requests and keeps the logits that every token was drawn from."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._logits: dict[Sequence, list[Tensor]] = {}
        self._results: dict[Job, Result] = {}
        core.sampling = _RecordingSampling(core, self._logits)

    def add(self, request: Request) -> Job:
        listener = _Listener(self._results)
        job = self._core.add(request, listener)
        listener.job = job
        return job

    def result(self, job: Job) -> Result:
        return self._results[job]

    def traces(self, job: Job) -> list[_Trace]:
        """Run until there is nothing left to do; one trace a choice."""
        while self._core.has_work:
            self._core.step()
        choices = self._results[job].choices
        return [
            _Trace(choice.ids, torch.stack(self._logits.get(sequence) or [torch.empty(0)]))
            for choice, sequence in zip(choices, job.sequences, strict=True)
        ]


class _Listener:
    def __init__(self, results: dict[Job, Result]) -> None:
        self.job: Job | None = None
        self._results = results

    def on_piece(self, piece: Piece) -> None:
        """Only the whole is compared."""

    def on_result(self, result: Result) -> None:
        assert self.job is not None
        self._results[self.job] = result

    def on_error(self, error: BaseException) -> None:
        raise error


class _RecordingSampling(Sampling):
    def __init__(self, core: Core, logits: dict[Sequence, list[Tensor]]) -> None:
        super().__init__(core.tokenizer, core.model.embedding.weight.device)
        self._seen = logits

    def choose(self, logits: Tensor, rows: Rows[Sequence]) -> list[int | DeltamoeError]:
        for row, sequence in zip(logits[:, : self._vocab_size].cpu(), rows, strict=True):
            self._seen.setdefault(sequence, []).append(row.clone())
        return super().choose(logits, rows)


def _compared(name: str, plain: _Trace, other: _Trace, must_be_equal: bool, rounding: float) -> Way:
    pairs = zip(plain.ids, other.ids, strict=True)
    diverges_at = next((at for at, (one, two) in enumerate(pairs) if one != two), None)
    # Behind the first token that differs the texts are different ones.
    num_alike = len(plain.ids) if diverges_at is None else diverges_at + 1
    difference = (plain.logits[:num_alike] - other.logits[:num_alike]).abs().max()
    margin = None
    if diverges_at is not None:
        best = plain.logits[diverges_at].topk(2).values
        margin = float(best[0] - best[1])
    is_right = float(difference) <= (0.0 if must_be_equal else rounding)
    if margin is not None:
        is_right = is_right and not must_be_equal and margin <= 2 * rounding
    return Way(name, float(difference), diverges_at, margin, must_be_equal, is_right)
