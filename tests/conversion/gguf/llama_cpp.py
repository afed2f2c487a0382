"""llama.cpp through the bindings of llama-cpp-py-sync: a GGUF file in, logits out.

Run in a process of its own, ``python -m tests.conversion.gguf.llama_cpp REQUEST``: the library
writes to stderr as it likes, and where a model is impossible it ends the process. The request is
JSON: ``{"file": path, "rows": [[ids]], "continue": n, "texts": [text], "out": path}``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tests.conversion.gguf.old_glibc import for_old_glibc

F32 = 0  # ggml_type, of the cache; its default of f16 costs the fourth digit of the logits
NO_FLASH_ATTENTION = 0  # on a CPU it computes in f16, whatever the cache


def ask(file: Path, **request: Any) -> dict[str, Any]:
    """Answers of a fresh process: logits [T, vocab] a row, the continuations, ids of the texts."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "answer.npz"
        text = json.dumps({"file": str(file), "out": str(out), **request})
        command = [sys.executable, "-m", "tests.conversion.gguf.llama_cpp", text]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            said = f"{done.stderr[:1500]}\n…\n{done.stderr[-1500:]}"
            raise RuntimeError(f"llama.cpp left with {done.returncode}:\n{said}")
        with np.load(out) as answer:
            return dict(answer)


def main(text: str) -> None:
    request = json.loads(text)
    llama = LlamaCpp(request["file"], vocabulary_only="rows" not in request)
    answer: dict[str, Any] = {"adds_bos": np.array(llama.adds_bos())}
    for i, row in enumerate(request.get("rows", [])):
        answer[f"logits{i}"] = llama.logits(row)
        answer[f"continued{i}"] = np.array(llama.continued(row, request.get("continue", 0)))
    for i, piece in enumerate(request.get("texts", [])):
        answer[f"ids{i}"] = np.array(llama.tokenize(piece), dtype=np.int64)
    np.savez(request["out"], **answer)


class LlamaCpp:
    def __init__(self, file: str, *, vocabulary_only: bool) -> None:
        self._lib, self._ffi = open_library()
        self._lib.llama_backend_init()
        options = self._lib.llama_model_default_params()
        options.vocab_only = vocabulary_only
        self._model = self._lib.llama_model_load_from_file(file.encode(), options)
        if self._model == self._ffi.NULL:
            raise SystemExit("the model does not load")
        self._vocab = self._lib.llama_model_get_vocab(self._model)

    def adds_bos(self) -> bool:
        return bool(self._lib.llama_vocab_get_add_bos(self._vocab))

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        room = len(data) + 16
        ids = self._ffi.new(f"llama_token[{room}]")
        count = self._lib.llama_tokenize(self._vocab, data, len(data), ids, room, False, False)
        return [ids[i] for i in range(count)]

    def logits(self, ids: list[int]) -> np.ndarray:
        """[T, vocab] of one fresh sequence."""
        context = self._context(len(ids))
        rows = self._decode(context, ids, 0)
        self._lib.llama_free(context)
        return rows

    def continued(self, ids: list[int], count: int) -> list[int]:
        """The most likely next ids, one after the other, each decoded alone."""
        context = self._context(len(ids) + count)
        rows, chosen = self._decode(context, ids, 0), []
        for past in range(len(ids), len(ids) + count):
            chosen.append(int(rows[-1].argmax()))
            rows = self._decode(context, chosen[-1:], past)
        self._lib.llama_free(context)
        return chosen

    def _context(self, tokens: int) -> Any:
        options = self._lib.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = max(tokens, 64)
        options.n_threads = options.n_threads_batch = 1
        options.type_k = options.type_v = F32
        options.flash_attn_type = NO_FLASH_ATTENTION
        context = self._lib.llama_init_from_model(self._model, options)
        if context == self._ffi.NULL:
            raise SystemExit("no context")
        return context

    def _decode(self, context: Any, ids: list[int], past: int) -> np.ndarray:
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, past + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if self._lib.llama_decode(context, batch):
            raise SystemExit("llama_decode refused")
        size = self._lib.llama_vocab_n_tokens(self._vocab)
        rows = [
            np.frombuffer(
                self._ffi.buffer(self._lib.llama_get_logits_ith(context, i), 4 * size), np.float32
            ).copy()
            for i in range(len(ids))
        ]
        self._lib.llama_batch_free(batch)
        return np.stack(rows)


def open_library() -> tuple[Any, Any]:
    """The library and its interface; a copy that suits an old glibc where the wheel's does not."""
    import llama_cpp_py_sync
    from llama_cpp_py_sync._cffi_bindings import ffi

    folder = Path(llama_cpp_py_sync.__file__).parent
    try:
        return ffi.dlopen(str(folder / "libllama.so")), ffi
    except OSError as fault:
        if "GLIBC_2.38" not in str(fault):
            raise
    with TemporaryDirectory() as copies:
        for library in ("libggml-base", "libggml-cpu", "libggml-rpc", "libggml", "libllama"):
            name = f"{library}.so.0"
            (Path(copies) / name).write_bytes(for_old_glibc(folder / name))
        return ffi.dlopen(os.path.join(copies, "libllama.so.0")), ffi


if __name__ == "__main__":
    main(sys.argv[1])
