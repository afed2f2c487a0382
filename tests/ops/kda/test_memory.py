"""The fast backend's memory is bounded: never T x C x K."""

import torch

from deltamoe.ops.kda import kda_chunk
from tests.ops.kda.inputs import kda_inputs


def test_saved_and_peak_memory_is_linear_in_the_keys() -> None:
    T, H, K, V, C = 512, 2, 32, 16, 64
    inputs = kda_inputs("random", T, torch.float32, sizes=(1, H, H, K, V))
    forbidden = T * H * C * K * 4
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    with Watch():
        out, memory = kda_chunk(*inputs.values(), backend="dyadic")
        (out.sum() + memory.sum()).backward()
    # the largest single tensor is q and k's rows side by side, or a C-wide matrix
    assert largest <= 2 * T * H * max(C, K, V) * 4
    assert largest < forbidden / 8
