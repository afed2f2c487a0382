"""From a quantised folder to a model: the same codes, or an error that names what is wrong."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltamoe.checkpoint import load, open_checkpoint, read_header, read_tensors, write_tensors
from deltamoe.checkpoint.expert_file import cache_experts
from deltamoe.checkpoint.folder import WEIGHTS
from deltamoe.checkpoint.manifest import MANIFEST, Manifest, record_file, write_manifest
from deltamoe.checkpoint.quantized import quantization_of, quantized_metadata, stored_tensors
from deltamoe.config import KdaConfig, MlaConfig, ModelConfig
from deltamoe.conversion import open_source, plan_quantized, write_quantized
from deltamoe.errors import CheckpointError, ConfigError, DoesNotFitError
from deltamoe.layers.expert_cache import CachedExperts
from deltamoe.model import HybridLM
from deltamoe.model.quantized import build_quantized, quantize_model
from deltamoe.ops import quantized as format_of_ops
from deltamoe.plan import BITS, generation_plan, parameters, quantized_bits, weights
from deltamoe.testing import tiny_config
from tests.model.test_plan_matches_modules import VARIANTS
from tests.saved_model import drawn_model, save_model

IDS = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(0))


def quantized_folder(
    tmp_path: Path, *, bits: int = 4, config: ModelConfig | None = None
) -> tuple[Path, HybridLM]:
    """A quantised step folder, and the model that it was made from."""
    model = drawn_model(config or tiny_config())
    source = save_model(tmp_path, model)
    write_quantized(open_source(source), tmp_path / "quantized", bits=bits)
    return tmp_path / "quantized", model


def rewrite(
    folder: Path, *, metadata: dict[str, str] | None = None, **changed: Tensor | None
) -> None:
    """Put another file of weights in a folder; a tensor that is None goes."""
    header = read_header(folder / WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in read_tensors(folder / WEIGHTS).items()}
    for name, tensor in changed.items():
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor
    (folder / WEIGHTS).unlink()
    write_tensors(folder / WEIGHTS, tensors, header.metadata if metadata is None else metadata)
    names = sorted(file.name for file in folder.iterdir() if file.name != MANIFEST)
    write_manifest(
        folder / MANIFEST, Manifest(7, {name: record_file(folder / name) for name in names})
    )


def logits(model: HybridLM, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        return model(ids)[0]


@pytest.mark.parametrize("bits", BITS)
def test_the_file_is_the_model_quantised_in_memory(tmp_path: Path, bits: int) -> None:
    folder, model = quantized_folder(tmp_path, bits=bits)
    loaded = load(folder)
    assert not loaded.training
    expected = quantize_model(model, bits).state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert torch.equal(logits(loaded), logits(load(tmp_path / "run", quantize=bits)))


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_stored_is_what_is_built(name: str) -> None:
    for bits in BITS:
        built = build_quantized(VARIANTS[name], bits).state_dict()
        stored = {s.name: s.shape for _, s in stored_tensors(VARIANTS[name], bits, dtype="F32")}
        assert {key: tuple(tensor.shape) for key, tensor in built.items()} == stored


@pytest.mark.parametrize("bits", BITS)
def test_the_plan_knows_the_bytes(tmp_path: Path, bits: int) -> None:
    config = tiny_config()
    source = open_source(save_model(tmp_path, drawn_model(config)))
    planned = plan_quantized(source, tmp_path / "quantized", bits=bits)
    write_quantized(source, tmp_path / "quantized", bits=bits)
    file = tmp_path / "quantized" / WEIGHTS
    assert file.stat().st_size == planned.num_bytes
    assert planned.num_parameters == parameters(config).total
    costs = generation_plan(config, context=1, memory_bytes=1, dtype="fp32", bits=bits)
    assert costs.weight_bytes == sum(t.num_bytes for t in read_header(file).tensors.values())


def test_the_layout_is_that_of_the_operators() -> None:
    found = format_of_ops.quantize(torch.randn(2, 33, 70), 4)
    example = next(w for w in weights(tiny_config()) if w.part == "experts")
    specs = [
        s.shape for w, s in stored_tensors(tiny_config(), 4, dtype="F32") if w.name == example.name
    ]
    expected = format_of_ops.quantize(torch.randn(*example.shape), 4)
    assert specs == [tuple(expected.values.shape), tuple(expected.scales.shape)]
    assert found.values.shape[-1] == format_of_ops.TILE * format_of_ops.GROUP // 2


def test_what_stays_as_it_is() -> None:
    kept = {
        re.sub(r"^blocks\.\d+\.", "", w.name)
        for w in weights(tiny_config())
        if quantized_bits(w, 4) is None and len(w.shape) > 1
    }
    assert kept == {
        *("embedding.weight", "channel.router.weight", "mixer.latent_up.weight"),
        *("mixer.q_conv.weight", "mixer.k_conv.weight", "mixer.v_conv.weight"),
        "mixer.beta_proj.weight",
    }
    wider = {w.part for w in weights(tiny_config()) if quantized_bits(w, 4) == 8}
    assert wider == {"head", "kda"}


def test_the_rest_may_go_to_bf16(tmp_path: Path) -> None:
    source = open_source(save_model(tmp_path, drawn_model(tiny_config())))
    write_quantized(source, tmp_path / "quantized", bits=8, dtype="bf16")
    model = load(tmp_path / "quantized")
    assert model.embedding.weight.dtype == torch.bfloat16
    assert model.blocks[0].mixer.A_log.dtype == torch.float32
    assert logits(model).isfinite().all()
    wide = load(tmp_path / "quantized", dtype=torch.float32)
    assert wide.embedding.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "2"}, "newer deltamoe"),
        ({"format": "x"}, "format"),
        ({"bits": "3"}, "expected 8 or 4"),
        ({"bits": "8"}, "shape"),
        ({"kind": "other"}, "missing"),
    ],
)
def test_metadata_that_lie(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    folder, _ = quantized_folder(tmp_path)
    rewrite(folder, metadata=quantized_metadata(4) | metadata)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_tensors_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    folder, _ = quantized_folder(tmp_path)
    values, scales = "blocks.0.mixer.q_proj.values", "blocks.0.mixer.q_proj.scales"
    good = read_tensors(folder / WEIGHTS)
    nan = good[scales].clone()
    nan[0, 0, 0] = torch.nan
    for changed, message in (
        ({values: None}, "missing"),
        ({scales: good[scales].float()}, "F32; expected F16"),
        ({values: good[values].to(torch.int8)}, "I8; expected U8"),
        ({values: good[values][:, :, :-1].clone()}, "shape"),
        ({scales: nan}, "NaN"),
    ):
        copy = tmp_path / message.replace(" ", "").replace(";", "")
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        rewrite(copy, **changed)
        with pytest.raises(CheckpointError, match=message):
            load(copy)


def test_arguments_that_do_not_go_together(tmp_path: Path) -> None:
    folder, _ = quantized_folder(tmp_path)
    with pytest.raises(ConfigError, match="quantised to 4 bits already"):
        load(folder, quantize=8)
    assert torch.equal(logits(load(folder, quantize=4)), logits(load(folder)))
    with pytest.raises(ConfigError, match="deltamoe quantize"):
        load(tmp_path / "run", memory=1 << 40)
    with pytest.raises(CheckpointError, match="quantised to 4 bits"):
        open_source(folder)


# ── experts on the disk ──────────────────────────────────────────────────────────────────────────


def cached(folder: Path, num_slots: int) -> HybridLM:
    """A quantised model of which so many experts fit into memory."""
    model, header = load(folder), read_header(folder / WEIGHTS)
    cache_experts(model, header, num_slots=num_slots)
    return model


@pytest.mark.parametrize("num_slots", [1, 3, 15])
def test_the_answers_are_the_same_bit_for_bit(tmp_path: Path, num_slots: int) -> None:
    folder, _ = quantized_folder(tmp_path)
    whole, small = load(folder), cached(folder, num_slots)
    states = [whole.initial_state(2), small.initial_state(2)]
    with torch.inference_mode():
        for ids in (IDS[:, :20], IDS[:, 20:21], IDS[:, 21:22], IDS[:, 22:]):
            found = [m(ids, s) for m, s in zip((whole, small), states, strict=True)]
            states = [state for _, state in found]
            assert torch.equal(found[0][0], found[1][0])
    cache = next(m.cache for m in small.modules() if isinstance(m, CachedExperts))
    assert cache.num_experts == 15
    bytes_each = sum(
        info.num_bytes // 5
        for name, info in read_header(folder / WEIGHTS).tensors.items()
        if name.startswith("blocks.1.channel.experts.")
    )
    assert cache.bytes_read == cache.num_misses * bytes_each
    assert cache.nbytes == num_slots * bytes_each


def test_a_budget_of_memory(tmp_path: Path) -> None:
    config = tiny_config()
    folder, _ = quantized_folder(tmp_path)
    costs = generation_plan(config, context=4096, memory_bytes=1, dtype="fp32", bits=4)
    budget = costs.resident_bytes + 3 * costs.expert_bytes
    model = load(folder, memory=budget)
    (cache,) = {m.cache for m in model.modules() if isinstance(m, CachedExperts)}
    assert cache.num_slots == 3
    assert torch.equal(logits(model), logits(load(folder)))
    with pytest.raises(DoesNotFitError, match="give that or more") as raised:
        load(folder, memory=costs.resident_bytes)
    needed = int(re.search(r"take ([\d,]+);", str(raised.value))[1].replace(",", ""))
    assert needed == costs.resident_bytes + 2 * costs.expert_bytes
    load(folder, memory=needed)


def test_a_model_without_experts_has_nothing_to_leave_on_the_disk(tmp_path: Path) -> None:
    folder, _ = quantized_folder(
        tmp_path, config=tiny_config(first_dense_layers=4, moe=None, num_layers=4)
    )
    with pytest.raises(ConfigError, match="no experts"):
        load(folder, memory=1 << 40)


def test_a_damaged_expert_is_found_when_it_is_read(tmp_path: Path) -> None:
    folder, _ = quantized_folder(tmp_path)
    name = "blocks.2.channel.experts.w_up.scales"
    scales = read_tensors(folder / WEIGHTS)[name].clone()
    scales[:, 0, 0, 0] = torch.inf
    rewrite(folder, **{name: scales})
    model = load(folder, memory=1 << 40)  # looks at the others only
    with pytest.raises(CheckpointError, match=re.escape(name)):
        logits(model)


def test_a_file_that_was_cut_while_it_was_open(tmp_path: Path) -> None:
    folder, _ = quantized_folder(tmp_path)
    model = cached(folder, 3)
    with open(folder / WEIGHTS, "r+b") as file:
        file.truncate(read_header(folder / WEIGHTS).data_begin)
    cache = next(m.cache for m in model.modules() if isinstance(m, CachedExperts))
    with pytest.raises(CheckpointError, match="shorter than it was"):
        list(cache.places(0, [1]))


def test_a_seal_is_compared_as_for_any_checkpoint(tmp_path: Path) -> None:
    folder, _ = quantized_folder(tmp_path)
    assert quantization_of(read_header(folder / WEIGHTS)) == 4
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256"):
        open_checkpoint(folder)


def test_sizes_that_fill_no_tile_and_no_group(tmp_path: Path) -> None:
    config = tiny_config(
        dim=36,
        kda=KdaConfig(num_heads=3, key_dim=8, value_dim=8, decay_rank=5),
        mla=MlaConfig(num_heads=3, latent_dim=20, nope_dim=10, rope_dim=6, value_dim=14),
        moe=replace(tiny_config().moe, expert_dim=19),
    )
    folder, model = quantized_folder(tmp_path, config=config, bits=8)
    assert torch.equal(logits(load(folder)), logits(quantize_model(model, 8)))
