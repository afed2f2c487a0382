"""flash-linear-attention's kernels are the recurrence too; needs a CUDA device and fla-core."""

import pytest
import torch

from deltamoe.ops.backend import BACKENDS
from deltamoe.ops.kda import kda_chunk, kda_recurrent
from tests.ops.kda.inputs import REGIMES, kda_inputs, outputs_and_gradients

_device = "cuda" if torch.cuda.is_available() else "cpu"
_reason = next(b for b in BACKENDS["kda"] if b.name == "fla").why_not(_device, torch.bfloat16)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_reason is not None, reason=f"fla: {_reason}")]


@pytest.mark.parametrize("regime", [r for r in REGIMES if r != "negative_eigenvalues"])
@pytest.mark.parametrize("T", [63, 64, 200])
def test_chunk_is_the_recurrence(regime: str, T: int) -> None:
    sizes = (2, 2, 4, 64, 32)
    inputs = kda_inputs(regime, T, torch.bfloat16, sizes=sizes)
    inputs["memory"] = inputs["memory"].detach().float().requires_grad_()
    exact = outputs_and_gradients(
        lambda *a: kda_recurrent(*a, backend="reference"),
        {n: x.detach().double().requires_grad_() for n, x in inputs.items()},
    )
    on_gpu = {n: x.detach().cuda().requires_grad_() for n, x in inputs.items()}
    got = outputs_and_gradients(lambda *a: kda_chunk(*a, backend="fla"), on_gpu)
    for name, want in exact.items():
        # the kernels keep intermediate matrices in bf16: relative RMS error 2^-7 forward, and
        # 2^-5 for the gradients of decay and beta, which are sums that largely cancel
        limit = 2**-5 if name in ("d_log_decay", "d_beta") else 2**-6
        error = (got[name].double().cpu() - want).norm() / want.norm().clamp(min=1e-6)
        assert error < limit, f"{name}: relative error {error:.2e}"
