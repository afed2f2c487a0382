"""Checkpoints to published folders and back: exact, streamed, whole or not at all."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import deltamoe
from deltamoe.checkpoint import find_checkpoint, open_checkpoint, read_header
from deltamoe.checkpoint.published.folder import INDEX
from deltamoe.config import MoeConfig, preset
from deltamoe.conversion import (
    Source,
    open_source,
    plan_hf,
    plan_native,
    write_hf,
    write_native,
)
from deltamoe.errors import CheckpointError, ConfigError, DoesNotFitError
from deltamoe.model import HybridLM
from deltamoe.tokenizer import ByteTokenizer, load_tokenizer
from tests.saved_model import drawn_model, publishable_config, save_model

IDS = torch.randint(0, 257, (2, 19), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_source(save_model(tmp_path, drawn_model(publishable_config())))


def assert_equal(one: HybridLM, other: HybridLM) -> None:
    assert one.config == other.config
    for name, tensor in one.state_dict().items():
        there = other.state_dict()[name]
        assert tensor.dtype == there.dtype
        assert torch.equal(tensor, there), name
    with torch.no_grad():
        assert torch.equal(one(IDS)[0], other(IDS)[0])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mla_every": 1, "kda": None},
        {"mla_every": 0, "mla": None},
        {"first_dense_layers": 4, "moe": None},
        {"mla": replace(publishable_config().mla, query_rank=7)},
        {"channels": ("moe", "mlp", "moe", "mlp"), "norm_eps": 1e-6},
        {"moe": MoeConfig(num_experts=8, experts_per_token=1, expert_dim=6, renormalize=False)},
    ],
    ids=str,
)
@pytest.mark.parametrize("file_bytes", [1 << 30, 30_000])
def test_ours_a_folder_ours_is_exact(changes: Any, file_bytes: int, tmp_path: Path) -> None:
    model = drawn_model(publishable_config(**changes))
    write_hf(open_source(save_model(tmp_path, model)), tmp_path / "hf", file_bytes=file_bytes)
    assert_equal(model, deltamoe.load(tmp_path / "hf"))
    write_native(open_source(tmp_path / "hf"), tmp_path / "back")
    assert_equal(model, deltamoe.load(tmp_path / "back"))
    write_hf(open_source(tmp_path / "back"), tmp_path / "again", file_bytes=file_bytes)
    for name, record in open_checkpoint(tmp_path / "hf").manifest.files.items():
        assert open_checkpoint(tmp_path / "again").manifest.files[name] == record, name


def test_a_run_is_its_newest_checkpoint(source: Source, tmp_path: Path) -> None:
    write_hf(open_source(tmp_path / "run"), tmp_path / "a")
    write_hf(source, tmp_path / "b")
    assert open_checkpoint(tmp_path / "a").manifest == open_checkpoint(tmp_path / "b").manifest
    assert open_checkpoint(tmp_path / "a").step == 7


def test_the_folder_is_as_others_expect_it(source: Source, tmp_path: Path) -> None:
    write_hf(source, tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["architectures"] == ["KimiLinearForCausalLM"]
    assert "auto_map" not in settings
    assert settings["eos_token_id"] == ByteTokenizer.end_id
    assert read_header(tmp_path / "hf" / "model.safetensors").metadata == {"format": "pt"}
    assert load_tokenizer(tmp_path / "hf").fingerprint == ByteTokenizer.fingerprint
    assert not list((tmp_path / "hf").glob("*.py"))
    assert (tmp_path / "hf" / "model.safetensors").stat().st_mode & 0o444 == 0o444


def test_the_index_is_as_others_expect_it(source: Source, tmp_path: Path) -> None:
    write_hf(source, tmp_path / "hf", file_bytes=30_000)
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert files == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    headers = {file: read_header(tmp_path / "hf" / file) for file in files}
    for name, file in index["weight_map"].items():
        assert name in headers[file].tensors
    sizes = [info.num_bytes for header in headers.values() for info in header.tensors.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(header.file_bytes < 30_000 + 15_000 for header in headers.values())


@pytest.mark.parametrize(("dtype", "word"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_narrow_weights_keep_the_wide_ones(
    source: Source, dtype: str, word: str, tmp_path: Path
) -> None:
    write_hf(source, tmp_path / "hf", dtype=dtype)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == word
    tensors = read_header(tmp_path / "hf" / "model.safetensors").tensors
    wide = {name.rpartition(".")[2] for name, info in tensors.items() if info.dtype == "F32"}
    assert wide == {"A_log", "dt_bias", "e_score_correction_bias"}
    torch_dtype = getattr(torch, word)
    assert_equal(deltamoe.load(tmp_path / "hf"), deltamoe.load(source.path, dtype=torch_dtype))


def test_a_tied_head_is_written_as_a_copy(tmp_path: Path) -> None:
    """No reader ties; vLLM would even skip a head that the config calls tied."""
    model = drawn_model(publishable_config(tie_embeddings=True))
    source = open_source(save_model(tmp_path, model))
    assert "copy of the embedding" in plan_hf(source, tmp_path / "hf").notes[0]
    write_hf(source, tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["tie_word_embeddings"] is False
    loaded = deltamoe.load(tmp_path / "hf")
    assert torch.equal(loaded.head.weight, loaded.embedding.weight)
    with torch.no_grad():
        assert torch.equal(loaded(IDS)[0], model(IDS)[0])


@pytest.mark.parametrize("file_bytes", [1 << 30, 30_000])
def test_the_plan_is_what_is_written(source: Source, file_bytes: int, tmp_path: Path) -> None:
    plan = plan_hf(source, tmp_path / "hf", dtype="bf16", file_bytes=file_bytes)
    assert not (tmp_path / "hf").exists()
    write_hf(source, tmp_path / "hf", dtype="bf16", file_bytes=file_bytes)
    for file in plan.files:
        assert (tmp_path / "hf" / file.name).stat().st_size == file.num_bytes
        assert len(read_header(tmp_path / "hf" / file.name).tensors) == file.num_tensors
    headers = [read_header(tmp_path / "hf" / file.name) for file in plan.files]
    assert plan.num_parameters == sum(header.num_elements for header in headers)
    assert plan.tokenizer == "bytes"
    back = open_source(tmp_path / "hf")
    native = plan_native(back, tmp_path / "back")
    write_native(back, tmp_path / "back")
    (file,) = native.files
    assert (tmp_path / "back" / file.name).stat().st_size == file.num_bytes
    assert json.dumps(native.to_dict())


def test_the_48b_is_planned_as_it_was_released() -> None:
    source = Source(
        path=Path("run"),
        kind="checkpoint",
        run=preset("kimi-linear-48b-a3b"),
        step=0,
        dtype="BF16",
        read=lambda tensor: pytest.fail("a plan reads nothing"),
    )
    plan = plan_hf(source, Path("kimi"))
    assert plan.num_tensors == 20_493
    assert plan.num_parameters == 49_122_681_728
    assert len(plan.files) == 20  # as the released model's
    assert max(file.num_bytes for file in plan.files) < 5_000_000_000 + (1 << 20)


def test_another_reading_of_the_same_tensors(source: Source, tmp_path: Path) -> None:
    write_hf(source, tmp_path / "hf")
    chosen = ["model.mla.latent_norm_eps=1e-6", "model.moe.has_biased_weights=true"]
    write_native(open_source(tmp_path / "hf", chosen), tmp_path / "other")
    config = deltamoe.load_config(tmp_path / "other")
    assert config.mla.latent_norm_eps == 1e-6
    assert config.moe.has_biased_weights
    with pytest.raises(ConfigError, match=r"latent_norm_eps(.|\n)*has_biased_weights"):
        write_hf(open_source(tmp_path / "other"), tmp_path / "back")
    undone = ["model.mla.latent_norm_eps=none", "model.moe.has_biased_weights=false"]
    write_hf(open_source(tmp_path / "other", undone), tmp_path / "back")
    assert_equal(deltamoe.load(tmp_path / "back"), deltamoe.load(source.path))


@pytest.mark.parametrize("is_published", [True, False])
def test_overrides_that_need_other_tensors(
    source: Source, is_published: bool, tmp_path: Path
) -> None:
    write_hf(source, tmp_path / "hf")
    path = tmp_path / "hf" if is_published else source.path
    for override in ("model.dim=32", "model.num_layers=5", "model.kda.output_gate=none"):
        with pytest.raises(CheckpointError, match="tensor"):
            open_source(path, [override])
    with pytest.raises(ConfigError, match="only the model's own keys"):
        open_source(path, ["train.steps=3"])


def test_a_model_beyond_the_format_is_refused_and_nothing_written(tmp_path: Path) -> None:
    config = publishable_config(moe=replace(publishable_config().moe, scoring="softmax"))
    source = open_source(save_model(tmp_path, drawn_model(config)))
    for refuse in (plan_hf, write_hf):
        with pytest.raises(ConfigError, match=r"model\.moe\.scoring = softmax"):
            refuse(source, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_nothing_is_overwritten(source: Source, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        for refuse in (plan_hf, write_hf, plan_native, write_native):
            with pytest.raises(CheckpointError, match="exists already"):
                refuse(source, tmp_path / name)
    with pytest.raises(CheckpointError, match="there is no folder"):
        write_hf(source, tmp_path / "no" / "such")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link", "run"]


def test_what_fails_half_way_leaves_nothing(source: Source, tmp_path: Path) -> None:
    def refuse(what: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    for write in (write_hf, write_native):
        with pytest.raises(KeyboardInterrupt):
            write(source, tmp_path / "out", progress=refuse)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_number_too_large_for_the_dtype(tmp_path: Path) -> None:
    model = drawn_model(publishable_config())
    model.state_dict()["blocks.2.channel.experts.w_up"][3, 1, 1] = 1e6
    source = open_source(save_model(tmp_path, model))
    with pytest.raises(CheckpointError, match=r"experts\.3\.w3\.weight': 1 of"):
        write_hf(source, tmp_path / "hf", dtype="fp16")
    write_hf(source, tmp_path / "hf", dtype="bf16")


def test_a_full_disk_is_asked_first(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr("deltamoe.checkpoint.folder.shutil.disk_usage", lambda path: Full)
    with pytest.raises(DoesNotFitError, match="1,000 bytes free"):
        write_hf(source, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_fp64_is_narrowed_only_on_request(tmp_path: Path) -> None:
    model = drawn_model(publishable_config()).double()
    source = open_source(save_model(tmp_path, model))
    with pytest.raises(ConfigError, match=r"dtype F64.*--dtype"):
        plan_hf(source, tmp_path / "hf")
    write_hf(source, tmp_path / "hf", dtype="fp32")
    assert find_checkpoint(tmp_path / "hf").step == 7


def test_progress_ends_at_the_end(source: Source, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    write_hf(source, tmp_path / "hf", progress=lambda _, done, total: told.append((done, total)))
    done, total = told[-1]
    assert total is not None
    assert 0.5 * total < done <= total  # headers are in the total
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_folder_without_a_tokenizer(source: Source, tmp_path: Path) -> None:
    write_hf(source, tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json", "manifest.json"):
        (tmp_path / "hf" / name).unlink()
    bare = open_source(tmp_path / "hf")
    assert bare.tokenizer is None
    assert "no tokenizer" in plan_native(bare, tmp_path / "back").notes[-1]
    write_native(bare, tmp_path / "back")
    assert sorted(open_checkpoint(tmp_path / "back").manifest.files) == [
        "config.json",
        "model.safetensors",
    ]
    write_hf(bare, tmp_path / "again")
    assert open_source(tmp_path / "again").token_ids == bare.token_ids != {}
