"""How decoding is timed: tokens read one by one, by us and by llama.cpp, and a copy of memory."""

import time
from collections.abc import Callable

import torch
from benchmarks.contestants import LlamaCpp, serve

from deltamoe.model import Decoder, ModelState

__all__ = ["BARS", "contest", "peer_seconds", "step_seconds"]

BARS = {"f32": 1.0, "bf16": 1.3, "8 bits": 1.0, "4 bits": 1.0}  # ours to llama.cpp
_PEER_CONTEXT = 256


def contest(
    arguments: list[str], open_decoder: Callable[[str], Decoder], vocab_size: int, tokens: int
) -> None:
    """Be what ``--serve KIND WHAT THREADS`` asks for, told the batch size for each run.

    KIND is ``ours`` (WHAT goes to ``open_decoder``), ``llama.cpp`` (WHAT is a file; one sequence)
    or ``copy``. Ours and theirs decode ``tokens`` tokens of the same random text behind its first.
    """
    kind, what, threads = arguments
    torch.set_num_threads(int(threads))

    def text(batch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (tokens + 1, batch), generator=generator)

    if kind == "ours":
        run = _ours(open_decoder(what), text)
    elif kind == "llama.cpp":
        run = _llama_cpp(what, int(threads), text(1).flatten().tolist())
    else:
        run = _copying()
    run(1)
    serve(run)


def step_seconds(decoder: Decoder, ids: torch.Tensor, state: ModelState | None = None) -> float:
    """What decoding ``ids`` [T, B] takes but for the first, which allocates or copies the cache."""
    _, after = decoder.step(ids[0], state)
    started = time.perf_counter()
    for step in ids[1:]:
        _, after = decoder.step(step, after)
    return time.perf_counter() - started


def peer_seconds(peer: LlamaCpp, prompt: list[int], ids: list[int]) -> float:
    """What decoding ``ids`` behind a prompt takes llama.cpp."""
    peer.forget()
    peer.read(prompt)
    started = time.perf_counter()
    for id_ in ids:
        peer.read([id_])
    return time.perf_counter() - started


def _ours(decoder: Decoder, text: Callable[[int], torch.Tensor]) -> Callable[[int], float]:
    return lambda batch: step_seconds(decoder, text(batch))


def _llama_cpp(file: str, threads: int, text: list[int]) -> Callable[[int], float]:
    peer = LlamaCpp(file, context=_PEER_CONTEXT, threads=threads, flash_attention="off")
    return lambda _: peer_seconds(peer, text[:1], text[1:])


def _copying() -> Callable[[int], float]:
    """Seconds for copying 1 GB, that is reading one and writing one."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)

    def copy(_: int) -> float:
        started = time.perf_counter()
        for _ in range(4):
            target.copy_(source)
        return (time.perf_counter() - started) * 1e9 / (4 * source.nbytes)

    return copy
