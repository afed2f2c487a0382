import json

import pytest
import torch

from deltamoe.errors import BackendUnavailableError, CheckpointError, ConfigError
from deltamoe.inference.generation import generate
from deltamoe.inference.opened import open_model
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
