"""Parity with transformers' own KimiLinear, an implementation nobody here wrote, both ways.

Limits of its version 5.23 that are worked around here: its norms of latents have an epsilon of
1e-6 whatever the config says; without an MLA layer it runs only without a cache; its names of dense
layers are wrong on saving. Tied embeddings, a softmax router, RoPE and ``moe_layer_freq`` it
ignores, so nothing here depends on them but ``mlp_layer_types``, which is always written.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltamoe
from deltamoe.checkpoint import read_header
from deltamoe.checkpoint.published.folder import INDEX
from deltamoe.checkpoint.published.names import official_name
from deltamoe.config import KdaConfig, MlaConfig, ModelConfig, MoeConfig
from deltamoe.conversion import open_source, write_hf
from deltamoe.model import HybridLM
from tests.saved_model import drawn_model, save_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:transformers", "ignore::DeprecationWarning"
)

# Of the largest number. Both compute in fp32, in another order: chunks of another form, a stack of
# experts against a loop. Measured were 6e-6 in a layer's output and 1.4e-5 in logits.
TOLERANCE = 2e-5
VOCAB = 61
LENGTH = 70  # more than a chunk of 64


def geometry(seed: int, mixers: str, dense: int, **changes: Any) -> ModelConfig:
    """Random sizes around a given schedule, "k" and "m" for the mixers."""
    draw = random.Random(seed).randint
    K = 2 * draw(2, 8)
    moe = {"num_experts": 6, "experts_per_token": draw(2, 3), "num_shared_experts": draw(1, 2)}
    return ModelConfig(
        vocab_size=VOCAB,
        dim=draw(17, 40),
        num_layers=len(mixers),
        mlp_dim=draw(10, 50),
        mixers=tuple({"k": "kda", "m": "mla"}[mixer] for mixer in mixers),
        channels=changes.pop("channels", None),
        first_dense_layers=dense,
        norm_eps=10.0 ** -draw(4, 6),
        init_std=0.2,
        kda=KdaConfig(num_heads=draw(1, 4), key_dim=K, value_dim=K, conv_size=draw(3, 4)),
        mla=MlaConfig(
            num_heads=draw(1, 4),
            latent_dim=draw(8, 24),
            nope_dim=draw(4, 12),
            rope_dim=2 * draw(1, 4),
            value_dim=draw(4, 12),
            query_rank=changes.pop("query_rank", None),
        ),
        moe=MoeConfig(expert_dim=draw(6, 20), routed_scale=2.446, **{**moe, **changes}),
    )


GEOMETRIES = {
    "the released pattern": geometry(1, "kkkm", 1),
    "expert groups, none dense": geometry(2, "kmk", 0, num_groups=3, groups_per_token=2),
    "MLA first, two dense": geometry(3, "mkkk", 2),
    "MLA last, not renormalised": geometry(4, "kkm", 1, renormalize=False),
    "MLA alone": geometry(5, "mm", 1),
    "KDA alone": geometry(6, "kkk", 1),
    "a query bottleneck": geometry(7, "km", 0, query_rank=9),
    "experts in every second layer": geometry(8, "kmkm", 0, channels=("moe", "mlp") * 2),
    "one expert a token": geometry(9, "km", 0, experts_per_token=1, renormalize=False),
}


def with_our_epsilon(theirs: nn.Module, config: ModelConfig) -> nn.Module:
    """The latents' norms get the config's epsilon; sizes need not be multiples of 4."""
    theirs.set_experts_implementation("eager")
    for module in theirs.modules():
        for name in ("kv_a_layernorm", "q_a_layernorm"):
            if getattr(module, name, None) is not None:
                getattr(module, name).variance_epsilon = config.norm_eps
    return theirs.eval()


def exported(model: HybridLM, folder: Path, **options: Any) -> Path:
    out = folder / "hf"
    write_hf(open_source(save_model(folder, model)), out, **options)
    return out


def opened(folder: Path, config: ModelConfig, **options: Any) -> nn.Module:
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=False, **options
    )
    assert not any(report.values()), report
    assert type(theirs).__module__.startswith("transformers.models.kimi_linear")
    return with_our_epsilon(theirs, config)


def their_model(config: ModelConfig) -> nn.Module:
    """A model of theirs with weights of theirs, every one drawn."""
    kda, mla, moe = config.kda, config.mla, config.moe
    words = {"kda": "linear_attention", "mla": "full_attention", "mlp": "dense", "moe": "sparse"}
    layers = range(config.num_layers)
    theirs = transformers.KimiLinearForCausalLM(
        transformers.KimiLinearConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers,
            layer_types=[words[config.mixer(i)] for i in layers],
            mlp_layer_types=[words[config.channel(i)] for i in layers],
            rms_norm_eps=config.norm_eps,
            num_attention_heads=mla.num_heads,
            num_key_value_heads=mla.num_heads,
            kv_lora_rank=mla.latent_dim,
            q_lora_rank=mla.query_rank,
            qk_nope_head_dim=mla.nope_dim,
            qk_rope_head_dim=mla.rope_dim,
            v_head_dim=mla.value_dim,
            linear_num_heads=kda.num_heads,
            linear_head_dim=kda.key_dim,
            linear_conv_kernel_dim=kda.conv_size,
            num_local_experts=moe.num_experts,
            num_experts_per_tok=moe.experts_per_token,
            moe_intermediate_size=moe.expert_dim,
            n_shared_experts=moe.num_shared_experts,
            n_group=moe.num_groups,
            topk_group=moe.groups_per_token,
            norm_topk_prob=moe.renormalize,
            routed_scaling_factor=moe.routed_scale,
            initializer_range=0.2,
            pad_token_id=None,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    for name, tensor in theirs.state_dict().items():
        if "norm" in name:
            tensor.uniform_(0.5, 1.5)
        elif "e_score_correction_bias" in name:
            tensor.normal_(0.0, 0.3)
    return with_our_epsilon(theirs, config)


def layer_outputs(model: nn.Module, layers: nn.ModuleList, ids: Tensor, **options: Any) -> Any:
    """The logits, and what leaves each layer."""
    found: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda *call: found.append(call[2][0] if isinstance(call[2], tuple) else call[2])
        )
        for layer in layers
    ]
    with torch.no_grad():
        out = model(ids, **options)
    for hook in hooks:
        hook.remove()
    return out, found


def assert_close(got: Tensor, expected: Tensor, what: str) -> None:
    error = float((got - expected).abs().max() / expected.abs().max())
    assert error < TOLERANCE, f"{what}: {error:.1e} of the largest"


def assert_same_function(ours: HybridLM, theirs: nn.Module) -> None:
    ids = torch.randint(0, VOCAB, (2, LENGTH))
    got, inside = layer_outputs(ours, ours.blocks, ids)
    expected, inside_theirs = layer_outputs(theirs, theirs.model.layers, ids, use_cache=False)
    for number, pair in enumerate(zip(inside, inside_theirs, strict=True)):
        assert_close(*pair, f"layer {number}")
    assert_close(got[0], expected.logits, "logits")
    assert torch.equal(got[0].argmax(-1), expected.logits.argmax(-1))


def our_steps(model: HybridLM, ids: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens taken greedily from the state, each with its logits."""
    state = None
    for _ in range(steps):
        with torch.no_grad():
            logits, state = model(ids, state)
        ids = logits[:, -1:].argmax(-1)
        yield ids, logits[:, -1]


