"""Quantised layers against the same layers with the weights that the codes stand for."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from deltamoe.config import ModelConfig
from deltamoe.errors import ConfigError
from deltamoe.layers.moe import Experts
from deltamoe.layers.quantized import QuantizedExperts, QuantizedLinear, QuantizedMatrix, mix
from deltamoe.layers.router import Routing
from deltamoe.model import HybridLM
from deltamoe.model.quantized import quantize_model
from deltamoe.ops import native
from deltamoe.ops.quantized import dequantize, quantize, quantize_activations
from deltamoe.testing import tiny_config, tiny_model

VARIANTS: dict[str, ModelConfig] = {
    "tiny": tiny_config(),
    "tied": tiny_config(tie_embeddings=True),
    "plain experts": tiny_config(moe=replace(tiny_config().moe, expert="ffn")),
    "no shared expert": tiny_config(moe=replace(tiny_config().moe, num_shared_experts=0)),
    "query bottleneck": tiny_config(mla=replace(tiny_config().mla, query_rank=9)),
    "no output gate": tiny_config(kda=replace(tiny_config().kda, output_gate="none")),
    "all dense": tiny_config(first_dense_layers=4, moe=None),
}


def built(config: ModelConfig) -> HybridLM:
    model = HybridLM(config)
    model.initialize(0)
    return model.eval()


def with_weights_of(quantized: HybridLM, config: ModelConfig) -> HybridLM:
    """An ordinary model whose weights are those that a quantised model's codes stand for."""
    tensors = dict(quantized.state_dict())
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedMatrix):
            del tensors[f"{name}.values"], tensors[f"{name}.scales"]
            is_stack = module.values.ndim == 4
            weight = dequantize(module.quantized, torch.float64)
            tensors[name if is_stack else f"{name}.weight"] = weight
    model = HybridLM(config).double()
    model.load_state_dict(tensors)
    return model.eval()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_is_the_one_its_codes_stand_for(name: str, bits: int) -> None:
    """In fp64, where what is multiplied is not rounded."""
    config = VARIANTS[name]
    quantized = quantize_model(built(config).double(), bits)
    plain = with_weights_of(quantized, config)
    ids = torch.randint(0, config.vocab_size, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, state = quantized(ids)
        theirs, other = plain(ids)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(quantized(ids[:, :1], state)[0], plain(ids[:, :1], other)[0])
        assert (ours - built(config).double()(ids)[0]).abs().max() > 1e-3  # it was rounded


def test_in_fp32_a_few_rows_are_rounded_too() -> None:
    layer = QuantizedLinear.of(nn.Linear(70, 33, bias=False), 4)
    weight = dequantize(layer.quantized, torch.float64)
    x = torch.randn(200, 70, generator=torch.Generator().manual_seed(0))
    # fp32 sums of 70 products
    torch.testing.assert_close(layer(x).double(), x.double() @ weight.T, atol=1e-5, rtol=1e-5)
    if native.why_not("matvec") is None:
        codes, scales = quantize_activations(x)
        rounded = (codes * scales.double()).flatten(-2)[:, :70] @ weight.T
        few = torch.cat([layer(rows) for rows in x.split(4)])
        torch.testing.assert_close(few.double(), rounded, atol=1e-5, rtol=1e-5)
        assert torch.equal(few, torch.cat([layer(row) for row in x.split(1)]))


def test_bf16_in_bf16_out() -> None:
    model = quantize_model(tiny_model(torch.bfloat16), 8)
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        hidden = model.hidden(ids).hidden
        assert hidden.dtype == torch.bfloat16
        assert model(ids)[0].isfinite().all()


def test_training_is_refused_in_words() -> None:
    model = quantize_model(tiny_model(), 8)
    with pytest.raises(ConfigError, match="cannot be trained"):
        model.train()
    model.eval()
    assert all(not p.requires_grad for m in quantized_matrices(model) for p in m.buffers())


def test_a_change_of_dtype_leaves_the_codes_alone() -> None:
    model = quantize_model(tiny_model(), 4)
    before = [(m.values, m.scales) for m in quantized_matrices(model)]
    model.to(torch.bfloat16)
    for matrix, (values, scales) in zip(quantized_matrices(model), before, strict=True):
        assert torch.equal(matrix.values, values)
        assert matrix.scales.dtype == torch.float16
        assert torch.equal(matrix.scales, scales)


def test_only_the_chosen_experts_are_read() -> None:
    moe = replace(tiny_config().moe, num_experts=6)
    experts = Experts(24, moe)
    nn.init.normal_(experts.w_up), nn.init.normal_(experts.w_down), nn.init.normal_(experts.w_gate)
    layer = QuantizedExperts.of(experts, 4)
    x = torch.randn(3, 24)
    routing = chosen([[1, 4], [4, 2], [1, 2]], 6)
    expected, counts = layer(x, routing)
    for unused in (0, 3, 5):
        layer.w_up.scales[unused] = torch.nan
    answers, _ = layer(x, routing)
    assert torch.equal(answers, expected)
    assert counts.tolist() == [0, 2, 2, 0, 2, 0]


def test_the_order_of_the_experts_changes_no_bit() -> None:
    experts = Experts(24, tiny_config().moe)
    for weight in experts.parameters():
        nn.init.normal_(weight)
    layer = QuantizedExperts.of(experts, 8)
    x = torch.randn(4, 24)
    routing = chosen([[1, 4], [4, 2], [1, 2], [0, 1]], 5)
    forth = [(e, e) for e in (0, 1, 2, 4)]
    expected, _ = mix(x, routing, layer.answer, forth)
    back, _ = mix(x, routing, layer.answer, forth[::-1])
    assert torch.equal(back, expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_many_rows_of_an_expert_meet_its_weights_unpacked(bits: int) -> None:
    experts = Experts(24, tiny_config().moe)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=0.2)
    layer = QuantizedExperts.of(experts, bits)
    up, gate, down = (
        dequantize(matrix.quantized, torch.float64)[1]
        for matrix in (layer.w_up, layer.w_gate, layer.w_down)
    )
    x = torch.randn(200, 24)
    wide = x.double()
    expected = (nn.functional.silu(wide @ gate.T) * (wide @ up.T)) @ down.T
    # fp32 sums of 24 products of order one; rounding x to 8 bits would miss by 1e-2
    torch.testing.assert_close(layer.answer(1, x).double(), expected, rtol=1e-5, atol=1e-5)


def quantized_matrices(model: nn.Module) -> list[QuantizedMatrix]:
    return [m for m in model.modules() if isinstance(m, QuantizedMatrix)]


def chosen(expert_ids: list[list[int]], num_experts: int) -> Routing:
    """A routing of equal weights."""
    ids = torch.tensor(expert_ids)
    scores = torch.zeros(len(ids), num_experts)
    return Routing(
        scores,
        scores,
        ids,
        torch.full(ids.shape, 0.5),
        torch.bincount(ids.flatten(), minlength=num_experts),
        torch.zeros((), dtype=torch.int64),
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_a_large_matrix_is_rounded_like_its_rows(bits: int) -> None:
    """Rounding goes block by block, so that it takes little memory."""
    weight = torch.randn(600, 1000, generator=torch.Generator().manual_seed(0))
    whole = quantize(weight, bits)
    parts = [quantize(rows, bits) for rows in weight.split(32)]
    assert torch.equal(whole.values, torch.cat([part.values for part in parts]))
    assert torch.equal(whole.scales, torch.cat([part.scales for part in parts]))
