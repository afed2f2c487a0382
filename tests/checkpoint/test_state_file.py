"""A state put aside and taken up again goes on as if nothing had happened, or is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deltamoe.checkpoint import load_state, read_header, read_tensors, save_state, write_tensors
from deltamoe.checkpoint.durable import replace_file
from deltamoe.errors import CheckpointError
from deltamoe.model import MlaState
from deltamoe.testing import tiny_config, tiny_model

CONFIG = tiny_config()
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def state_after(ids: torch.Tensor, dtype: torch.dtype = torch.float32, lengths=None):
    model = tiny_model(dtype)
    with torch.no_grad():
        return model, model(ids, lengths=lengths)[1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 4])], ids=["even", "ragged"])
def test_going_on_is_the_same(dtype: torch.dtype, lengths: torch.Tensor, path: Path) -> None:
    model, state = state_after(IDS, dtype, lengths)
    save_state(path, state, config=CONFIG)
    loaded = load_state(path, config=CONFIG)
    with torch.no_grad():
        assert torch.equal(model(IDS, state)[0], model(IDS, loaded)[0])
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in state.layers]
    assert torch.equal(loaded.lengths, state.lengths)


def test_a_state_before_the_first_token(path: Path) -> None:
    state = tiny_model().initial_state(3)
    save_state(path, state, config=CONFIG)
    assert load_state(path, config=CONFIG).lengths.tolist() == [0, 0, 0]


def test_a_model_without_convolution(path: Path) -> None:
    kda = replace(CONFIG.kda, conv_size=0)
    config = tiny_config(kda=kda)
    model = tiny_model(kda=kda)
    save_state(path, model.initial_state(2), config=config)
    assert load_state(path, config=config).layers[0].conv.shape == (2, 0, config.kda.conv_channels)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny_config(kda=replace(CONFIG.kda, key_dim=9)), r"model\.kda\.key_dim = 8 there, 9"),
        (tiny_config(mla_every=2), r"model\.mla_every = 4 there, 2"),
        (tiny_config(kda=replace(CONFIG.kda, max_beta=2.0)), r"max_beta = 1\.0 there, 2\.0"),
    ],
)
def test_another_model_is_named(config, message: str, path: Path) -> None:
    save_state(path, state_after(IDS)[1], config=CONFIG)
    with pytest.raises(CheckpointError, match=message):
        load_state(path, config=config)


def test_other_weights_are_refused_if_both_are_known(path: Path) -> None:
    state = state_after(IDS)[1]
    save_state(path, state, config=CONFIG, weights_sha256="a" * 64)
    load_state(path, config=CONFIG, weights_sha256="a" * 64)
    load_state(path, config=CONFIG)
    with pytest.raises(CheckpointError, match="other weights"):
        load_state(path, config=CONFIG, weights_sha256="b" * 64)
    save_state(path, state, config=CONFIG)
    load_state(path, config=CONFIG, weights_sha256="b" * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "other"}, "expected a state that deltamoe saved"),
        ({"format": "3"}, "written by a newer deltamoe: format 3"),
        ({"format": "x"}, "\"format\" is 'x'"),
        ({"format": "9" * 5000}, '"format" is'),
        ({"config": "{"}, "not JSON"),
        ({"config": ""}, "not JSON"),
        ({"config": '{"format": 1, "dim": 3}'}, "config"),
    ],
)
def test_bad_metadata_is_refused(change: dict, message: str, path: Path) -> None:
    save_state(path, state_after(IDS)[1], config=CONFIG)
    metadata = dict(read_header(path).metadata) | change
    rewrite(path, read_tensors(path), metadata)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_state(path, config=CONFIG)
    assert str(path) in str(raised.value)


def rewrite(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    replace_file(path, lambda new: write_tensors(new, tensors, metadata))


def edit(**changes: Callable | None):
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        for name, change in changes.items():
            name = name.replace("__", ".")
            tensors[name] = change(tensors[name])

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("lengths"), "'lengths' is missing"),
        (lambda tensors: tensors.pop("layers.3.latent"), r"layers\.3\.latent"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "'extra'"),
        (edit(lengths=lambda x: x[:1]), "layers"),
        (edit(lengths=lambda x: x[0]), "lengths"),
        (edit(lengths=lambda x: -x), "negative"),
        (edit(lengths=lambda x: x + 1), "expected 6, the longest"),
        (edit(lengths=lambda x: x.int()), "'lengths' is I32; expected I64"),
        (edit(layers__0__memory=lambda x: x.bfloat16()), "memory' is BF16; expected F32"),
        (edit(layers__0__memory=lambda x: x.transpose(2, 3)), "'layers.0.memory' has shape"),
        (edit(layers__0__memory=lambda x: x / 0), "NaN or infinite"),
        (edit(layers__1__conv=lambda x: x.long()), "'layers.1.conv' is I64"),
        (edit(layers__3__latent=lambda x: x[:, :4]), r"layers\.3"),
        (edit(layers__3__latent=lambda x: x[0, 0]), r"layers\.3"),
    ],
)
def test_a_damaged_state_names_the_tensor(damage: Callable, message: str, path: Path) -> None:
    save_state(path, state_after(IDS)[1], config=CONFIG)
    metadata, tensors = dict(read_header(path).metadata), read_tensors(path)
    damage(tensors)
    rewrite(path, tensors, metadata)
    with pytest.raises(CheckpointError, match=message):
        load_state(path, config=CONFIG)


def test_a_shorter_cache_than_the_lengths_say(path: Path) -> None:
    state = state_after(IDS)[1]
    layers = [
        MlaState(*(t[:, :4] for t in x)) if isinstance(x, MlaState) else x for x in state.layers
    ]
    save_state(path, state._replace(layers=tuple(layers)), config=CONFIG)
    with pytest.raises(CheckpointError, match="holds 4 tokens; expected 5"):
        load_state(path, config=CONFIG)


def test_weights_are_no_state(path: Path) -> None:
    write_tensors(path, tiny_model().state_dict(), {"config": json.dumps({})})
    with pytest.raises(CheckpointError, match="expected a state"):
        load_state(path, config=CONFIG)
