"""The decoder answers what the model answers, keeps states as values, and leaks nothing."""

import gc
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltamoe.config.model import ModelConfig
from deltamoe.inference import generate
from deltamoe.model import Decoder, HybridLM, ModelState, decoder, token_reader
from deltamoe.model.description import UnsupportedError
from deltamoe.model.quantized import quantize_model
from deltamoe.ops import native
from deltamoe.testing import tiny_config, tiny_model
from deltamoe.tokenizer import ByteTokenizer

pytestmark = pytest.mark.skipif(
    native.why_not("decode") is not None, reason=f"native: {native.why_not('decode')}"
)

BASE = tiny_config()
assert BASE.kda is not None
assert BASE.mla is not None
assert BASE.moe is not None
KDA, MLA, MOE = BASE.kda, BASE.mla, BASE.moe
VARIANTS: dict[str, ModelConfig] = {
    "as it is": BASE,
    "no output gate": replace(BASE, kda=replace(KDA, output_gate="none")),
    "swish output gate": replace(BASE, kda=replace(KDA, output_gate="swish")),
    "no convolution": replace(BASE, kda=replace(KDA, conv_size=0)),
    "one tap": replace(BASE, kda=replace(KDA, conv_size=1)),
    "bounded decay": replace(BASE, kda=replace(KDA, decay="bounded", max_beta=2.0)),
    "whole vectors": replace(BASE, kda=replace(KDA, key_dim=16, value_dim=208)),
    "rotated keys": replace(BASE, mla=replace(MLA, has_rope=True)),
    "query bottleneck": replace(BASE, mla=replace(MLA, query_rank=9)),
    "no shared key": replace(BASE, mla=replace(MLA, rope_dim=0)),
    "softmax": replace(BASE, moe=replace(MOE, scoring="softmax")),
    "softmax of the chosen": replace(BASE, moe=replace(MOE, scoring="topk_softmax")),
    "groups": replace(BASE, moe=replace(MOE, num_experts=12, num_groups=4, groups_per_token=2)),
    "biased weights": replace(BASE, moe=replace(MOE, has_biased_weights=True)),
    "no bias": replace(BASE, moe=replace(MOE, renormalize=False, has_balance_bias=False)),
    "one expert": replace(BASE, moe=replace(MOE, experts_per_token=1)),
    "plain experts": replace(BASE, moe=replace(MOE, expert="ffn")),
    "no shared expert": replace(BASE, moe=replace(MOE, num_shared_experts=0)),
    "tied": replace(BASE, tie_embeddings=True),
    "all KDA": replace(BASE, mla_every=0, mla_last=False),
    "all MLA": replace(BASE, mla_every=1),
    "dense": replace(BASE, first_dense_layers=4),
    "wider": replace(BASE, dim=72, moe=replace(MOE, expert_dim=40)),
}


def built(config: ModelConfig, dtype: torch.dtype = torch.float32) -> HybridLM:
    model = HybridLM(config)
    model.initialize(0)
    for name, buffer in model.named_buffers():
        if name.endswith("balance_bias"):  # zero at first: it would decide nothing
            buffer.uniform_(-0.2, 0.2)
    return model.to(dtype).eval()


@torch.inference_mode()
def distance(
    model: HybridLM, reader: Decoder, *, rows: int, steps: int, peer: HybridLM | None = None
) -> float:
    """The largest difference of logits and states from ``peer``'s, of the largest number's size.

    Rows have prompts of different lengths; the state passes from the model to the decoder.
    """
    vocab, longest = model.config.vocab_size, rows + 1
    lengths = longest - torch.arange(rows)
    _, ours = model(torch.randint(vocab, (rows, longest)), lengths=lengths)
    theirs, peer = ours, peer or model
    pairs = []
    for _ in range(steps):
        ids = torch.randint(vocab, (rows,))
        wanted, theirs = peer(ids[:, None], theirs)
        got, ours = reader.step(ids, ours)
        pairs.append((got, wanted[:, 0]))
        assert got.dtype == torch.float32
        assert torch.equal(ours.lengths, theirs.lengths)
    pairs += zip(ours.tensors(), theirs.tensors(), strict=True)
    worst = 0.0
    for got, wanted in pairs:
        assert got.shape == wanted.shape
        if got.numel():
            error = (got.double() - wanted.double()).abs().max() / wanted.abs().max().double()
            worst = max(worst, float(error))
    return worst


