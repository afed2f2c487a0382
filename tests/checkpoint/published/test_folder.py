"""A published folder that lies, leads away or asks too much is refused in words, quickly."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltamoe.checkpoint import find_checkpoint, load, load_config, read_header
from deltamoe.checkpoint.published import is_published, open_published, published_tensors
from deltamoe.checkpoint.published.folder import INDEX
from deltamoe.checkpoint.tensors import write_tensors
from deltamoe.conversion import open_source, write_hf
from deltamoe.errors import CheckpointError, DeltamoeError, DoesNotFitError
from tests.saved_model import drawn_model, publishable_config, save_model

CONFIG = publishable_config(num_layers=2, mla_every=2)
WEIGHTS = "model.safetensors"
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good folders: "one" file, and "many" files with an index; no manifest beside them."""
    root = tmp_path_factory.mktemp("published")
    source = open_source(save_model(root, drawn_model(CONFIG)))
    write_hf(source, root / "one")
    write_hf(source, root / "many", file_bytes=40_000)
    for name in ("one", "many"):
        (root / name / "manifest.json").unlink()
    return root


@pytest.fixture
def one(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "one", tmp_path / "one"))


@pytest.fixture
def many(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "many", tmp_path / "many"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    changed = change(data)
    path.write_text(json.dumps(data if changed is None else changed))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """What the single file holds, to be written again otherwise."""
    import safetensors.torch

    return safetensors.torch.load((folder / WEIGHTS).read_bytes())


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / WEIGHTS).unlink()
    write_tensors(folder / WEIGHTS, tensors)


def refused(folder: Path, *parts: str, error: type[DeltamoeError] = CheckpointError) -> None:
    """``load`` refuses the folder within 2 s, says why, and leaves it as it was."""
    before = sorted(path.name for path in folder.parent.rglob("*"))
    started = time.process_time()
    with pytest.raises(error) as raised:
        load(folder)
    assert time.process_time() - started < 2.0
    assert sorted(path.name for path in folder.parent.rglob("*")) == before
    for part in (folder.name, *parts):
        assert part in str(raised.value)


def test_one_file_or_many(made: Path) -> None:
    one, many = open_published(made / "one"), open_published(made / "many")
    assert one.config == many.config == load_config(made / "one") == CONFIG
    assert one.header.tensors.keys() == many.header.tensors.keys()
    assert {t.name for t in published_tensors(CONFIG)} == one.header.tensors.keys()
    files = {header.path.name for header, _ in many.places.values()}
    assert len(files) > 2
    assert files == set(json.loads((made / "many" / INDEX).read_text())["weight_map"].values())
    assert many.header.file_bytes == sum((made / "many" / name).stat().st_size for name in files)
    assert one.dtype == "F32"
    assert one.token_ids == {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    ids = torch.arange(9)[None]
    assert torch.equal(load(made / "one")(ids)[0], load(made / "many")(ids)[0])


def test_a_published_folder_is_told_from_ours(made: Path) -> None:
    assert is_published(made / "one")
    assert not is_published(made / "run" / "checkpoints" / "step-7")
    assert not is_published(made / "nothing")
    assert find_checkpoint(made / "many").manifest.step == 0


def test_a_manifest_is_believed(tmp_path: Path) -> None:
    source = open_source(save_model(tmp_path, drawn_model(CONFIG)))
    sealed = write_hf(source, tmp_path / "sealed")
    assert find_checkpoint(tmp_path / "sealed").manifest == sealed.manifest
    assert sealed.step == 7
    with (tmp_path / "sealed" / WEIGHTS).open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x01")
    refused(tmp_path / "sealed", "SHA-256 differs")


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", 32), ("vocab_size", 300), ("num_experts", 6), ("qk_nope_head_dim", 11)],
)
def test_a_config_that_disagrees_with_the_tensors(one: Path, key: str, value: int) -> None:
    edit(one / "config.json", lambda data: data.update({key: value}))
    refused(one, "tensor 'model.")


def test_absurd_sizes_are_refused_before_anything_is_allocated(one: Path) -> None:
    most = 1 << 24
    keys = ("hidden_size", "vocab_size", "num_experts", "intermediate_size", "kv_lora_rank")
    edit(one / "config.json", lambda data: data.update(dict.fromkeys(keys, most)))
    refused(one, "expected [16777216, 16777216]")


