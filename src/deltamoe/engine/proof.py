"""One prompt, read and continued in every way the engine knows: is it always the same text?

The plainest way is alone, restores nothing and cuts the prompt as it comes; it writes the text that
all others are led along, so that every token of theirs can be compared. A way's logits must be
equal to the last bit, where a ``Decoder`` keeps rows apart, to those of a cold run that reads the
prompt by the same steps. From the plainest they differ by the order of sums, for which ``rounding``
allows; so do those of the model's own forward pass over the whole text. A way is also counted,
where it can be: reuse that reused nothing proves nothing.
Knows nothing of checkpoints or command lines.
"""

import math
import tempfile
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deltamoe.engine.core import Core
from deltamoe.engine.options import EngineOptions
from deltamoe.engine.recorder import Recorder, Run
from deltamoe.engine.request import Request
from deltamoe.engine.sequence import Job
from deltamoe.engine.snapshots import Cuts
from deltamoe.errors import ConfigError
from deltamoe.inference import load_text_state, save_text_state
from deltamoe.inference.text_state import evaluating
from deltamoe.layers.quantized import QuantizedMatrix
from deltamoe.model import HybridLM
from deltamoe.tokenizer import Tokenizer

__all__ = ["Proof", "Way", "prove"]

# Of the largest logit, for sums in another order; and the share of tokens that must keep to it. In
# bf16, and where quantised matrices take their inputs rounded to 8 bits, a tie of the router may be
# decided otherwise: that token visits another expert, and differs by more.
_ALLOWED = {torch.float64: (1e-9, 1.0), torch.float32: (1e-3, 1.0)}
_COARSELY_ALLOWED = (0.2, 0.5)
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
        difference: largest difference of a logit from the plain way's; None if it is not finite, or
            nothing was answered.
        diverges_at: the first token that would have been another than the plain way's, from 0; None
            if none would.
        margin: how far the plain way's two likeliest tokens were apart there.
        difference_alike: ``difference`` from a cold run that read the prompt by the same steps;
            None where there is no such run to compare with.
        must_be_equal: whether ``difference_alike`` has to be 0, and every token the same.
        number: how often what the way is about took place; None where it cannot fail to.
        counted: what was counted.
        fault: what is wrong; None if nothing is.
    """

    name: str
    difference: float | None
    diverges_at: int | None
    margin: float | None
    difference_alike: float | None
    must_be_equal: bool
    number: int | None
    counted: str
    fault: str | None

    @property
    def is_right(self) -> bool:
        """Whether the way took place, and answered as it should."""
        return self.fault is None


@dataclass(frozen=True)
class Proof:
    """What came out.

    Attributes:
        num_prompt_tokens: tokens of the prompt.
        num_tokens: tokens drawn.
        dtype: of the model.
        has_decoder: whether rows were kept from touching each other's bits.
        rounding: the largest difference of a logit that is put down to the order of sums; in bf16
            and for quantised models only half of the tokens must keep to it.
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
        """Whether every way took place, and none answered otherwise."""
        return all(way.is_right for way in self.ways)


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
        NonFiniteError: the plain way's logits are not finite.
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
        # Several chunks and pages, whatever the prompt's length, and an end read token by token.
        chunk = max(min(len(ids) // 4, 128), 2)
        self.plain = EngineOptions(
            prefill_chunk=chunk,
            single_tokens=chunk,
            step_tokens=chunk,
            page_tokens=max(chunk // 3, 1),
            context=4 * len(ids) + 8 * num_tokens,
            max_sequences=_NUM_NEIGHBOURS + 1,
            cache_bytes=0,
        )
        self.keeping = replace(self.plain, cache_bytes=None)
        self.request = Request(prompt=ids, max_tokens=num_tokens, ignore_end=True)
        # Beginnings of the same text, so that they have prefixes in common with it.
        half = len(ids) // 2
        self.neighbours = [
            replace(self.request, prompt=(*ids[: half + at], ids[at]), max_tokens=at + 2)
            for at in range(_NUM_NEIGHBOURS - 1)
        ]
        # One writes for as long as the others read.
        self.neighbours.append(
            replace(self.request, prompt=ids[:half], max_tokens=half + num_tokens)
        )
        core = self._core(self.plain)
        self.has_decoder = core.reader.has_decoder
        recorder = Recorder(core)
        plain = recorder.follow(self.request)
        [run] = recorder.runs(plain)
        self.written, self.cold = run, {plain.prompt_cuts: run}
        self.dtype = model.embedding.weight.dtype
        is_quantized = any(isinstance(part, QuantizedMatrix) for part in model.modules())
        is_fine = self.dtype in _ALLOWED and not is_quantized
        share, self.share_near = _ALLOWED[self.dtype] if is_fine else _COARSELY_ALLOWED
        self.rounding = share * max(float(self.written.logits.abs().max()), 1.0)

    def run(self, on_way: Callable[[Way], None] | None) -> Proof:
        ways = []
        for name, runs_of in self._ways():
            try:
                found = [self._compared(name, run) for run in runs_of()]
            except Exception as error:  # whatever the engine did wrong, the other ways are shown
                found = [_failed(name, error)]
            for way in found:
                ways.append(way)
                if on_way is not None:
                    on_way(way)
        return Proof(
            num_prompt_tokens=len(self.request.prompt),
            num_tokens=len(self.written.ids),
            dtype=str(self.dtype).removeprefix("torch."),
            has_decoder=self.has_decoder,
            rounding=self.rounding,
            ways=tuple(ways),
        )

    def _ways(self) -> list[tuple[str, Callable[[], list[Run]]]]:
        return [
            ("again", lambda: [self._run(self.plain)]),
            ("the model's forward pass", self._forward),
            *(
                (f"chunks of {chunk}", lambda chunk=chunk: self._chunked(chunk))
                for chunk in _CHUNKS
            ),
            *([("token by token", self._singly)] if self.has_decoder else []),
            ("among neighbours", lambda: [self._among_neighbours(self._recorder(self.plain))]),
            ("in places that held others", self._in_used_places),
            ("prefix: the whole prompt", self._whole_prefix),
            ("prefix: half the prompt", self._half_prefix),
            ("prefix: among neighbours", self._neighbours_prefix),
            ("put aside", lambda: [self._preempted(self.keeping)]),
            ("lost and read again", lambda: [self._preempted(self.plain)]),
            ("forked", self._forked),
            ("from a state file", self._from_file),
        ]

    def _core(self, options: EngineOptions) -> Core:
        return Core(self.model, self.tokenizer, options)

    def _recorder(self, options: EngineOptions) -> Recorder:
        return Recorder(self._core(options), self.written.ids)

    def _run(self, options: EngineOptions) -> Run:
        """The request alone."""
        recorder = self._recorder(options)
        [run] = recorder.runs(recorder.follow(self.request))
        return run

    def _forward(self) -> list[Run]:
        text = torch.tensor([[*self.request.prompt, *self.written.ids[:-1]]])
        hidden = self.model.hidden(text.to(self.model.embedding.weight.device)).hidden[0]
        logits = self.model.logits(hidden[len(self.request.prompt) - 1 :])
        logits = logits[:, : self.tokenizer.vocab_size].cpu()
        usable = logits.clone()
        usable[:, list(self.tokenizer.unused_ids)] = -torch.inf
        return [Run(tuple(usable.argmax(-1).tolist()), logits)]

    def _chunked(self, chunk: int) -> list[Run]:
        run = self._run(replace(self.plain, prefill_chunk=chunk, single_tokens=0))
        sizes = _sizes(run.cuts)
        number = len(sizes) if max(sizes) <= chunk else 0
        return [run._replace(cuts=None, number=number, counted="chunks")]

    def _singly(self) -> list[Run]:
        run = self._run(replace(self.plain, single_tokens=len(self.request.prompt)))
        number = sum(-cut for cut in run.cuts or () if cut < 0)
        return [run._replace(cuts=None, number=number, counted="tokens read one by one")]

    def _among_neighbours(self, recorder: Recorder) -> Run:
        own = self._with_neighbours(recorder)
        [run] = recorder.runs(own)
        return run._replace(number=recorder.num_beside[own], counted="tokens drawn beside others")

    def _with_neighbours(self, recorder: Recorder) -> Job:
        half = len(self.neighbours) // 2
        for request in self.neighbours[:half]:
            recorder.add(request)
        recorder.core.step()
        own = recorder.follow(self.request)
        for request in self.neighbours[half:]:
            recorder.add(request)
        return own

    def _in_used_places(self) -> list[Run]:
        # Read token by token, a text begins with what is found in its place.
        recorder = self._recorder(replace(self.plain, single_tokens=len(self.request.prompt)))
        recorder.core.pool.spoil()
        return [self._among_neighbours(recorder)]

    def _whole_prefix(self) -> list[Run]:
        recorder = self._recorder(replace(self.keeping, exact_reuse=True))
        recorder.runs(recorder.add(self.request))
        return [recorder.reusing(recorder.follow(self.request))]

    def _half_prefix(self) -> list[Run]:
        recorder = self._recorder(self.keeping)
        half = self.request.prompt[: len(self.request.prompt) // 2]
        recorder.runs(recorder.add(replace(self.request, prompt=half, max_tokens=1)))
        return [recorder.reusing(recorder.follow(self.request))]

    def _neighbours_prefix(self) -> list[Run]:
        recorder = self._recorder(self.keeping)
        return [recorder.reusing(self._with_neighbours(recorder))]

    def _preempted(self, options: EngineOptions) -> Run:
        recorder = self._recorder(options)
        core = recorder.core
        own = recorder.follow(replace(self.request, reuse=False))
        for number in _PREEMPTED_AFTER:
            for _ in range(number):
                core.step()
            if core.scheduler.running:
                core.preempt(core.scheduler.youngest())
        [run] = recorder.runs(own)
        num_rebuilt = core.counters.num_rebuilt
        if options.cache_bytes == 0:
            return run._replace(number=num_rebuilt, counted="times lost")
        num_aside = core.counters.num_preemptions - num_rebuilt
        return run._replace(number=num_aside, counted="times put aside")

    def _forked(self) -> list[Run]:
        recorder = self._recorder(self.keeping)
        own = recorder.follow(replace(self.request, n=_NUM_CHOICES, reuse=False))
        _, *others = recorder.runs(own)
        num_rebuilt = recorder.core.counters.num_rebuilt
        number = len(others) - num_rebuilt if own.has_forked else 0
        return [run._replace(number=number, counted="choices forked") for run in others]

    def _from_file(self) -> list[Run]:
        half = len(self.request.prompt) // 2
        head = replace(self.request, prompt=self.request.prompt[:half], max_tokens=0)
        recorder = self._recorder(self.keeping)
        own = recorder.add(replace(head, keep_state=True))
        recorder.runs(own)
        text = recorder.results[own].choices[0].state
        assert text is not None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            save_text_state(path, text, self.model)
            loaded = load_text_state(path, self.model)
        recorder = self._recorder(self.keeping)
        tail = replace(self.request, prompt=self.request.prompt[half:], state=loaded)
        job = recorder.follow(tail)
        [run] = recorder.runs(job)
        before = job.num_before  # saving reads the head's last token, in a pass of its own
        behind = (cut + before if cut > 0 else cut - before for cut in job.prompt_cuts)
        cuts = (*own.prompt_cuts, before, *behind)
        return [run._replace(cuts=cuts, number=before, counted="tokens not read again")]

    def _cold(self, cuts: Cuts) -> Run:
        """Alone, nothing restored, and the prompt read by given steps."""
        if cuts not in self.cold:
            recorder = self._recorder(self.plain)
            job = recorder.follow(self.request)
            job.sequences[0].cuts, job.sequences[0].is_bound = list(cuts), True
            [run] = recorder.runs(job)
            self.cold[cuts] = run
        return self.cold[cuts]

    def _compared(self, name: str, run: Run) -> Way:
        from_plain = _apart(self.written, run)
        alike = None if run.cuts is None else _apart(self._cold(run.cuts), run)
        diverges_at = _parting(self.written, run)
        margin = None
        if diverges_at is not None:
            best = self.written.logits[diverges_at].topk(2).values
            margin = float(best[0] - best[1])
        must_be_equal = alike is not None and self.has_decoder
        fault = None
        if run.number == 0:
            fault = "did not happen"
        elif must_be_equal and not self._is_equal(run):
            fault = "not equal to the last bit"
        elif not all(self._is_near(each) for each in (from_plain, alike) if each is not None):
            fault = "differs by more than rounding"
        return Way(
            name=name,
            difference=_largest(from_plain),
            diverges_at=diverges_at,
            margin=margin,
            difference_alike=None if alike is None else _largest(alike),
            must_be_equal=must_be_equal,
            number=run.number,
            counted=run.counted,
            fault=fault,
        )

    def _is_equal(self, run: Run) -> bool:
        assert run.cuts is not None
        cold = self._cold(run.cuts)
        return cold.ids == run.ids and torch.equal(cold.logits, run.logits)

    def _is_near(self, apart: Tensor) -> bool:
        number = math.ceil(self.share_near * len(apart))
        return bool(
            apart.sort().values[:number].le(self.rounding).all()
        )  # NaN comes last, and is not


def _failed(name: str, error: Exception) -> Way:
    return Way(
        name=name,
        difference=None,
        diverges_at=None,
        margin=None,
        difference_alike=None,
        must_be_equal=False,
        number=None,
        counted="",
        fault=f"failed: {error!r}",
    )


def _apart(one: Run, other: Run) -> Tensor:
    """The largest difference of a logit, for each token."""
    return (one.logits - other.logits).abs().amax(-1)


def _largest(apart: Tensor) -> float | None:
    number = float(apart.max())
    return number if math.isfinite(number) else None


def _parting(one: Run, other: Run) -> int | None:
    """The first token that differs."""
    pairs = zip(one.ids, other.ids, strict=True)
    return next((at for at, (left, right) in enumerate(pairs) if left != right), None)


def _sizes(cuts: Cuts | None) -> list[int]:
    """Tokens between one cut and the next."""
    places = [0, *map(abs, cuts or ())]
    return [after - before for before, after in pairwise(places)]