@pytest.mark.parametrize("name", VARIANTS)
def test_it_answers_what_the_model_answers(name: str) -> None:
    model = built(VARIANTS[name])
    # fp32 sums in another order, through four layers whose errors the residual stream adds up:
    # 2e-6 to 6e-6 were measured
    assert distance(model, Decoder(model), rows=3, steps=12) < 3e-5


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 9])
def test_any_number_of_rows(rows: int) -> None:
    model = built(BASE)
    assert distance(model, Decoder(model), rows=rows, steps=5) < 3e-5


def test_a_long_past() -> None:
    """Past 512 tokens the attention is cut into its most stretches, of several blocks each."""
    model = built(replace(BASE, mla_every=1, num_layers=2))
    ids = torch.randint(257, (2, 1200))
    with torch.inference_mode():
        _, state = model(ids[:, :-1])
        wanted, _ = model(ids[:, -1:], state)
        got, _ = Decoder(model).step(ids[:, -1], state)
    # fp32, as above
    assert float((got - wanted[:, 0]).abs().max() / wanted.abs().max()) < 3e-5


def test_bf16() -> None:
    """Against the same rounded weights in fp32: only states are rounded, to 8 bits' precision."""
    config = replace(BASE, moe=replace(MOE, experts_per_token=5))  # no choice to tip over
    model = built(config, torch.bfloat16)
    wide = built(config, torch.bfloat16).float()
    assert distance(model, Decoder(model), rows=3, steps=12, peer=wide) < 2e-2


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["as it is", "wider", "query bottleneck", "plain experts"])
def test_quantised(name: str, bits: int) -> None:
    moe = VARIANTS[name].moe
    assert moe is not None
    config = replace(VARIANTS[name], moe=replace(moe, experts_per_token=5))  # no choice to tip over
    model = quantize_model(built(config), bits)  # type: ignore[arg-type]
    # Both round activations to 8 bits; one that lies on a border may fall to either side, which
    # moves it by 1/127 of its group's largest.
    assert distance(model, Decoder(model), rows=3, steps=8) < 5e-2


def test_threads_and_neighbours_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "_BYTES_PER_THREAD", 1)
    model = built(BASE)
    reader, ids = Decoder(model), torch.randint(257, (40, 6))
    before = torch.get_num_threads()
    found: list[Tensor] = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            state, logits = None, torch.empty(0)
            for step in ids:
                logits, state = reader.step(step, state)
            found.append(logits)
    finally:
        torch.set_num_threads(before)
    state, alone = None, torch.empty(0)
    for step in ids:
        alone, state = reader.step(step[2:3], state)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0][2:3], alone)


def test_a_state_is_a_value() -> None:
    """Each of a row of states is kept and still says what it said; any can be continued again."""
    model = built(BASE)
    reader, ids = Decoder(model), torch.randint(257, (2, 200))
    with torch.inference_mode():
        _, state = model(ids[:, :3], lengths=torch.tensor([3, 1]))
        kept: list[tuple[ModelState, list[Tensor]]] = []
        for at in range(3, 150):
            kept.append((state, [tensor.clone() for tensor in state.tensors()]))
            _, state = reader.step(ids[:, at], state)
        for earlier, copies in kept:
            lengths = earlier.lengths.tolist()
            for tensor, copy in zip(earlier.tensors(), copies, strict=True):
                if tensor.ndim == 4 or not tensor.shape[1] or tensor.shape[1] < 4:
                    assert torch.equal(tensor, copy)
                    continue
                for row, length in enumerate(lengths):  # a shorter row's padding is nobody's
                    assert torch.equal(tensor[row, :length], copy[row, :length])
        for at in (146, 70, 69, 70):
            earlier = kept[at][0]
            wanted, _ = model(ids[:, :1], earlier)
            got, after = reader.step(ids[:, 0], earlier)
            again, _ = reader.step(ids[:, 1], after)
            further, _ = model(ids[:, 1:2], model(ids[:, :1], earlier)[1])
            # fp32, as above
            torch.testing.assert_close(got, wanted[:, 0], rtol=0, atol=1e-4)
            torch.testing.assert_close(again, further[:, 0], rtol=0, atol=1e-4)


