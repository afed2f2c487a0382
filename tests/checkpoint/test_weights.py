"""From a folder to a model: the same function, or an error that names what is wrong."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltamoe.checkpoint import (
    load,
    open_checkpoint,
    read_header,
    step_folder,
    write_checkpoint,
    write_tensors,
)
from deltamoe.config.model import ModelConfig
from deltamoe.config.parse import to_json
from deltamoe.config.run import RunConfig
from deltamoe.errors import CheckpointError
from deltamoe.model import HybridLM
from deltamoe.plan import weights
from deltamoe.testing import tiny_config, tiny_model

Save = Callable[..., Path]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def save(run: Path) -> Save:
    """Write tensors (a model's, or made up) and a configuration as one checkpoint."""

    def write(tensors: dict[str, Tensor], config: ModelConfig | None = None, step: int = 1) -> Path:
        files = {
            "model.safetensors": lambda path: write_tensors(path, tensors),
            "config.json": lambda path: path.write_text(
                to_json(RunConfig(model=config or tiny_config()))
            ),
        }
        return write_checkpoint(run, step, files, expected_bytes=1_000_000).path

    return write


def logits(model: HybridLM) -> Tensor:
    with torch.no_grad():
        return model(IDS)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loaded_model_is_the_saved_one(dtype: torch.dtype, run: Path, save: Save) -> None:
    model = tiny_model(dtype)
    folder = save(model.state_dict())
    for path in (run, str(run), folder, open_checkpoint(folder)):
        loaded = load(path)
        assert not loaded.training
        assert loaded.config == model.config
        assert torch.equal(logits(loaded), logits(model))
        assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_every_kind_of_model(save: Save) -> None:
    changes = [
        {"tie_embeddings": True},
        {"mla_every": 0, "mla_last": False},
        {"moe": replace(tiny_config().moe, expert="ffn", has_balance_bias=False)},
        {"moe": replace(tiny_config().moe, has_noisy_topk=True, num_shared_experts=0)},
        {"mla": replace(tiny_config().mla, query_rank=7)},
        {"kda": replace(tiny_config().kda, conv_size=0, output_gate="none")},
    ]
    for step, change in enumerate(changes):
        model = tiny_model(**change)
        folder = save(model.state_dict(), tiny_config(**change), step)
        assert torch.equal(logits(load(folder)), logits(model)), change


def test_half_precision_keeps_the_wide_ones_wide(run: Path, save: Save) -> None:
    save(tiny_model().state_dict())
    loaded = load(run, dtype=torch.bfloat16).state_dict()
    wide = {name for name, tensor in loaded.items() if tensor.dtype == torch.float32}
    assert wide == {weight.name for weight in weights(tiny_config()) if weight.is_fp32}
    assert {name.rpartition(".")[2] for name in wide} == {"A_log", "dt_bias", "balance_bias"}
    assert {tensor.dtype for name, tensor in loaded.items() if name not in wide} == {torch.bfloat16}

    save(loaded, step=2)
    again = load(run).state_dict()
    assert all(torch.equal(again[name], loaded[name]) for name in loaded)


def test_a_wide_tensor_saved_narrow_is_refused(run: Path, save: Save) -> None:
    save(tiny_model(torch.bfloat16).state_dict())
    with pytest.raises(
        CheckpointError, match=r"(A_log|dt_bias|balance_bias)' is BF16; expected F32"
    ):
        load(run)


def change_config(folder: Path, **changes: object) -> None:
    """Edit config.json and hide the traces in the manifest: the tensors must tell."""
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data["model"] |= changes
    content = {p.name: p.read_bytes() for p in folder.iterdir()} | {
        "config.json": json.dumps(data).encode()
    }
    del content["manifest.json"]
    files = {
        name: lambda path, value=value: path.write_bytes(value) for name, value in content.items()
    }
    write_checkpoint(folder.parent.parent, 1, files, expected_bytes=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 32}, r"shape \[257, 24\]; expected \[257, 32\]"),
        ({"num_layers": 3}, r"blocks\.2\.mixer"),
        ({"num_layers": 5}, r"'blocks\.3\.|'blocks\.4\."),
        ({"tie_embeddings": True}, r"'head\.weight'"),
        ({"first_dense_layers": 0}, r"'blocks\.0\.channel"),
        ({"vocab_size": 2**24, "dim": 2**24}, r"expected \[16777216, 16777216\]"),
        ({"num_layers": 10**15}, "num_layers"),
    ],
)
def test_a_config_that_disagrees_is_refused_before_building(
    change: dict, message: str, run: Path, save: Save
) -> None:
    change_config(save(tiny_model().state_dict()), **change)
    with pytest.raises(CheckpointError, match=message):
        load(run)


def test_nan_is_refused(run: Path, save: Save) -> None:
    tensors = tiny_model().state_dict()
    tensors["blocks.2.channel.experts.w_up"][1, 2, 3] = torch.nan
    save(tensors)
    with pytest.raises(CheckpointError, match=r"blocks\.2\.channel\.experts\.w_up"):
        load(run)


def test_integer_weights_are_refused(run: Path, save: Save) -> None:
    save({name: tensor.to(torch.int8) for name, tensor in tiny_model().state_dict().items()})
    with pytest.raises(CheckpointError, match=r"'embedding\.weight' is I8"):
        load(run)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_checkpoint_without_a_model(name: str, run: Path) -> None:
    files = {
        "model.safetensors": lambda path: path.touch(),
        "config.json": lambda path: path.write_text(to_json(RunConfig(model=tiny_config()))),
    }
    del files[name]
    write_checkpoint(run, 1, files, expected_bytes=0)
    with pytest.raises(CheckpointError, match=f"holds no {name}"):
        load(step_folder(run, 1))


def test_the_weights_cost_no_copy(run: Path, save: Save) -> None:
    """They are views of the mapped file: they lie in memory as they lie in the file."""
    folder = save(tiny_model().state_dict())
    header = read_header(folder / "model.safetensors")
    places = {name: tensor.data_ptr() for name, tensor in load(folder).state_dict().items()}
    start = min(places.values())
    assert {name: place - start for name, place in places.items()} == {
        name: info.begin for name, info in header.tensors.items()
    }