def test_a_model_larger_than_memory_is_refused(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltamoe.checkpoint.published.weights.machine_memory", lambda: 100_000)
    refused(one, "this machine has 100,000", error=DoesNotFitError)


@pytest.mark.parametrize("name", [HEAD, "model.layers.1.block_sparse_moe.experts.3.w2.weight"])
def test_a_missing_tensor_is_named(one: Path, name: str) -> None:
    rewrite(one, {key: value for key, value in stored(one).items() if key != name})
    refused(one, f"tensor {name!r} is missing")


def test_an_unknown_tensor_is_named(one: Path) -> None:
    rewrite(one, stored(one) | {"model.layers.2.input_layernorm.weight": torch.ones(24)})
    refused(one, "tensors too many", "'model.layers.2.input_layernorm.weight'")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.A_log", "model.norm.weight"])
def test_a_misshapen_tensor_is_named(one: Path, name: str) -> None:
    tensors = stored(one)
    rewrite(one, tensors | {name: tensors[name].reshape(-1)[None]})
    refused(one, f"tensor {name!r} has shape [1, ")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_none_is_found(many: Path, value: float) -> None:
    name = "model.layers.1.block_sparse_moe.experts.4.w3.weight"
    header, _ = open_published(many).places[name]
    with header.path.open("r+b") as file:
        file.seek(header.data_begin + header.tensors[name].begin + 4 * 7)
        file.write(torch.tensor(value).numpy().tobytes())
    refused(many, f"tensor {name!r}: 1 of 384 elements")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64])
def test_a_quantised_model_is_refused(one: Path, dtype: torch.dtype) -> None:
    tensors = stored(one)
    rewrite(one, tensors | {HEAD: tensors[HEAD].to(dtype)})
    refused(one, f"tensor {HEAD!r} is", "quantised models are not read")


def test_a_dense_layer_under_both_its_names(one: Path) -> None:
    tensors = stored(one)
    official = "model.layers.0.mlp.up_proj.weight"
    wrong = official.replace("mlp", "block_sparse_moe")
    rewrite(one, tensors | {wrong: tensors[official]})
    refused(one, f"tensor {official!r} stands twice")


def test_a_tied_model_has_no_head(one: Path) -> None:
    edit(one / "config.json", lambda data: data.update(tie_word_embeddings=True))
    refused(one, f"the first is {HEAD!r}")
    rewrite(one, {key: value for key, value in stored(one).items() if key != HEAD})
    assert load(one).head is None


# ── the index ────────────────────────────────────────────────────────────────────────────────────


def test_both_a_single_file_and_an_index(one: Path, many: Path) -> None:
    shutil.copy(many / INDEX, one)
    refused(one, "holds both model.safetensors and model.safetensors.index.json")


def test_no_weights(one: Path) -> None:
    (one / WEIGHTS).unlink()
    refused(one, "no weights to read")


@pytest.mark.parametrize(
    "file",
    [
        *("../one/model.safetensors", "/etc/passwd", "..", ".hidden.safetensors"),
        *("model.bin", "a/b.safetensors", "", "m\n.safetensors", 3, None, ["model.safetensors"]),
    ],
)
def test_a_file_name_in_the_index_is_plain(many: Path, file: object) -> None:
    edit(many / INDEX, lambda data: data["weight_map"].update({HEAD: file}))
    refused(many, "cannot be a file of this folder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: [], "expected a JSON object"),
        (lambda data: {}, "expected a weight_map"),
        (lambda data: {"weight_map": {}}, "expected a weight_map"),
        (lambda data: {"weight_map": ["model.safetensors"]}, "expected a weight_map"),
        (lambda data: data["weight_map"].update(extra="lost.safetensors"), "no such file"),
        (lambda data: data["weight_map"].pop(HEAD) and None, f"{HEAD!r}: {INDEX} does not list it"),
        (
            lambda data: data["weight_map"].update(
                {f"t{i}": f"{i}.safetensors" for i in range(600)}
            ),
            "expected at most 512",
        ),
    ],
)
def test_an_index_that_lies(many: Path, change: Callable[[Any], Any], message: str) -> None:
    edit(many / INDEX, change)
    refused(many, message)


def test_a_tensor_in_another_file_than_the_index_says(many: Path) -> None:
    first = "model.embed_tokens.weight"
    files = json.loads((many / INDEX).read_text())["weight_map"]
    edit(many / INDEX, lambda data: data["weight_map"].update({first: files[HEAD]}))
    refused(many, f"tensor {first!r}: {INDEX} puts it in")


