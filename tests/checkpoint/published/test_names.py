"""The released model's tensors, written down here from its index, against the table."""

import re

import pytest
import torch

from deltamoe.checkpoint.published import NAMES, published_places, published_tensors
from deltamoe.checkpoint.published.names import official_name
from deltamoe.config import preset
from deltamoe.model import HybridLM
from deltamoe.plan import weights
from tests.docs.pages import ROOT, rows

D, HEADS, HD, VOCAB, EXPERTS, F = 2304, 32, 4096, 163_840, 256, 1024
KIMI = preset("kimi-linear-48b-a3b").model

KDA = {
    **{f"{name}_proj.weight": (HD, D) for name in "qkv"},
    **{f"{name}_conv1d.weight": (HD, 1, 4) for name in "qkv"},
    "A_log": (1, 1, HEADS, 1),
    "dt_bias": (HD,),
    "f_a_proj.weight": (128, D),
    "f_b_proj.weight": (HD, 128),
    "b_proj.weight": (HEADS, D),
    "g_a_proj.weight": (128, D),
    "g_b_proj.weight": (HD, 128),
    "o_norm.weight": (128,),
    "o_proj.weight": (D, HD),
}
MLA = {
    "q_proj.weight": (6144, D),
    "kv_a_proj_with_mqa.weight": (576, D),
    "kv_a_layernorm.weight": (512,),
    "kv_b_proj.weight": (8192, 512),
    "o_proj.weight": (D, HD),
}


def mlp(prefix: str, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (hidden, D),
        f"{prefix}.up_proj.weight": (hidden, D),
        f"{prefix}.down_proj.weight": (D, hidden),
    }


def released() -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of Kimi-Linear-48B-A3B."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (VOCAB, D),
    }
    for layer in range(27):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.{norm}_layernorm.weight": (D,) for norm in ("input", "post_attention")}
        mixer = MLA if layer + 1 in (4, 8, 12, 16, 20, 24, 27) else KDA
        found |= {f"{prefix}.self_attn.{name}": shape for name, shape in mixer.items()}
        if layer == 0:
            found |= mlp(f"{prefix}.mlp", 9216)
            continue
        sparse = f"{prefix}.block_sparse_moe"
        found |= mlp(f"{sparse}.shared_experts", F)
        found[f"{sparse}.gate.weight"] = (EXPERTS, D)
        found[f"{sparse}.gate.e_score_correction_bias"] = (EXPERTS,)
        for expert in range(EXPERTS):
            found[f"{sparse}.experts.{expert}.w1.weight"] = (F, D)
            found[f"{sparse}.experts.{expert}.w2.weight"] = (D, F)
            found[f"{sparse}.experts.{expert}.w3.weight"] = (F, D)
    return found


def test_the_48b_has_exactly_the_released_tensors() -> None:
    expected = released()
    listed = list(published_tensors(KIMI))
    assert len(expected) == len(listed) == 20_493
    assert {tensor.name: tensor.shape for tensor in listed} == expected
    assert sum(tensor.size for tensor in listed) == 49_122_681_728
    # all bf16 but A_log and dt_bias, which is what the released files' bytes add up to; we keep the
    # router's bias in fp32 as well
    wide = [tensor for tensor in listed if tensor.is_fp32]
    kept = sum(tensor.size for tensor in wide if not tensor.name.endswith("_bias"))
    kept += sum(tensor.size for tensor in wide if tensor.name.endswith("dt_bias"))
    assert 2 * 49_122_681_728 + 2 * kept == 98_245_528_576


def test_each_names_a_slice_of_the_48b_on_the_meta_device() -> None:
    with torch.device("meta"):
        tensors = HybridLM(KIMI).state_dict()
    sizes = dict.fromkeys(tensors, 0)
    for tensor in published_tensors(KIMI):
        ours = tensors[tensor.ours]
        place = ours if tensor.expert is None else ours[tensor.expert]
        assert place.numel() == tensor.size
        sizes[tensor.ours] += tensor.size
    assert sizes == {name: tensor.numel() for name, tensor in tensors.items()}


def test_the_way_back_is_unique() -> None:
    for weight in weights(KIMI):
        places = list(published_places(weight))
        assert sum(place.size for place in places) == weight.size
        assert [place.expert for place in places] in ([None], list(range(EXPERTS)))
    assert len(set(NAMES.values())) == len(NAMES)


def test_the_list_is_lazy() -> None:
    huge = next(w for w in weights(KIMI) if w.name.endswith("experts.w_up"))
    endless = published_places(huge._replace(shape=(1 << 40, 2, 3)))
    assert next(endless).shape == (2, 3)


@pytest.mark.parametrize(
    ("stored", "official"),
    [
        ("model.layers.0.block_sparse_moe.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        (
            "model.layers.12.block_sparse_moe.gate_proj.weight",
            "model.layers.12.mlp.gate_proj.weight",
        ),
    ],
)
def test_the_misnamed_dense_layers(stored: str, official: str) -> None:
    assert official_name(stored) == official


def test_no_official_name_is_taken_for_a_wrong_one() -> None:
    for tensor in published_tensors(KIMI):
        assert official_name(tensor.name) == tensor.name


def test_the_table_for_people_is_this_one() -> None:
    found = {}
    for ours, theirs, _ in rows(ROOT / "docs" / "checkpoints.md", "parameter names"):
        names = [re.findall(r"`([^`]+)`", cell) for cell in (ours, theirs)]
        if names[1]:  # what the format has no word for stands there as well
            found |= dict(zip(*names, strict=True))
    assert {name: there.replace(".E.", ".{expert}.") for name, there in found.items()} == NAMES
