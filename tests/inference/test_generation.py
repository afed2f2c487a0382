import pytest
import torch

from deltamoe.errors import ConfigError, NonFiniteError
from deltamoe.inference.generation import Decoding, generate, stream
from deltamoe.inference.sampler import Sampler
from deltamoe.testing import tiny_model
from deltamoe.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
PROMPTS = ["", "a", "The quick brown fox", "日本"]


@pytest.fixture(scope="module")
def model():
    # fp64, so that rounding cannot decide which token is drawn; two layers are one KDA, one MLA
    return tiny_model(torch.float64, num_layers=2)


@pytest.fixture
def scripted(monkeypatch):
    """Make every row draw the bytes of a text, then the border, whatever the model says."""

    def script(text):
        ids = [*text.encode(), TOKENIZER.end_id]
        position = iter(range(len(ids)))
        monkeypatch.setattr(
            Sampler,
            "sample",
            lambda self, logits, *_: torch.full((len(logits),), ids[next(position)]),
        )

    return script


def by_definition(model, prompt, num_tokens, **sampling):
    """Read the whole text again for every token: slow, without states, one row."""
    sampler = Sampler(**sampling)
    generator, ids = sampler.generator(prompt), []
    prompt_ids = TOKENIZER.encode(prompt)
    while len(ids) < num_tokens:
        with torch.no_grad():
            logits, _ = model(torch.tensor([[TOKENIZER.end_id, *prompt_ids, *ids]]))
        seen = torch.zeros(1, TOKENIZER.vocab_size, dtype=torch.bool)
        seen[0, prompt_ids + ids] = True
        token_id = int(sampler.sample(logits[:, -1, : TOKENIZER.vocab_size], seen, [generator]))
        if token_id == TOKENIZER.end_id:
            break
        ids.append(token_id)
    return tuple(ids)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 0.7, "seed": 3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_a_batch_is_each_prompt_alone_is_the_definition(model, sampling):
    together = generate(model, TOKENIZER, PROMPTS, max_tokens=5, **sampling)
    for prompt, generation in zip(PROMPTS, together, strict=True):
        assert generation == generate(model, TOKENIZER, prompt, max_tokens=5, **sampling)
        assert generation.prompt == prompt
        assert generation.ids == by_definition(model, prompt, 5, **sampling)
        assert generation.text == TOKENIZER.decode(generation.ids)


def test_rows_that_end_early_do_not_disturb_the_others(model):
    # the stop strings are bytes that some rows draw early and others do not
    alone = generate(model, TOKENIZER, PROMPTS, max_tokens=12, temperature=1.0)
    stop = [generation.text[3] for generation in alone[:2]]
    options = {"max_tokens": 12, "temperature": 1.0, "stop": stop}
    together = generate(model, TOKENIZER, PROMPTS, **options)
    assert len({len(generation.ids) for generation in together}) > 1
    for prompt, generation in zip(PROMPTS, together, strict=True):
        assert generation == generate(model, TOKENIZER, prompt, **options)


@pytest.mark.parametrize("prefill_chunk", [1, 3, 16])
def test_the_size_of_prefill_chunks_changes_nothing(model, prefill_chunk):
    options = {"max_tokens": 3, "temperature": 1.0}
    expected = generate(model, TOKENIZER, PROMPTS, **options)
    assert generate(model, TOKENIZER, PROMPTS, prefill_chunk=prefill_chunk, **options) == expected


@pytest.mark.parametrize("stop", [(), ("e",)])
def test_the_stream_is_the_text(model, stop):
    for prompt in PROMPTS[1:3]:
        options = {"max_tokens": 12, "temperature": 1.0, "stop": stop}
        pieces = list(stream(model, TOKENIZER, prompt, **options))
        assert all(pieces)
        assert "".join(pieces) == generate(model, TOKENIZER, prompt, **options).text


def test_the_seed_decides(model):
    texts = {
        generate(model, TOKENIZER, "x", max_tokens=10, temperature=1.0, seed=seed).ids
        for seed in (1, 2, 3, 1)
    }
    assert len(texts) == 3


def test_generation_may_be_cut_anywhere(model):
    whole = generate(model, TOKENIZER, "The fox", max_tokens=12, temperature=0.0)
    first = generate(model, TOKENIZER, "The fox", max_tokens=5, temperature=0.0)
    rest = generate(model, TOKENIZER, "", max_tokens=7, temperature=0.0, state=first.state)
    assert first.ids + rest.ids == whole.ids
    assert rest.state.num_tokens == whole.state.num_tokens == 1 + len("The fox") + 12


def test_a_state_continues_as_if_the_prompt_were_one(model):
    read = generate(model, TOKENIZER, "The quick", max_tokens=0)
    assert (read.text, read.ids, read.finish_reason) == ("", (), "length")
    endings = [" brown fox", " red", ""]
    continued = generate(model, TOKENIZER, endings, max_tokens=8, temperature=0.0, state=read.state)
    for ending, generation in zip(endings, continued, strict=True):
        whole = generate(model, TOKENIZER, "The quick" + ending, max_tokens=8, temperature=0.0)
        assert generation.ids == whole.ids


