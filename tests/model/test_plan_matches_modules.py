"""plan knows every tensor of a model without building it; here the models are built."""

from dataclasses import replace

import pytest
import torch

from deltamoe.config import PRESETS, preset, resolve
from deltamoe.model import HybridLM
from deltamoe.plan import activation_bytes, cache_bytes_per_token, state_bytes_per_sequence, weights
from deltamoe.testing import tiny_config
from deltamoe.training.optimizer import rule_for

TINY = tiny_config()
VARIANTS = {
    "tiny": TINY,
    "tied": replace(TINY, tie_embeddings=True),
    "all KDA": replace(TINY, mla_every=0, mla=None),
    "all MLA": replace(TINY, mla_every=1, kda=None),
    "all dense": replace(TINY, first_dense_layers=4, moe=None),
    "spelt out": replace(
        TINY, mixers=("mla", "kda", "kda", "mla"), channels=("moe", "mlp", "moe", "mlp")
    ),
    "no output gate": replace(TINY, kda=replace(TINY.kda, output_gate="none")),
    "swish output gate": replace(
        TINY, kda=replace(TINY.kda, output_gate="swish", output_gate_rank=7)
    ),
    "no convolution": replace(TINY, kda=replace(TINY.kda, conv_size=0)),
    "bounded decay": replace(TINY, kda=replace(TINY.kda, decay="bounded")),
    "no grouped values": replace(TINY, kda=replace(TINY.kda, num_value_heads=None)),
    "query bottleneck": replace(TINY, mla=replace(TINY.mla, query_rank=9)),
    "rope": replace(TINY, mla=replace(TINY.mla, has_rope=True)),
    "no rope channels": replace(TINY, mla=replace(TINY.mla, rope_dim=0)),
    "plain experts": replace(TINY, moe=replace(TINY.moe, expert="ffn")),
    "no shared expert": replace(TINY, moe=replace(TINY.moe, num_shared_experts=0)),
    "two shared experts": replace(TINY, moe=replace(TINY.moe, num_shared_experts=2)),
    "plain and shared": replace(TINY, moe=replace(TINY.moe, expert="ffn", num_shared_experts=3)),
    "no balance bias": replace(TINY, moe=replace(TINY.moe, has_balance_bias=False)),
    "noisy top-k": replace(TINY, moe=replace(TINY.moe, has_noisy_topk=True)),
    "capacity": replace(TINY, moe=replace(TINY.moe, capacity_factor=1.25)),
}
CONFIGS = VARIANTS | {name: preset(name).model for name in PRESETS}


@pytest.fixture(scope="module")
def built():
    with torch.device("meta"):
        return {name: HybridLM(config) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_by_name_and_shape(built, name):
    real = {key: tuple(tensor.shape) for key, tensor in built[name].state_dict().items()}
    assert {w.name: w.shape for w in weights(CONFIGS[name])} == real


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_trained_and_by_which_optimizer(built, name):
    parameters = {key: rule_for(key).method for key, _ in built[name].named_parameters()}
    planned = {w.name: w.optimizer for w in weights(CONFIGS[name]) if w.optimizer != "none"}
    if CONFIGS[name].tie_embeddings:  # one matrix, listed once
        parameters.pop("head.weight", None)
    assert planned == parameters


@pytest.fixture
def bf16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("bf16_by_default")
@pytest.mark.parametrize("name", VARIANTS)
def test_what_stays_in_fp32(name):
    with torch.device("meta"):
        model = HybridLM(CONFIGS[name])
    real = {key for key, t in model.state_dict().items() if t.dtype == torch.float32}
    assert {w.name for w in weights(CONFIGS[name]) if w.is_fp32} == real


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_the_state_has_the_planned_bytes(name, dtype, torch_dtype):
    model = HybridLM(CONFIGS[name])
    model.initialize(0)
    model.to(torch_dtype).eval()
    ids = torch.randint(CONFIGS[name].vocab_size, (2, 5))
    with torch.no_grad():
        _, state = model(ids)
    tensors = [tensor for layer in state.layers for tensor in layer]
    fixed = state_bytes_per_sequence(CONFIGS[name], dtype)
    growing = cache_bytes_per_token(CONFIGS[name], dtype)
    assert sum(t.numel() * t.element_size() for t in tensors) == 2 * (fixed + 5 * growing)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.mla_every=1", "model.first_dense_layers=4"],
        ["model.mla_every=0", "model.first_dense_layers=4"],
    ],
    ids=["nano", "all MLA and dense", "all KDA and dense"],
)
def test_the_estimate_of_activations(overrides):
    run, _ = resolve("nano", ["data.rows=1", "data.context=128", *overrides])
    model = HybridLM(run.model)
    model.initialize(0)
    weight_storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stored = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weight_storages:
            stored[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    ids = torch.randint(run.model.vocab_size, (1, 128))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden(ids, cu_seqlens=torch.tensor([0, 128]))
    assert hidden.hidden.requires_grad
    blocks = activation_bytes(run) - 128 * 4 * run.model.dim
    # A quarter is what the formula promises: it counts tensors by hand, layer by layer.
    assert sum(size for _, size in stored.values()) == pytest.approx(blocks, rel=0.25)
