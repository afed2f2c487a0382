"""The decoder answers what the model answers, keeps states as values, and leaks nothing."""

import gc
import logging
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltamoe.config.model import ModelConfig
from deltamoe.inference import generate
from deltamoe.model import (
    Decoder,
    HybridLM,
    KdaState,
    MlaState,
    ModelState,
    PooledState,
    decoder,
    token_reader,
)
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
    "whole tiles": replace(
        BASE,
        dim=96,
        kda=replace(KDA, key_dim=16, value_dim=32),
        mla=replace(MLA, latent_dim=64, nope_dim=16, rope_dim=32, value_dim=32),
        moe=replace(MOE, num_experts=16, expert_dim=64),
    ),
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


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 9])
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


@pytest.mark.parametrize("name", ["as it is", "whole tiles"])
def test_bf16(name: str) -> None:
    """Against the same rounded weights in fp32: only states are rounded, to 8 bits' precision."""
    config = replace(VARIANTS[name], moe=replace(MOE, experts_per_token=5))  # no choice to tip over
    model = built(config, torch.bfloat16)
    wide = built(config, torch.bfloat16).float()
    # the worst of some ten thousand numbers: 0.010 to 0.030 over 17 draws of tokens and weights
    assert distance(model, Decoder(model), rows=3, steps=12, peer=wide) < 5e-2


@pytest.mark.parametrize("rows", [1, 5, 6, 16, 17, 33])
def test_bf16_weights_are_all_that_is_rounded(rows: int) -> None:
    """Whatever the rows, which fill tiles' columns or not: KDA's memory is fp32."""
    tiles = VARIANTS["whole tiles"]
    config = replace(tiles, kda=replace(tiles.kda, conv_size=0), mla_every=0, mla_last=False)
    model = built(config, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):  # fp32 in files too; the decoder keeps its exponential
            parameter.data = parameter.data.float()
    wide = deepcopy(model).float()
    # as for fp32 weights: 1e-6 was measured
    assert distance(model, Decoder(model), rows=rows, steps=3, peer=wide) < 3e-5


