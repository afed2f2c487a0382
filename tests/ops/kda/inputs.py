"""Inputs for KDA with every dimension a different size, from easy to hostile."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

B, H, HV, K, V = 2, 3, 6, 5, 7

# name -> (keys' correlation, decay, beta). Random keys hide what correlated ones show: a poor
# inverse loses every digit only when keys point the same way and beta is near 1.
REGIMES = {
    "random": (0.0, "mild", "random"),
    "no_decay": (0.0, "none", "random"),
    "correlated": (0.95, "none", "one"),
    "correlated_slow": (0.99, "slow", "one"),
    "strong_decay": (0.0, "to_-1000", "random"),
    "mixed_decay": (0.5, "mixed", "random"),
    "erasing": (0.5, "with_-inf", "one"),
    "negative_eigenvalues": (0.9, "slow", "two"),
    "no_write": (0.0, "mild", "zero"),
}


def kda_inputs(
    regime: str,
    T: int,
    dtype: torch.dtype = torch.float64,
    *,
    sequences: int | None = None,
    sizes: tuple[int, int, int, int, int] = (B, H, HV, K, V),
) -> dict[str, Tensor]:
    """q, k, v, log_decay, beta, memory; gradients are wanted for all of them."""
    batch, heads, value_heads, key_dim, value_dim = sizes
    correlation, decay, write = REGIMES[regime]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    k = normal(batch, T, heads, key_dim) * (1 - correlation)
    k = k + correlation * normal(1, 1, heads, key_dim)
    log_decay = -torch.rand(batch, T, value_heads, key_dim, dtype=torch.float64)
    if decay == "none":
        log_decay = log_decay * 0
    elif decay == "slow":
        log_decay = log_decay * 1e-3
    elif decay == "to_-1000":
        log_decay = log_decay * 1000
    elif decay == "mixed":  # neighbouring channels and steps from no decay to none left
        log_decay = -(10 ** (8 * torch.rand_like(log_decay) - 5))
    elif decay == "with_-inf":
        log_decay = log_decay.masked_fill(torch.rand_like(log_decay) < 0.1, -torch.inf)
    beta = torch.rand(batch, T, value_heads, dtype=torch.float64)
    beta = {"random": beta, "one": 1 - 1e-3 * beta, "two": 2 - 1e-3 * beta, "zero": beta * 0}[write]
    inputs = {
        "q": normalize(normal(batch, T, heads, key_dim), dim=-1) * key_dim**-0.5,
        "k": normalize(k, dim=-1),
        "v": normal(batch, T, value_heads, value_dim),
        "log_decay": log_decay,
        "beta": beta,
        "memory": normal(sequences or batch, value_heads, key_dim, value_dim),
    }
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


def outputs_and_gradients(function, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Outputs, final memory, and every input's gradient of one fixed random sum of both."""
    out, memory = function(*inputs.values(), **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype)).sum()  # exact in all
        for x in (out, memory)
    )
    gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    named = {f"d_{name}": g for name, g in zip(inputs, gradients, strict=True)}
    return {"out": out.detach(), "memory": memory.detach(), **named}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within ``tolerance`` of the expected one's largest entry, and finite."""
    for name, want in expected.items():
        got = actual[name]
        if want is None:
            assert got is None or not got.any(), f"{name}: {got} is not zero"
            continue
        assert got.shape == want.shape, f"{name}: shape {got.shape}, not {want.shape}"
        assert got.isfinite().all(), f"{name} is not finite"
        scale = max(want.abs().max().item(), 1.0) if want.numel() else 1.0
        error = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
        assert error <= tolerance * scale, f"{name}: off by {error:.2e} of {scale:.2e}"
