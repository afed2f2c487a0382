"""Parity with llama.cpp, which nobody here wrote, on the files we write."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conversion.gguf.exported import GEOMETRIES, MIXED, save, tiny
from tests.conversion.gguf.llama_cpp import ask

from deltamoe.conversion import open_source
from deltamoe.conversion.gguf import read_gguf, write_gguf
from deltamoe.model import HybridLM
from deltamoe.tokenizer import BpeTokenizer, ByteTokenizer, TiktokenTokenizer, Tokenizer

pytest.importorskip("llama_cpp_py_sync", reason="needs llama-cpp-py-sync, of the extra dev")

TEXTS = [
    "Hello, world! It's 12345 o'clock; we'LL see.\n\n  def f(x):\r\n\treturn x ** 2  # né…",
    "naïve café — “quotes” 100% \x00\x7f ½²  \u3000\u00a0 ",
    "中文字符，测试。日本語テスト 한국어 русский Ελληνικά",
    "<|end|> is a text here, <|im_end|> too",
    "",
]
MARKS = ["हिन्दी में लिखा हुआ पाठ", "a\u0301e\u0300", "عَرَبِيّ", "❤️❤️ !!❤️ 👨‍👩‍👧"]
PROMPT = [256, *np.random.default_rng(5).integers(0, 256, 50).tolist()]


def greedy(model: HybridLM, prompt: list[int], count: int) -> list[int]:
    ids, chosen, state = torch.tensor([prompt]), [], None
    for _ in range(count):
        with torch.inference_mode():
            logits, state = model(ids, state)
        chosen.append(int(logits[0, -1].argmax()))
        ids = torch.tensor([chosen[-1:]])
    return chosen


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_f32_computes_the_same(geometry: str, tmp_path: Path) -> None:
    model = tiny(GEOMETRIES[geometry])
    file = tmp_path / "model.gguf"
    write_gguf(open_source(save(tmp_path / "run", model)), file, dtype="f32")
    answer = ask(file, rows=[PROMPT, PROMPT[:1]], **{"continue": 40})
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT]))[0][0].numpy()
    # both sides round in fp32 and sum in another order; logits reach 5
    np.testing.assert_allclose(answer["logits0"], expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(answer["logits1"], expected[:1], rtol=0, atol=1e-4)
    assert answer["continued0"].tolist() == greedy(model, PROMPT, 40)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # llama.cpp rounds the activations too, to the weights' type: 2**-11, 2**-8 and 1/127 of the
    # largest in a row, through five layers
    [("f16", 0.003), ("bf16", 0.03), ("q8_0", 0.06)],
)
def test_narrow_files_answer(dtype: str, tolerance: float, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(open_source(save(tmp_path / "run", tiny(MIXED, noise=0.03))), file, dtype=dtype)
    model = read_gguf(file, dtype=torch.float32).model
    answer = ask(file, rows=[PROMPT], **{"continue": 4})
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT]))[0][0].numpy()
    error = np.linalg.norm(answer["logits0"] - expected) / np.linalg.norm(expected)
    assert error < tolerance
    assert len(answer["continued0"]) == 4


def trained() -> BpeTokenizer:
    return BpeTokenizer.train([*TEXTS, *MARKS, Path(__file__).read_text()], 700)


def ranks() -> TiktokenTokenizer:
    """Bytes in some order, some pairs, some triples; and Kimi's special tokens."""
    pairs = [b"th", b"he", b"in", b"  ", "é".encode(), b"12", "中".encode()[:2], b"o'", b"\n\n"]
    triples = [b"the", b"ing", "中".encode(), b"123", "“".encode()]
    tokens = [*(bytes([i]) for i in range(256)), *pairs, "“".encode()[:2], *triples]
    first = len(tokens)
    return TiktokenTokenizer(tokens, {"[BOS]": first, "[EOS]": first + 1, "<|im_end|>": first + 2})


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), trained(), ranks()], ids=lambda t: t.name)
def test_ids_are_ours(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = replace(MIXED, vocab_size=tokenizer.vocab_size + 3, num_layers=4)
    file = tmp_path / "model.gguf"
    write_gguf(open_source(save(tmp_path / "run", tiny(config), tokenizer)), file)
    # a combining mark is part of its word for the rule we train with, and for no rule of llama.cpp
    texts = TEXTS if isinstance(tokenizer, BpeTokenizer) else TEXTS + MARKS
    answer = ask(file, texts=texts)
    for i, text in enumerate(texts):
        assert answer[f"ids{i}"].tolist() == tokenizer.encode(text), text
    assert bool(answer["adds_bos"]) is ("<|im_end|>" not in tokenizer.special_ids)
