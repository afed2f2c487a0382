"""There and back again, in every dtype; and what a file of ours says of itself."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tests.conversion.gguf.exported import CONTEXT, GEOMETRIES, MIXED, save, tiny

from deltamoe.config import ModelConfig
from deltamoe.conversion import open_source
from deltamoe.conversion.gguf import plan_gguf, read_gguf, read_gguf_header, write_gguf
from deltamoe.errors import CheckpointError, ConfigError
from deltamoe.tokenizer import BpeTokenizer, Tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("mixed") / "run", tiny(MIXED))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_f32_comes_back_bit_for_bit(geometry: str, tmp_path: Path) -> None:
    model = tiny(GEOMETRIES[geometry])
    write_gguf(open_source(save(tmp_path / "run", model)), tmp_path / "m.gguf", dtype="f32")
    back = read_gguf(tmp_path / "m.gguf").model
    assert back.config == model.config
    found = back.state_dict()
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype, name


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_a_narrow_model_comes_back_bit_for_bit(
    dtype: str, stored: torch.dtype, tmp_path: Path
) -> None:
    folder = save(tmp_path / "run", tiny(MIXED), dtype=stored)
    source = open_source(folder)
    write_gguf(source, tmp_path / "m.gguf", dtype=dtype)
    found = read_gguf(tmp_path / "m.gguf").model.state_dict()
    from deltamoe.checkpoint import load

    for name, tensor in load(folder).state_dict().items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype, name


def test_q8_0_comes_back_within_half_a_step(run: Path, tmp_path: Path) -> None:
    write_gguf(open_source(run), tmp_path / "m.gguf", dtype="q8_0")
    model, found = tiny(MIXED), read_gguf(tmp_path / "m.gguf").model.state_dict()
    for name, tensor in model.state_dict().items():
        # a step is a 127th of the largest of 32; its fp16 scale adds 2**-11 of the number
        step = tensor.abs().max() / 127
        assert (found[name] - tensor).abs().max() <= 0.5 * step + tensor.abs().max() * 2**-11, name
    assert torch.equal(found["blocks.0.mixer.A_log"], model.state_dict()["blocks.0.mixer.A_log"])


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_the_package_reads_what_was_planned(dtype: str, run: Path, tmp_path: Path) -> None:
    source, out = open_source(run), tmp_path / "m.gguf"
    planned = plan_gguf(source, out, dtype=dtype)
    seen: list[int] = []
    write_gguf(
        source, out, dtype=dtype, progress=lambda what, done, total: seen.append(total - done)
    )
    reader = gguf.GGUFReader(out)
    assert planned.num_tensors == len(reader.tensors)
    assert planned.num_bytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert planned.num_parameters == sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == 0
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.1.ffn_up_exps.weight"] == types["token_embd.weight"] == dtype.upper()
    for name in ("blk.1.ffn_gate_inp.weight", "blk.0.ssm_a", "blk.0.ssm_conv1d_q.weight"):
        assert types[name] == "F32"


def test_rows_that_do_not_divide_stay_f16(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", tiny(GEOMETRIES["no even size"]))
    planned = plan_gguf(open_source(folder), tmp_path / "m.gguf", dtype="q8_0")
    assert any("stay f16" in note for note in planned.notes)
    write_gguf(open_source(folder), tmp_path / "m.gguf", dtype="q8_0")
    types = {tensor.dtype for tensor in read_gguf_header(tmp_path / "m.gguf").tensors.values()}
    assert types == {"F16", "F32"}


def test_a_file_says_what_it_is(run: Path, tmp_path: Path) -> None:
    write_gguf(open_source(run), tmp_path / "m.gguf")
    fields = read_gguf_header(tmp_path / "m.gguf").fields
    assert fields["general.architecture"] == "kimi-linear"
    assert fields["kimi-linear.context_length"] == CONTEXT
    assert fields["kimi-linear.attention.head_count_kv"] == [0, 0, 0, 1, 1]
    assert fields["kimi-linear.attention.key_length"] == 96 + 16
    assert fields["kimi-linear.attention.key_length_mla"] == 160 + 16


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_tokenizer_comes_back(kind: str, run: Path, tmp_path: Path) -> None:
    config, folder = MIXED, run
    tokenizer: Tokenizer | None = open_source(run).tokenizer
    if kind == "bpe":
        tokenizer = BpeTokenizer.train(["some words, and some more words"], 290)
        config = replace(MIXED, vocab_size=300)
        folder = save(tmp_path / "run", tiny(config), tokenizer)
    write_gguf(open_source(folder), tmp_path / "m.gguf")
    back = read_gguf(tmp_path / "m.gguf").tokenizer
    assert tokenizer is not None
    assert back is not None
    assert back.fingerprint == tokenizer.fingerprint


def test_nothing_is_overwritten(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    out.write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        write_gguf(open_source(run), out)
    assert out.read_text() == "mine"


def test_a_number_too_large_leaves_nothing_behind(tmp_path: Path) -> None:
    model = tiny(MIXED)
    with torch.no_grad():
        model.get_parameter("blocks.2.channel.experts.w_up")[7, 3, 1] = 1e5
    source = open_source(save(tmp_path / "run", model))
    with pytest.raises(CheckpointError, match=r"blocks\.2\.channel\.experts\.w_up.*too large"):
        write_gguf(source, tmp_path / "m.gguf", dtype="f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    write_gguf(source, tmp_path / "m.gguf", dtype="bf16")


def test_an_unknown_dtype_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="f32, f16, bf16, q8_0"):
        write_gguf(open_source(run), tmp_path / "m.gguf", dtype="q4_0")


def test_other_writers_files_are_read(run: Path, tmp_path: Path) -> None:
    """Without our own keys, with the sizes of 1 left out and a quantisation we do not write."""
    write_gguf(open_source(run), tmp_path / "ours.gguf", dtype="f32")
    reader = gguf.GGUFReader(tmp_path / "ours.gguf")
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "kimi-linear")
    for key, field in reader.fields.items():
        if key.startswith(("kimi-linear.", "tokenizer.")):
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        data = tensor.data.squeeze() if "ssm_" in tensor.name else tensor.data
        kind = gguf.GGMLQuantizationType.Q4_0 if tensor.name == "blk.0.ffn_up.weight" else None
        writer.add_tensor(
            tensor.name, data if kind is None else gguf.quantize(data, kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model, tokenizer = read_gguf(tmp_path / "theirs.gguf")
    assert tokenizer is None
    ours, theirs = tiny(MIXED), model.state_dict()
    assert _geometry(model.config) == _geometry(MIXED)
    for name, tensor in ours.state_dict().items():
        if name == "blocks.0.channel.w_up.weight":
            assert (theirs[name] - tensor).abs().max() < tensor.abs().max() / 7
        elif name.endswith("A_log"):
            np.testing.assert_allclose(theirs[name], tensor, atol=1e-6)  # log(exp(x)) in fp32
        else:
            assert torch.equal(theirs[name], tensor), name


def _geometry(config: ModelConfig) -> ModelConfig:
    """With the schedule spelled out, and without what only training needs."""
    mixers = tuple(config.mixer(layer) for layer in range(config.num_layers))
    assert config.kda is not None
    return replace(
        config,
        mixers=mixers,
        kda=replace(config.kda, num_value_heads=None),
    )
