"""From a folder to a model.

The configuration's names and shapes are compared with the file's header before anything is built;
the model is then built without memory (on the meta device), and the file's own bytes become its
weights.

Knows nothing of tokenizers and of training; ``find_checkpoint`` decides which files are read.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from deltamoe.checkpoint.folder import CONFIG, WEIGHTS, Checkpoint
from deltamoe.checkpoint.header import Header, check_shapes, read_header
from deltamoe.checkpoint.published import is_published, open_published
from deltamoe.checkpoint.published.weights import read_model
from deltamoe.checkpoint.quantized import quantization_of
from deltamoe.checkpoint.quantized_weights import read_quantized
from deltamoe.checkpoint.run_folder import find_checkpoint, load_config
from deltamoe.checkpoint.tensors import read_tensors, stored_dtype
from deltamoe.config.model import ModelConfig
from deltamoe.errors import ConfigError
from deltamoe.model import HybridLM
from deltamoe.model.quantized import quantize_model
from deltamoe.plan import Bits, weights

__all__ = ["load"]


def load(
    path: Path | str | Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantize: Bits | None = None,
    memory: int | None = None,
) -> HybridLM:
    """Load a model from a run folder (its newest good checkpoint), a step or a published folder.

    On the CPU, without a change of dtype, the weights of ours are private views of the mapped file:
    they cost no copy and cannot be written back by accident. A published folder is read tensor by
    tensor and costs the model and one tensor.

    Args:
        path: the folder, or a checkpoint that was opened already.
        dtype: of the weights; None keeps the file's. ``A_log``, ``dt_bias`` and the router's
            ``balance_bias`` are never narrower than fp32.
        device: where the weights go.
        quantize: round the matrices to so many bits; of a model that is quantised already, what it
            must have.
        memory: bytes for the model, one sequence and the program together: the experts of a
            quantised checkpoint stay on the disk, and as many as fit are kept in memory. None
            keeps all.

    Returns:
        the model, in evaluation mode.

    Raises:
        CheckpointError: no good checkpoint; a damaged or newer one; tensors that disagree with the
            configuration; NaN or infinity among the weights.
        ConfigError: ``quantize`` other bits than the file's; ``memory`` for a model that is not
            quantised on the disk or has no experts, or on another device than the CPU.
        DoesNotFitError: a published model larger than this machine's memory; ``memory`` too small
            for what must stay.
    """
    checkpoint = path if isinstance(path, Checkpoint) else find_checkpoint(path)
    if is_published(checkpoint.path):
        _refuse_memory(checkpoint.path, memory)
        model = read_model(open_published(checkpoint.path), dtype=dtype, device=device)
        return model if quantize is None else quantize_model(model, quantize)
    config = load_config(checkpoint.file(CONFIG).parent)
    header = read_header(checkpoint.file(WEIGHTS))
    bits = quantization_of(header)
    if bits is None:
        _refuse_memory(checkpoint.path, memory)
        model = _read_plain(header, config, dtype=dtype, device=device)
        return model if quantize is None else quantize_model(model, quantize)
    if quantize not in (None, bits):
        raise ConfigError(
            f"{checkpoint.path}: quantised to {bits} bits already; for {quantize} start from the "
            "model it was made from"
        )
    return read_quantized(
        header, config, bits, dtype=dtype, device=torch.device(device), memory=memory
    )


def _refuse_memory(path: Path, memory: int | None) -> None:
    if memory is not None:
        raise ConfigError(
            f"{path}: memory = {memory:,}: only the experts of a quantised checkpoint can stay on "
            "the disk; write one with `deltamoe quantize`"
        )


def _read_plain(
    header: Header, config: ModelConfig, *, dtype: torch.dtype | None, device: torch.device | str
) -> HybridLM:
    check_shapes(header, ((weight.name, weight.shape) for weight in weights(config)))
    wide = {weight.name for weight in weights(config) if weight.is_fp32}
    with torch.device("meta"):
        model = HybridLM(config)
    expected = _as_dtype(model.state_dict(), stored_dtype(header), wide)
    tensors = read_tensors(header.path, expected=expected, device=device)
    if dtype is not None:
        tensors = _as_dtype(tensors, dtype, wide)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _as_dtype(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, wide: Collection[str]
) -> dict[str, Tensor]:
    """The tensors in ``dtype``; the ``wide`` ones in fp32, or in ``dtype`` if that is wider."""
    widened = torch.promote_types(dtype, torch.float32)
    return {name: tensor.to(widened if name in wide else dtype) for name, tensor in tensors.items()}
