"""Weights out of a published folder: each in its place, in the dtype that was asked for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import deltamoe
from deltamoe.checkpoint.published import open_published
from deltamoe.checkpoint.published.weights import read_model
from deltamoe.checkpoint.tensors import map_tensor
from deltamoe.conversion import open_source, write_hf
from deltamoe.model import HybridLM
from deltamoe.plan import weights
from tests.saved_model import drawn_model, publishable_config, save_model

IDS = torch.arange(20)[None]


@pytest.fixture
def model() -> HybridLM:
    return drawn_model(publishable_config())


@pytest.fixture
def folder(model: HybridLM, tmp_path: Path) -> Path:
    write_hf(open_source(save_model(tmp_path, model)), tmp_path / "hf")
    return tmp_path / "hf"


def logits(model: HybridLM) -> Tensor:
    with torch.no_grad():
        return model(IDS)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_is_chosen_and_the_wide_ones_stay_wide(
    model: HybridLM, folder: Path, dtype: torch.dtype
) -> None:
    loaded = deltamoe.load(folder, dtype=dtype)
    assert not loaded.training
    wide = torch.promote_types(dtype, torch.float32)
    tensors, expected = loaded.state_dict(), model.state_dict()
    for weight in weights(model.config):
        kept = wide if weight.is_fp32 else dtype
        assert tensors[weight.name].dtype == kept
        assert torch.equal(tensors[weight.name], expected[weight.name].to(kept)), weight.name
    assert loaded(IDS)[0].isfinite().all()


def test_the_weights_are_nobody_elses_memory(folder: Path) -> None:
    """They can be trained, and the file stays as it is."""
    before = (folder / "model.safetensors").read_bytes()
    loaded = deltamoe.load(folder)
    for parameter in loaded.parameters():
        assert parameter.requires_grad
        parameter.data.fill_(1.0)
    assert (folder / "model.safetensors").read_bytes() == before


def test_the_device_is_chosen(folder: Path) -> None:
    loaded = read_model(open_published(folder), device="meta")
    assert all(tensor.is_meta for tensor in loaded.state_dict().values())


def test_a_slice_of_a_stack_is_mapped_alone(model: HybridLM, tmp_path: Path) -> None:
    checkpoint = save_model(tmp_path, model)
    header = deltamoe.checkpoint.read_header(checkpoint / "model.safetensors")
    name = "blocks.1.channel.experts.w_down"
    stack = model.state_dict()[name]
    for expert in range(5):
        assert torch.equal(map_tensor(header, name, index=expert), stack[expert])
    assert torch.equal(map_tensor(header, name), stack)


def test_the_latents_norm_has_the_models_epsilon_unless_told_otherwise(folder: Path) -> None:
    """The released code, and transformers, use 1e-6; the others rms_norm_eps."""
    opened = open_published(folder)
    assert opened.config.mla is not None
    assert opened.config.mla.latent_norm_eps is None
    plain = read_model(opened)
    mla = replace(opened.config.mla, latent_norm_eps=1e-6)
    other = read_model(replace(opened, config=replace(opened.config, mla=mla)))
    norms = [m.blocks[3].mixer.latent_norm.eps for m in (plain, other)]
    assert norms == [opened.config.norm_eps, 1e-6] == [1e-5, 1e-6]
    assert plain.blocks[3].mixer_norm.eps == other.blocks[3].mixer_norm.eps == 1e-5
    assert not torch.equal(logits(plain), logits(other))


def test_the_bias_never_weighs_unless_told_otherwise(folder: Path) -> None:
    """The released code weighs with it; the paper and every other reader do not."""
    opened = open_published(folder)
    assert opened.config.moe is not None
    assert not opened.config.moe.has_biased_weights
    moe = replace(opened.config.moe, has_biased_weights=True)
    plain = read_model(opened)
    other = read_model(replace(opened, config=replace(opened.config, moe=moe)))
    assert not torch.equal(logits(plain), logits(other))
    for model in (plain, other):  # without a bias the two are one
        for name, tensor in model.state_dict().items():
            if name.endswith("balance_bias"):
                tensor.zero_()
    assert torch.equal(logits(plain), logits(other))