# Few heads, whose parts fill one tile, or more; in one group of sums or in two.
@pytest.mark.parametrize(("heads", "rope"), [(3, 32), (1, 32), (5, 0), (6, 32), (17, 48), (32, 6)])
def test_a_long_past_in_bf16(heads: int, rope: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents are rounded in the cache, and nowhere else; so the peer rounds its newest."""
    tiles = VARIANTS["whole tiles"]
    assert tiles.mla is not None
    mla = replace(tiles.mla, num_heads=heads, rope_dim=rope)
    model = built(replace(tiles, mla_every=1, num_layers=1, mla=mla), torch.bfloat16)
    wide = deepcopy(model).float()
    ids = torch.randint(257, (2, 1200))
    mixer: Any = wide.blocks[0].mixer
    exact = mixer.inputs

    def rounded(*args: Any, **options: Any) -> Any:
        found = exact(*args, **options)
        latent, rope_key = (x.bfloat16().float() for x in (found.latent, found.rope_key))
        return found._replace(latent=latent, rope_key=rope_key)

    monkeypatch.setattr(mixer, "inputs", rounded)
    with torch.inference_mode():
        _, state = model(ids[:, :-1])
        layers = tuple(MlaState(*(part.float() for part in layer)) for layer in state.layers)
        wanted, _ = wide(ids[:, -1:], ModelState(layers, state.lengths))
        got, _ = Decoder(model).step(ids[:, -1], state)
    # fp32 sums over 1,200 tokens: 1e-6 was measured
    assert float((got - wanted[:, 0]).abs().max() / wanted.abs().max()) < 1e-5


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


@pytest.mark.parametrize("precision", ["f32", "bf16", "8 bits", "4 bits"])
@pytest.mark.parametrize("name", ["as it is", "query bottleneck", "wider", "whole tiles"])
def test_threads_and_neighbours_change_no_bit(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "_BYTES_PER_THREAD", 1)
    model = built(VARIANTS[name], torch.float32 if precision == "f32" else torch.bfloat16)
    if precision.endswith("bits"):
        quantize_model(model, int(precision[0]))  # type: ignore[arg-type]
    # 15 rows: passes of 7 and 8 over a tile, and enough for the threads to share what is small
    reader, ids = Decoder(model), torch.randint(257, (20, 15))
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


def pool_for(
    model: HybridLM, *, num_slots: int, num_pages: int, page_tokens: int, filled_with: float
) -> PooledState:
    """Slots and pages, of which a layer has every third, as where several layers share memory."""

    def room(count: int, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.full((count, 3, *shape), filled_with, dtype=dtype)[:, 1]

    def layer(one: KdaState | MlaState) -> KdaState | MlaState:
        if isinstance(one, KdaState):
            conv, memory = (room(num_slots, *part.shape[1:], dtype=part.dtype) for part in one)
            return KdaState(conv, memory)
        latent, rope_key = (
            room(num_pages, page_tokens, part.shape[2], dtype=part.dtype) for part in one
        )
        return MlaState(latent, rope_key)

    return PooledState(tuple(map(layer, model.initial_state(1).layers)))


class Residents:
    """Texts in a pool: each takes a slot and, as it grows, pages that are free, in no order."""

    def __init__(self, model: HybridLM, page_tokens: int) -> None:
        num_slots, num_pages = 7, 6 * (40 // page_tokens + 1)
        # what others left behind: it must be neither read nor needed
        self.pool = pool_for(
            model,
            num_slots=num_slots,
            num_pages=num_pages,
            page_tokens=page_tokens,
            filled_with=torch.nan,
        )
        self.page_tokens = page_tokens
        self.free_slots = torch.randperm(num_slots).tolist()
        self.free_pages = torch.randperm(num_pages).tolist()
        self.texts: dict[str, tuple[int, list[int], int]] = {}  # slot, pages, length

    def join(self, name: str) -> None:
        slot = self.free_slots.pop()
        for layer in self.pool.layers:
            if isinstance(layer, KdaState):
                for part in layer:
                    part[slot] = 0
        self.texts[name] = (slot, [], 0)

    def leave(self, name: str) -> None:
        slot, pages, _ = self.texts.pop(name)
        self.free_slots.insert(0, slot)
        self.free_pages[:0] = pages

    def step(self, reader: Decoder, ids: dict[str, int]) -> dict[str, Tensor]:
        for name in ids:
            slot, pages, length = self.texts[name]
            if length == len(pages) * self.page_tokens:
                pages.append(self.free_pages.pop())
        rows = [self.texts[name] for name in ids]
        table = torch.full((len(rows), 1 + max(len(pages) for _, pages, _ in rows)), -1)
        for row, (_, pages, _) in enumerate(rows):
            table[row, : len(pages)] = torch.tensor(pages)
        logits = reader.step_in_pool(
            torch.tensor(list(ids.values())),
            torch.tensor([length for _, _, length in rows]),
            self.pool,
            torch.tensor([slot for slot, _, _ in rows]),
            table,
        )
        for name, (slot, pages, length) in zip(ids, rows, strict=True):
            self.texts[name] = (slot, pages, length + 1)
        return dict(zip(ids, logits, strict=True))


@pytest.mark.parametrize("page_tokens", [1, 3, 64])
@pytest.mark.parametrize(
    "name", ["as it is", "no convolution", "whole vectors", "rotated keys", "all KDA", "all MLA"]
)
def test_in_a_pool_as_alone(name: str, page_tokens: int) -> None:
    """Texts join, leave and pause, whatever their neighbours: each reads as if it were alone."""
    model = built(VARIANTS[name])
    reader, residents = Decoder(model), Residents(model, page_tokens)
    states: dict[str, ModelState | None] = {}
    for at in range(40):
        joined = {0: "a", 3: "b", 4: "c", 20: "d", 21: "e"}.get(at)
        left = {15: "b", 18: "a"}.get(at)
        if joined:
            residents.join(joined)
            states[joined] = None
        if left:
            residents.leave(left)
            del states[left]
        there = [sorted(states)[i] for i in torch.randperm(len(states))[: 1 + at % 4]]
        ids = {text: int(torch.randint(257, ())) for text in there}
        got = residents.step(reader, ids)
        for text, id_ in ids.items():
            wanted, states[text] = reader.step(torch.tensor([id_]), states[text])
            assert torch.equal(got[text], wanted[0])
    for text, state in states.items():
        slot, _, length = residents.texts[text]
        assert state is not None
        assert state.lengths.tolist() == [length]
        for layer, pooled in zip(state.layers, residents.pool.layers, strict=True):
            if isinstance(layer, KdaState):
                for part, room in zip(layer, pooled, strict=True):
                    assert torch.equal(part[0], room[slot])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_tokens", [24, 64])
def test_long_texts_in_a_pool_as_alone(page_tokens: int, dtype: torch.dtype) -> None:
    """Stretches of several blocks, which begin and end anywhere in a page."""
    model = built(replace(VARIANTS["whole tiles"], mla_every=1, num_layers=2), dtype)
    reader, past, count = Decoder(model), 1100, 1102 // page_tokens + 1
    _, state = model(torch.randint(257, (1, past)))
    pages = torch.randperm(count)
    pool = pool_for(
        model, num_slots=1, num_pages=count, page_tokens=page_tokens, filled_with=torch.nan
    )
    at = torch.arange(past)
    for layer, room in zip(state.layers, pool.layers, strict=True):
        for part, pooled in zip(layer, room, strict=True):
            pooled[pages[at // page_tokens], at % page_tokens] = part[0]
    slot = torch.zeros(1, dtype=torch.int64)
    for id_ in torch.tensor([[3], [5]]):
        wanted, after = reader.step(id_, state)
        assert torch.equal(reader.step_in_pool(id_, state.lengths, pool, slot, pages[None]), wanted)
        state = after


@pytest.mark.parametrize("precision", ["bf16", "8 bits", "4 bits"])
def test_in_a_pool_at_other_precisions(precision: str) -> None:
    model = built(BASE, torch.bfloat16)
    if precision != "bf16":
        quantize_model(model, int(precision[0]))  # type: ignore[arg-type]
    reader, residents = Decoder(model), Residents(model, page_tokens=3)
    state, logits = None, torch.empty(0)
    for name in "ab":
        residents.join(name)
    for ids in torch.randint(257, (20, 2)):
        logits, state = reader.step(ids, state)
        got = residents.step(reader, dict(zip("ba", ids.tolist(), strict=True)))
        assert torch.equal(logits, torch.stack([got["b"], got["a"]]))


def test_a_pool_is_refused_where_it_does_not_fit() -> None:
    model = built(BASE)
    reader = Decoder(model)
    pool = pool_for(model, num_slots=3, num_pages=4, page_tokens=2, filled_with=0.0)

    def step(
        ids: tuple[int, ...] = (1, 2),
        lengths: tuple[int, ...] = (0, 2),
        slots: tuple[int, ...] = (0, 2),
        pages: tuple[tuple[int, ...], ...] = ((3, 9), (1, 0)),
        state: PooledState = pool,
    ) -> Tensor:
        rows = (torch.tensor(part) for part in (ids, lengths, slots, pages))
        return reader.step_in_pool(next(rows), next(rows), state, next(rows), next(rows))

    assert step().shape == (2, 257)
    none = torch.empty(0, dtype=torch.int64)
    assert reader.step_in_pool(none, none, pool, none, none[:, None]).shape == (0, 257)
    with pytest.raises(ValueError, match="257 entries"):
        step(ids=(1, 257))
    with pytest.raises(ValueError, match="none below 0"):
        step(lengths=(0, -1))
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"slots: torch\.int32 \(1,\); expected int64"):
        reader.step_in_pool(one, one, pool, one.int(), one[:, None])
    for slots in ((0, 3), (-1, 0)):
        with pytest.raises(ValueError, match="the pool has 3"):
            step(slots=slots)
    with pytest.raises(ValueError, match="one of its own"):
        step(slots=(1, 1))
    for pages in (((4, 0), (1, 0)), ((3, 9), (-1, 0))):
        with pytest.raises(ValueError, match="the pool has 4"):
            step(pages=pages)
    with pytest.raises(ValueError, match="a row has read 4 and reads one more"):
        step(lengths=(0, 4))
    for pages in (((0, 9), (1, 0)), ((1, 9), (1, 0)), ((3, 9), (0, 0))):
        with pytest.raises(ValueError, match="no other row reads or writes"):
            step(pages=pages)
    kda, mla = pool.layers[0], pool.layers[-1]
    assert isinstance(kda, KdaState)
    assert isinstance(mla, MlaState)
    for layers, what in {
        pool.layers[1:]: "the pool has 3 layers; the model has 4",
        (mla, *pool.layers[1:]): "layer 0: it is MlaState, not KdaState",
        (kda._replace(memory=kda.memory.double()), *pool.layers[1:]): "layer 0: torch.float64",
        (kda._replace(conv=kda.conv[:2]), *pool.layers[1:]): "layer 0: .* expected torch.float32",
        (kda._replace(memory=kda.memory.mT), *pool.layers[1:]): "in one piece",
        (kda._replace(memory=kda.memory[:1].expand(3, -1, -1, -1)), *pool.layers[1:]): "strides",
        (*pool.layers[:-1], mla._replace(latent=mla.latent[:, :, 1:])): "layer 3: ",
    }.items():
        with pytest.raises(ValueError, match=what):
            step(state=PooledState(layers))


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