def test_a_state_is_never_modified(model):
    state = generate(model, TOKENIZER, "The quick", max_tokens=0).state
    before = [tensor.clone() for tensor in state.state.tensors()]
    generate(model, TOKENIZER, " brown", max_tokens=5, state=state)
    assert all(map(torch.equal, before, state.state.tensors()))


def test_the_border_finishes_and_the_text_can_go_on(model, scripted):
    scripted("abc")
    generation = generate(model, TOKENIZER, "x", max_tokens=10)
    assert (generation.text, generation.finish_reason) == ("abc", "end")
    assert generation.ids == tuple(b"abc")
    # the border was drawn, not read: the state stands behind "xab", with "c" to come
    assert generation.state.num_tokens == 1 + len("xabc")
    assert generation.state.unread == (ord("c"),)


def test_a_stop_string_finishes(model, scripted):
    scripted("yes\nUser: no")
    generation = generate(model, TOKENIZER, "x", max_tokens=100, stop=["\nUser:"])
    assert (generation.text, generation.finish_reason) == ("yes", "stop")
    assert bytes(generation.ids) == b"yes\nUser:"


def test_split_characters_stream_whole(model, scripted):
    scripted("a🙂b")
    assert list(stream(model, TOKENIZER, "x", max_tokens=100)) == ["a", "🙂", "b"]


def test_rows_that_pad_the_vocabulary_are_never_drawn():
    model = tiny_model(vocab_size=300, num_layers=2)
    with torch.no_grad():
        model.head.weight[257:] = 1e3 * model.head.weight[:43]  # by far the largest logits
    ids = {
        token_id
        for seed in range(3)
        for token_id in generate(model, TOKENIZER, "x", max_tokens=8, seed=seed).ids
    }
    assert ids
    assert max(ids) < TOKENIZER.vocab_size


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(ConfigError, match="do not belong together"):
        generate(tiny_model(vocab_size=256), TOKENIZER, "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": -1}, "max_tokens = -1"),
        ({"prefill_chunk": 0}, "prefill_chunk = 0"),
        ({"stop": [""]}, "stop = ''"),
        ({"top_p": 2.0}, "top_p = 2.0"),
    ],
)
def test_wrong_options_are_named_at_once(model, options, message):
    with pytest.raises(ConfigError, match=message):
        stream(model, TOKENIZER, "x", **options)


def test_no_prompts_no_texts(model):
    assert generate(model, TOKENIZER, []) == []


def test_damaged_weights_are_reported():
    model = tiny_model(num_layers=2)
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(NonFiniteError):
        generate(model, TOKENIZER, "x", max_tokens=1)


def test_the_model_is_left_as_it_was(model):
    model.train()
    generate(model, TOKENIZER, "x", max_tokens=2)
    assert model.training
    model.eval()
    pieces = stream(model, TOKENIZER, "x", max_tokens=9, temperature=1.0)
    next(pieces)
    assert not torch.is_inference_mode_enabled()
    assert not model.training


def test_an_unfinished_row_can_be_put_aside(model):
    decoding = Decoding(model, TOKENIZER, ["one", "three"], max_tokens=7, temperature=0.0)
    for _ in range(4):
        decoding.step()
    for row in range(2):
        generation = decoding.generation(row)
        assert len(generation.ids) == 4
        rest = generate(model, TOKENIZER, "", max_tokens=3, temperature=0.0, state=generation.state)
        whole = generate(model, TOKENIZER, generation.prompt, max_tokens=7, temperature=0.0)
        assert generation.ids + rest.ids == whole.ids


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 50.0},
        {"temperature": 50.0, "top_k": 250, "top_p": 0.99, "min_p": 1e-9},
    ],
)
def test_ids_that_stand_for_nothing_are_never_chosen(sampling):
    """Whatever the model likes best: neither holes of the vocabulary nor rows beyond it."""

    class WithHoles(ByteTokenizer):
        unused_ids = tuple(range(100, 256))

    model = tiny_model(num_layers=2, vocab_size=300)
    with torch.no_grad():
        model.head.weight[100:256] *= 50
        model.head.weight[257:] *= 50
    tokenizer = WithHoles()
    for generation in generate(model, tokenizer, PROMPTS, max_tokens=12, **sampling):
        assert all(token_id < 100 for token_id in generation.ids)
    free = generate(model, ByteTokenizer(), PROMPTS, max_tokens=12, **sampling)
    assert any(token_id >= 100 for generation in free for token_id in generation.ids)


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused():
    model = tiny_model(num_layers=2, vocab_size=256)
    with pytest.raises(ConfigError, match=r"257 ids, the model's\s+vocabulary 256"):
        generate(model, TOKENIZER, "x")
