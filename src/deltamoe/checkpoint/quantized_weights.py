"""From the file of a quantised model to the model: its bytes become the layers' codes and scales.

Each tensor is mapped alone, so that a file larger than the memory can be opened too. With a budget
the experts are not mapped but read one by one as they are needed (expert_file.py).

What the file holds is in quantized.py.
"""

import torch
from torch import Tensor

from deltamoe.checkpoint.expert_file import cache_experts
from deltamoe.checkpoint.header import Header
from deltamoe.checkpoint.quantized import check_stored, stored_tensors
from deltamoe.checkpoint.tensors import (
    DTYPE_CODES,
    map_tensor,
    require_finite,
    stored_dtype,
)
from deltamoe.config.model import ModelConfig
from deltamoe.errors import CheckpointError, ConfigError, DoesNotFitError
from deltamoe.model import HybridLM
from deltamoe.model.quantized import build_quantized
from deltamoe.plan import Bits, generation_plan

__all__ = ["read_quantized"]

_CONTEXT = 4096  # tokens of the sequence that a budget makes room for


def read_quantized(
    header: Header,
    config: ModelConfig,
    bits: Bits,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    memory: int | None,
) -> HybridLM:
    """Build a quantised model on the bytes of its file; arguments and errors as for ``load``.

    Finite are all tensors that are mapped; experts that stay on the disk are looked at when they
    are read.
    """
    check_stored(header, config)
    narrow = stored_dtype(header)
    num_slots = None
    if memory is not None:
        num_slots = _slots_within(memory, header, config, bits, device)
    model = build_quantized(config, bits)
    if num_slots is not None:
        cache_experts(model, header, num_slots=num_slots)
    tensors: dict[str, Tensor] = {}
    for weight, spec in stored_tensors(config, bits, dtype=DTYPE_CODES[narrow]):
        if header.tensors[spec.name].dtype != spec.dtype:
            raise CheckpointError(
                f"{header.path}: tensor {spec.name!r} is {header.tensors[spec.name].dtype}; "
                f"expected {spec.dtype}"
            )
        if num_slots is not None and weight.part == "experts":
            continue
        tensor = map_tensor(header, spec.name)
        require_finite({spec.name: tensor}, source=str(header.path))
        if dtype is not None and spec.name == weight.name:
            wide = torch.promote_types(dtype, torch.float32)
            tensor = tensor.to(wide if weight.is_fp32 else dtype)
        tensors[spec.name] = tensor.to(device)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _slots_within(
    memory: int, header: Header, config: ModelConfig, bits: Bits, device: torch.device
) -> int:
    """How many experts may be in memory at a time."""
    if not config.moe or "moe" not in map(config.channel, range(config.num_layers)):
        raise ConfigError(
            f"memory = {memory:,}: this model has no experts that could stay on the disk"
        )
    if device.type != "cpu":
        raise ConfigError(f"memory = {memory:,}: an expert cache is for the CPU, not for {device}")
    costs = generation_plan(
        config,
        context=_CONTEXT,
        memory_bytes=memory,
        dtype="fp32" if stored_dtype(header).itemsize > 2 else "bf16",
        bits=bits,
    )
    least = config.moe.experts_per_token
    if costs.cached_experts < least:
        needed = costs.resident_bytes + least * costs.expert_bytes
        raise DoesNotFitError(
            f"memory = {memory:,} bytes: the program, one sequence, all weights but the experts "
            f"and the {least} experts of a token take {needed:,}; give that or more"
        )
    return costs.cached_experts