def test_two_texts_in_turn_append_in_place() -> None:
    reader = Decoder(built(replace(BASE, mla_every=1)))
    states: list[ModelState | None] = [None, None]
    where: list[set[int]] = [set(), set()]
    for _ in range(60):
        for text in (0, 1):
            _, state = reader.step(torch.tensor([5]), states[text])
            states[text] = state
            where[text].add(next(state.tensors()).data_ptr())
    assert [len(places) for places in where] == [1, 1]


def test_selected_rows_go_on() -> None:
    model = built(BASE)
    reader, ids = Decoder(model), torch.randint(257, (3, 30))
    _, state = reader.step(ids[:, 0])
    for at in range(1, 20):
        _, state = reader.step(ids[:, at], state)
    rows = torch.tensor([2, 0, 2])
    got, _ = reader.step(ids[rows, 20], state.select(rows))
    with torch.inference_mode():
        wanted, _ = model(ids[rows, :21])
    torch.testing.assert_close(got, wanted[:, -1], rtol=0, atol=1e-4)  # fp32, as above


def test_the_same_text() -> None:
    """Greedy: the most likely token, each time, by the decoder and by the model itself."""
    model = tiny_model()
    prompts = ["a", "the quick brown fox"]
    ours = generate(model, ByteTokenizer(), prompts, max_tokens=80, temperature=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deltamoe.model.decoder.Decoder", _refuse)
        theirs = generate(model, ByteTokenizer(), prompts, max_tokens=80, temperature=0.0)
    assert [text.ids for text in ours] == [text.ids for text in theirs]


def _refuse(model: HybridLM) -> Decoder:
    raise UnsupportedError("the test says so")


def test_what_it_cannot_read_is_left_to_the_model(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(torch.float64)
    with pytest.raises(UnsupportedError, match=r"torch\.float64"):
        Decoder(model)
    with caplog.at_level(logging.INFO, "deltamoe"), torch.inference_mode():
        logits, state = token_reader(model)(torch.tensor([1, 2]), model.initial_state(2))
        wanted, _ = model(torch.tensor([[1], [2]]))
    assert "torch.float64" in caplog.text
    assert state.lengths.tolist() == [1, 1]
    torch.testing.assert_close(logits, wanted[:, -1])


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda name: "no C++ compiler was found")
    with pytest.raises(UnsupportedError, match=r"no C\+\+ compiler"):
        Decoder(tiny_model())


def test_wrong_arguments() -> None:
    reader = Decoder(tiny_model())
    for wrong in (-1, 257):
        with pytest.raises(ValueError, match="257 entries"):
            reader.step(torch.tensor([3, wrong]))
    _, state = reader.step(torch.tensor([3, 4]))
    with pytest.raises(ValueError, match="2 rows"):
        reader.step(torch.tensor([3]), state)
    empty, _ = reader.step(torch.empty(0, dtype=torch.int64))
    assert empty.shape == (0, 257)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_memory_stays() -> None:
    """The short form of 10,000 steps: KDA alone, whose state does not grow, and a row restarted."""

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    model = built(BASE)
    reader, state = Decoder(model), None

    def steps(count: int) -> None:
        nonlocal state
        for at in range(count):
            _, state = reader.step(torch.tensor([at % 257]), None if at % 100 == 0 else state)

    steps(500)
    before = resident()
    steps(2000)
    # one state takes 10 kB: a leak of one a step would be 20 MB
    assert resident() - before < 2_000_000