def their_steps(model: nn.Module, ids: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same with their cache; read anew at each step where they have none."""
    has_cache = "full_attention" in model.config.layer_types
    cache, read = None, ids
    for _ in range(steps):
        with torch.no_grad():
            out = model(read, past_key_values=cache, use_cache=has_cache)
        cache, logits = out.past_key_values, out.logits[:, -1]
        new = logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, new], dim=1)
        read = new if has_cache else ids
        yield new, logits


def assert_same_decoding(ours: HybridLM, theirs: nn.Module) -> None:
    prompt = torch.randint(0, VOCAB, (1, 7))
    pairs = zip(our_steps(ours, prompt, 64), their_steps(theirs, prompt, 64), strict=True)
    for step, ((token, logits), (their_token, their_logits)) in enumerate(pairs):
        assert_close(logits, their_logits, f"logits of token {step}")
        assert torch.equal(token, their_token), f"token {step}"


@pytest.mark.parametrize("name", GEOMETRIES)
def test_ours_in_theirs(name: str, tmp_path: Path) -> None:
    model = drawn_model(GEOMETRIES[name])
    theirs = opened(exported(model, tmp_path), model.config)
    assert_same_function(model, theirs)
    assert_same_decoding(model, theirs)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_theirs_in_ours(name: str, tmp_path: Path) -> None:
    config = GEOMETRIES[name]
    theirs = their_model(config)
    theirs.save_pretrained(tmp_path)
    ours = deltamoe.load(tmp_path)
    assert [ours.config.mixer(i) for i in range(len(ours.blocks))] == list(config.mixers)
    assert_same_function(ours, theirs)
    assert_same_decoding(ours, theirs)


def test_their_folder_converted_is_official(tmp_path: Path) -> None:
    """Their wrong names come in, the official ones go out, and they read those."""
    theirs = their_model(GEOMETRIES["the released pattern"])
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    misnamed = set(json.loads((tmp_path / "theirs" / INDEX).read_text())["weight_map"])
    write_hf(open_source(tmp_path / "theirs"), tmp_path / "official")
    stored = set(read_header(tmp_path / "official" / "model.safetensors").tensors)
    assert {name for name in stored if ".0.mlp." in name} == {
        f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    assert stored == {official_name(name) for name in misnamed}
    assert stored != misnamed
    again = opened(tmp_path / "official", GEOMETRIES["the released pattern"])
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_generate_of_theirs_writes_what_ours_does(tmp_path: Path) -> None:
    model = drawn_model(GEOMETRIES["the released pattern"])
    theirs = opened(exported(model, tmp_path), model.config)
    prompt = torch.randint(0, VOCAB, (1, 9))
    written = theirs.generate(
        prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ours = torch.cat([token for token, _ in our_steps(model, prompt, 64)], dim=1)
    assert written[:, 9:].tolist() == ours.tolist()


def test_bf16_goes_through(tmp_path: Path) -> None:
    """A folder in bf16 has the same numbers in both; what they compute in it is their matter."""
    model = drawn_model(GEOMETRIES["the released pattern"])
    folder = exported(model, tmp_path, dtype="bf16")
    narrow = deltamoe.load(folder)
    assert torch.equal(narrow.head.weight, model.head.weight.bfloat16())
    assert opened(folder, model.config).dtype == torch.bfloat16
    # in bf16 they narrow A_log and dt_bias as well, which the folder keeps in fp32
    theirs = opened(folder, model.config, dtype=torch.float32)
    assert_same_function(deltamoe.load(folder, dtype=torch.float32), theirs)
