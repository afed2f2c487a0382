import json

import pytest
import torch

from deltamoe.errors import BackendUnavailableError, CheckpointError, ConfigError
from deltamoe.inference.generation import generate
from deltamoe.inference.opened import open_model
from deltamoe.tokenizer import ChatTemplate
from tests.published_folder import save_published_folder
from tests.saved_run import save_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("open"))


def test_a_run_and_its_step_open_alike(run):
    opened = open_model(run, device="cpu")
    again = open_model(run / "checkpoints" / "step-3", device="cpu")
    assert opened.checkpoint.step == again.checkpoint.step == 3
    assert opened.config == again.config
    assert opened.tokenizer.name == "bytes"
    assert not opened.model.training
    texts = [generate(o.model, o.tokenizer, "def", max_tokens=5) for o in (opened, again)]
    assert texts[0] == texts[1]


def test_what_is_known_of_the_model(run):
    opened = open_model(run, device="cpu")
    assert opened.validation_bits_per_byte == 7.5
    parameters = sum(parameter.numel() for parameter in opened.model.parameters())
    assert opened.num_parameters == parameters + 5  # one balance bias for each expert


def test_a_run_that_did_not_validate(tmp_path):
    run = save_run(tmp_path)
    opened = open_model(run, device="cpu")
    opened.checkpoint.file("train_state.json").write_text(json.dumps({"record": {}}))
    assert opened.validation_bits_per_byte is None


def test_bf16_weights_keep_the_decay_wide(run):
    model = open_model(run, device="cpu", dtype="bf16").model
    assert model.embedding.weight.dtype == torch.bfloat16
    assert model.blocks[0].mixer.A_log.dtype == torch.float32
    tokenizer = open_model(run, device="cpu").tokenizer
    assert len(generate(model, tokenizer, "def", max_tokens=5, temperature=0.0).ids) == 5


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError):
        open_model(tmp_path)


def test_devices_are_refused_in_words(run):
    with pytest.raises(ConfigError, match="'gpu': expected auto"):
        open_model(run, device="gpu")
    with pytest.raises(BackendUnavailableError, match="cuda:97"):
        open_model(run, device="cuda:97")


def test_a_published_folder_opens_as_a_run_does(tmp_path):
    folder = save_published_folder(tmp_path, chat_template=ChatTemplate(), files=3)
    opened = open_model(folder, device="cpu")
    assert opened.label == "Tiny-Instruct"
    assert opened.tokenizer.name == "tiktoken:386"
    assert opened.chat_template == ChatTemplate()
    assert opened.config.model == opened.model.config
    assert opened.validation_bits_per_byte is None
    generation = generate(opened.model, opened.tokenizer, ["a", "中文"], max_tokens=20)
    assert all(i < opened.tokenizer.vocab_size for g in generation for i in g.ids)


def test_a_base_model_has_no_turns(tmp_path, run):
    assert open_model(save_published_folder(tmp_path), device="cpu").chat_template is None
    assert open_model(run, device="cpu").chat_template is None


def test_a_tokenizer_beyond_the_embedding_is_refused_before_the_weights_are_read(
    tmp_path, monkeypatch
):
    folder = save_published_folder(tmp_path, vocab_size=380)
    monkeypatch.setattr("deltamoe.inference.opened.load", None)
    with pytest.raises(ConfigError, match="do not belong together"):
        open_model(folder, device="cpu")