def test_a_tensor_in_two_files(many: Path) -> None:
    """The second file is listed for a tensor of its own, and holds one of the first's too."""
    files = json.loads((many / INDEX).read_text())["weight_map"]
    write_tensors(many / "z.safetensors", {HEAD: torch.ones(257, 24), "extra": torch.ones(1)})
    edit(many / INDEX, lambda data: data["weight_map"].update({"extra": "z.safetensors"}))
    refused(many, f"tensor {HEAD!r} stands twice, in {files[HEAD]} and in z.safetensors")


def test_an_index_too_long_to_be_one(many: Path) -> None:
    with (many / INDEX).open("a") as file:
        file.write(" " * (17 << 20))
    refused(many, "longer than")


def test_headers_too_long_together(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltamoe.checkpoint.published.folder._MAX_HEADERS_BYTES", 1000)
    refused(many, "more than 1,000 bytes of headers")


# ── what is no plain file ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_link_that_leaves_the_folder(one: Path, name: str) -> None:
    outside = one.parent / "outside"
    (one / name).rename(outside)
    (one / name).symlink_to(outside)
    refused(one, "leaves its folder")


def test_a_shard_that_leaves_the_folder(many: Path) -> None:
    shard = next(many.glob("model-*.safetensors"))
    shard.rename(many.parent / "outside")
    shard.symlink_to("../outside")
    refused(many, "leaves its folder")


def test_a_link_within_the_folder_is_followed(one: Path) -> None:
    (one / WEIGHTS).rename(one / "blob")
    (one / WEIGHTS).symlink_to("blob")
    assert load(one).config == CONFIG


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_pipe_is_never_waited_for(one: Path, name: str) -> None:
    (one / name).unlink()
    os.mkfifo(one / name)
    refused(one)


def test_code_in_the_folder_is_not_run(one: Path) -> None:
    (one / "modeling_kimi.py").write_text("raise SystemExit('executed')")
    auto_map = {"AutoModelForCausalLM": "modeling_kimi.KimiLinearForCausalLM"}
    edit(one / "config.json", lambda data: data.update(auto_map=auto_map))
    assert load(one).config == CONFIG


# ── fuzz ─────────────────────────────────────────────────────────────────────────────────────────


def holds(folder: Path) -> bool:
    """Whether the folder loads; if not, our own error says why, in time, and writes nothing."""
    before = {path.name: path.stat().st_size for path in folder.iterdir()}
    started = time.process_time()
    try:
        load(folder)
    except DeltamoeError:
        return False
    finally:
        assert time.process_time() - started < 2.0
        assert {path.name: path.stat().st_size for path in folder.iterdir()} == before
    return True


values = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 2, 3, 24, 1 << 24, 1 << 31, 10**19, 0.5, -1e30]),
    st.sampled_from(["", "sigmoid", "softmax", "kda", [], {}, [[1]], {"a": 1}, [1, 2], [2]]),
    st.sampled_from([["dense", "sparse"], ["sparse", "sparse"], ["full_attention"] * 2]),
    st.text(max_size=4),
)
fuzz = settings(
    max_examples=250,
    deadline=None,  # the machine may be busy; ``holds`` bounds the time that is ours
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def victim(made: Path, tmp_path: Path) -> Path:
    """A folder that one example after another may spoil; its weights are small."""
    return Path(shutil.copytree(made / "one", tmp_path / "victim"))


@fuzz
@given(data=st.data())
def test_mutated_configs(data: st.DataObject, made: Path, victim: Path) -> None:
    config = json.loads((made / "one" / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        inner = config.get("linear_attn_config")
        part = inner if isinstance(inner, dict) and inner and data.draw(st.booleans()) else config
        key = data.draw(st.sampled_from(sorted(part)) | st.text(max_size=5))
        if data.draw(st.integers(0, 4)) == 0:
            part.pop(key, None)
        else:
            part[key] = data.draw(values)
    (victim / "config.json").write_text(json.dumps(config))
    holds(victim)


@fuzz
@given(data=st.data())
def test_mutated_headers(data: st.DataObject, made: Path, victim: Path) -> None:
    content = bytearray((made / "one" / WEIGHTS).read_bytes())
    length = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 8 + length - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "digit"])):
            case "flip":
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del content[at : at + data.draw(st.integers(1, 12))]
            case "insert":
                content[at:at] = data.draw(st.sampled_from([b"0", b'"', b"[", b"}", b"1e999"]))
            case _:
                content[at] = ord(data.draw(st.sampled_from("0123456789")))
    (victim / WEIGHTS).write_bytes(content)
    holds(victim)


def test_the_victim_is_good(victim: Path) -> None:
    assert holds(victim)
    assert read_header(victim / WEIGHTS).tensors
