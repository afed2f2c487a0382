import pytest
import torch

from deltamoe.errors import CheckpointError, ConfigError
from deltamoe.inference.generation import generate
from deltamoe.inference.text_state import (
    TextState,
    evaluating,
    load_text_state,
    read,
    save_text_state,
)
from deltamoe.testing import tiny_model
from deltamoe.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_layers=2)


def test_an_empty_text_begins_with_the_border():
    text = TextState.start(TOKENIZER)
    assert (text.state, text.unread, text.num_tokens, text.nbytes) == (None, (256,), 1, 0)


def test_reading_in_pieces_is_reading_at_once():
    model = tiny_model(torch.float64, num_layers=2)
    rows = [list(range(n)) for n in (0, 1, 7, 20)]
    at_once = read(model, rows)
    assert at_once.lengths.tolist() == [0, 1, 7, 20]
    for chunk in (1, 3, 16):
        pieces = read(model, rows, prefill_chunk=chunk)
        for one, other in zip(at_once.tensors(), pieces.tensors(), strict=True):
            # fp64 on both sides: only the order of sums differs
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_reading_nothing_changes_nothing(model):
    state = read(model, [[1, 2, 3]])
    again = read(model, [[]], state)
    assert all(map(torch.equal, state.tensors(), again.tensors()))


def test_a_saved_text_goes_on_as_if_never_put_aside(model, tmp_path):
    file = tmp_path / "state.safetensors"
    first = generate(model, TOKENIZER, "The fox", max_tokens=5, temperature=0.0)
    save_text_state(file, first.state, model, weights_sha256="ab" * 32)
    text = load_text_state(file, model, weights_sha256="ab" * 32)
    assert text.num_tokens == first.state.num_tokens == 1 + len("The fox") + 5
    assert text.nbytes > 0
    options = {"max_tokens": 8, "temperature": 0.0}
    expected = generate(model, TOKENIZER, " jumps", state=first.state, **options)
    assert generate(model, TOKENIZER, " jumps", state=text, **options).ids == expected.ids


def test_an_empty_text_can_be_saved(model, tmp_path):
    file = tmp_path / "state.safetensors"
    save_text_state(file, TextState.start(TOKENIZER), model)
    text = load_text_state(file, model)
    options = {"max_tokens": 8, "temperature": 0.0}
    expected = generate(model, TOKENIZER, "Hi", **options)
    assert generate(model, TOKENIZER, "Hi", state=text, **options).ids == expected.ids


def test_a_text_read_to_its_end_wants_a_prompt(model, tmp_path):
    file = tmp_path / "state.safetensors"
    save_text_state(file, TextState.start(TOKENIZER), model)
    with pytest.raises(ConfigError, match="give a prompt"):
        generate(model, TOKENIZER, "", state=load_text_state(file, model))


def test_the_state_of_another_model_is_refused(model, tmp_path):
    file = tmp_path / "state.safetensors"
    save_text_state(file, TextState.start(TOKENIZER), model, weights_sha256="ab" * 32)
    with pytest.raises(CheckpointError, match="another model"):
        load_text_state(file, tiny_model(dim=32))
    with pytest.raises(CheckpointError, match="other weights"):
        load_text_state(file, model, weights_sha256="cd" * 32)


def test_evaluating_restores_training_mode():
    model = tiny_model().train()
    with evaluating(model):
        assert not model.training
        assert torch.is_inference_mode_enabled()
    assert model.training
    with pytest.raises(ZeroDivisionError), evaluating(model):
        1 / 0  # noqa: B018
    assert model.training
    assert not torch.is_inference_mode_enabled()
