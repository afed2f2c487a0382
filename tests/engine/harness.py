"""Requests through an engine without its thread, so that a test decides what happens when."""

from collections.abc import Sequence as Rows
from dataclasses import replace
from functools import cache

import torch

from deltamoe.engine import EngineOptions, Piece, Request, Result
from deltamoe.engine.core import Core
from deltamoe.model import HybridLM
from deltamoe.testing import tiny_config, tiny_model
from deltamoe.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
# Without single tokens the short prompts of tests would never be read in chunks.
OPTIONS = EngineOptions(
    state_bytes=10**7,
    cache_bytes=10**6,
    prefill_chunk=16,
    single_tokens=0,
    step_tokens=16,
    page_tokens=4,
)
COLD = replace(OPTIONS, cache_bytes=0)

_BASE = tiny_config()
# The stacks whose states differ in kind: slots and pages, slots only, pages only; and the other
# kind of router.
MODELS = {
    "hybrid": {},
    "all kda": {"mla_every": 0},
    "all mla": {"mla_every": 1},
    "softmax router": {"moe": replace(_BASE.moe, scoring="softmax", has_balance_bias=False)},
}


class Recorder:
    """Keeps everything one request was told."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.result: Result | None = None
        self.error: BaseException | None = None

    def on_piece(self, piece: Piece) -> None:
        assert not self.is_done
        self.pieces.append(piece)

    def on_result(self, result: Result) -> None:
        assert not self.is_done
        self.result = result

    def on_error(self, error: BaseException) -> None:
        assert not self.is_done
        self.error = error

    @property
    def is_done(self) -> bool:
        return self.result is not None or self.error is not None


def prompt(text: str) -> tuple[int, ...]:
    return (TOKENIZER.end_id, *TOKENIZER.encode(text))


def submit(core: Core, request: Request) -> Recorder:
    recorder = Recorder()
    core.add(request, recorder, core.prepare(request))
    return recorder


def drain(core: Core) -> None:
    while core.has_work:
        core.step()


def answers(core: Core, requests: Rows[Request]) -> list[Result]:
    """All of them at once."""
    recorders = [submit(core, request) for request in requests]
    drain(core)
    for recorder in recorders:
        if recorder.error is not None:
            raise recorder.error
    return [recorder.result for recorder in recorders if recorder.result is not None]


def solo(core: Core, requests: Rows[Request]) -> list[Result]:
    """One after another."""
    return [answers(core, [request])[0] for request in requests]


def texts(results: Rows[Result]) -> list[list[tuple[int, ...]]]:
    return [[choice.ids for choice in result.choices] for result in results]


def everything(results: Rows[Result]) -> list[object]:
    """What must be equal to the last bit."""
    return [(result.choices, result.prompt_logprobs) for result in results]


def assert_empty(core: Core) -> None:
    """Nothing is held once nothing runs and nothing is kept."""
    core.snapshots.clear()
    pool = core.pool
    assert pool.num_free_slots == core.size.num_slots
    assert (pool.num_running_pages, pool.num_cached_pages, pool.cached_slot_bytes) == (0, 0, 0)
    assert pool.num_unused_pages == core.size.num_pages + core.size.num_cached_pages
    assert not core.scheduler.running
    assert not core.scheduler.waiting


@cache
def model_of(kind: str, dtype: torch.dtype = torch.float32) -> HybridLM:
    return tiny_model(dtype, **MODELS[kind])
