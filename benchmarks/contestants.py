"""Processes that hold a model and wait for their turn, and the peer's side of them.

    python -m benchmarks.contestants SOURCE TARGET     llama.cpp's q4_0 file of an f32 one

A benchmark that pairs us with llama.cpp starts one process a contestant and lets them run one after
the other, round by round, so that all see the same machine. llama.cpp comes with llama-cpp-py-sync;
its files are made by ``write_gguf`` and, at 4 bits, by llama.cpp itself.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from deltamoe.model import HybridLM

__all__ = [
    "FLASH_ATTENTION",
    "Contestant",
    "LlamaCpp",
    "gguf_file",
    "median_ratio",
    "paired",
    "serve",
]

FLASH_ATTENTION = {"off": 0, "on": 1}
_GGUF_TYPES = {"f32": "f32", "bf16": "bf16", "8 bits": "q8_0"}
_Q4_0 = 2  # llama.cpp's number of such a file


class Contestant:
    """A process that runs when it is told to: ``python -m MODULE --serve ARGUMENTS THREADS``."""

    def __init__(self, module: str, *arguments: str, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, "--serve", *arguments, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self._said = " ".join(arguments)

    def wait(self) -> None:
        """Until its model is there."""
        if self._answer() != "ready":
            raise SystemExit(f"{self._said} did not start")

    def seconds(self, size: int) -> float:
        """Let it run once."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{size}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        """Let it go."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def paired(
    module: str, model: HybridLM, precisions: Sequence[str], *, threads: int
) -> dict[str, Contestant]:
    """Start "ours, P" and "llama.cpp, P" for each precision P; they are ready when this returns.

    Ours make the model themselves, told its precision; llama.cpp reads a file of ``model``.
    """
    from tests.conversion.gguf.exported import save

    contestants = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = save(folder / "checkpoint", model)
        for precision in precisions:
            file = gguf_file(source, folder / f"{precision}.gguf", precision)
            for side, what in (("ours", precision), ("llama.cpp", str(file))):
                contestants[f"{side}, {precision}"] = Contestant(
                    module, side, what, threads=threads
                )
        for contestant in contestants.values():
            contestant.wait()
    return contestants


def serve(run: Callable[[int], float]) -> None:
    """Be a contestant: answer each size that comes in with the seconds it took."""
    print("ready", flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            print(run(int(line)), flush=True)


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


class LlamaCpp:
    """A GGUF file in llama.cpp, read in batches of up to 512 tokens at a time."""

    def __init__(self, file: str, *, context: int, threads: int, flash_attention: str) -> None:
        from tests.conversion.gguf.llama_cpp import open_library

        self._lib, self._ffi = open_library()
        self._lib.llama_backend_init()
        options = self._lib.llama_model_default_params()
        self._model = self._lib.llama_model_load_from_file(file.encode(), options)
        if self._model == self._ffi.NULL:
            raise SystemExit("the model does not load")
        options = self._lib.llama_context_default_params()
        options.n_ctx = options.n_batch = context
        options.n_ubatch = min(512, context)
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = FLASH_ATTENTION[flash_attention]
        self._context: Any = self._lib.llama_init_from_model(self._model, options)
        if self._context == self._ffi.NULL:
            raise SystemExit("no context")

    def forget(self) -> None:
        """Start an empty text."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def read(self, ids: list[int]) -> None:
        """Read tokens behind those read before; scores what may follow the last."""
        tokens = self._ffi.new("llama_token[]", ids)
        batch = self._lib.llama_batch_get_one(tokens, len(ids))
        if self._lib.llama_decode(self._context, batch):
            raise SystemExit("llama_decode refused")
        self._lib.llama_get_logits_ith(self._context, -1)


def gguf_file(source: Path, file: Path, precision: str) -> Path:
    """Write the checkpoint at ``source`` as llama.cpp's own kind of file in this precision."""
    from deltamoe.conversion import open_source
    from deltamoe.conversion.gguf import write_gguf

    if precision in _GGUF_TYPES:
        write_gguf(open_source(source), file, dtype=_GGUF_TYPES[precision])
        return file
    wide = file.with_name("wide.gguf")
    write_gguf(open_source(source), wide, dtype="f32")
    # in a process of its own: llama.cpp ends the one it fails in
    command = [sys.executable, "-m", "benchmarks.contestants", str(wide), str(file)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    wide.unlink()
    return file


def _quantize(source: str, target: str) -> None:
    from tests.conversion.gguf.llama_cpp import open_library

    lib, ffi = open_library()
    options = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
    options.ftype = _Q4_0
    if lib.llama_model_quantize(source.encode(), target.encode(), options):
        raise SystemExit("llama.cpp refuses to quantise the file")


if __name__ == "__main__":
    _quantize(*sys.argv[1:])
