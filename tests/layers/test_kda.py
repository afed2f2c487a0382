"""The KDA layer, against its formulas one by one, in every variant the paper ablates."""

import pytest
import torch
import torch.nn.functional as F

from deltamoe.config.model import KdaConfig
from deltamoe.layers import Kda

B, T, D = 2, 7, 9

VARIANTS = [
    {},
    {"conv_size": 0},
    {"conv_size": 2},
    {"output_gate": "none"},
    {"output_gate": "swish"},
    {"decay": "bounded", "decay_lower_bound": -3.0},
    {"max_beta": 2.0},
    {"num_value_heads": 6},
    {"decay_rank": 4, "output_gate_rank": 3},
]


def kda(**changes) -> Kda:
    layer = Kda(D, KdaConfig(**{"num_heads": 3, "key_dim": 5, "value_dim": 4, **changes}), 1e-5)
    layer.double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def by_formula(layer: Kda, x: torch.Tensor) -> torch.Tensor:
    """One row, token by token, written out from the paper."""
    c = layer.config
    H, HV, K, V = c.num_heads, c.value_heads, c.key_dim, c.value_dim
    time = len(x)

    def conv(y: torch.Tensor, taps: torch.Tensor | None) -> torch.Tensor:
        if taps is None:
            return F.silu(y)
        width = taps.shape[1]
        y = torch.cat([y.new_zeros(width - 1, y.shape[1]), y])
        return F.silu(torch.stack([(taps.T * y[t : t + width]).sum(0) for t in range(time)]))

    taps = {n: getattr(layer, f"{n}_conv").weight if c.conv_size else None for n in "qkv"}
    q = conv(x @ layer.q_proj.weight.T, taps["q"]).view(time, H, K)
    k = conv(x @ layer.k_proj.weight.T, taps["k"]).view(time, H, K)
    v = conv(x @ layer.v_proj.weight.T, taps["v"]).view(time, HV, V)
    q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt() / K**0.5
    k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    raw = (x @ layer.decay_down.weight.T @ layer.decay_up.weight.T).view(time, HV, K)
    raw = raw + layer.dt_bias.view(HV, K)
    rate = layer.A_log.exp()[:, None]
    if c.decay == "bounded":
        decay = (c.decay_lower_bound * (rate * raw).sigmoid()).exp()
    else:
        decay = (-rate * F.softplus(raw)).exp()
    beta = c.max_beta * (x @ layer.beta_proj.weight.T).sigmoid()
    outputs = []
    memory = x.new_zeros(HV, K, V)
    for t in range(time):
        for h in range(HV):
            key, query = k[t, h // (HV // H)], q[t, h // (HV // H)]
            M = decay[t, h][:, None] * memory[h]
            M = M + torch.outer(key, beta[t, h] * (v[t, h] - key @ M))
            memory = torch.stack([M if i == h else memory[i] for i in range(HV)])
            out = query @ M
            out = out / (out.square().mean() + 1e-5).sqrt() * layer.output_norm.weight
            if c.output_gate != "none":
                logits = layer.output_gate_up.weight @ (layer.output_gate_down.weight @ x[t])
                z = logits.view(HV, V)[h]
                out = out * (F.silu(z) if c.output_gate == "swish" else z.sigmoid())
            outputs.append(out)
    return torch.stack(outputs).view(time, HV * V) @ layer.o_proj.weight.T


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_layer_is_the_formula(variant: dict) -> None:
    layer = kda(**variant)
    x = torch.randn(B, T, D, dtype=torch.float64)
    y, _ = layer(x)
    for row in range(B):
        torch.testing.assert_close(y[row], by_formula(layer, x[row]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_state_has_the_promised_shape(variant: dict) -> None:
    layer = kda(**variant)
    _, after = layer(torch.randn(B, T, D, dtype=torch.float64))
    for got, promised in zip(after, layer.initial_state(B), strict=True):
        assert got.shape == promised.shape
        assert got.dtype == promised.dtype


def test_every_parameter_is_used() -> None:
    layer = kda()
    layer(torch.randn(B, T, D, dtype=torch.float64))[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_bf16_keeps_its_islands() -> None:
    """Under autocast the decay, beta and the memory stay fp32."""
    layer = kda().float()
    x = torch.randn(B, T, D)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
        assert layer.log_decay(x).dtype == torch.float32
        assert layer.beta(x).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    assert state.memory.dtype == torch.float32
