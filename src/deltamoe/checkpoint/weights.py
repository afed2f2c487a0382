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
from deltamoe.checkpoint.run_folder import find_checkpoint, load_config
from deltamoe.checkpoint.tensors import DTYPES, read_tensors
from deltamoe.errors import CheckpointError
from deltamoe.model import HybridLM
from deltamoe.plan import weights

__all__ = ["load"]


def load(
    path: Path | str | Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> HybridLM:
    """Load a model from a run folder (its newest good checkpoint) or a step folder.

    On the CPU, without a change of dtype, the weights are private views of the mapped file: they
    cost no copy and cannot be written back by accident.

    Args:
        path: the folder, or a checkpoint that was opened already.
        dtype: of the weights; None keeps the file's. ``A_log``, ``dt_bias`` and the router's
            ``balance_bias`` are never narrower than fp32.
        device: where the weights go.

    Returns:
        the model, in evaluation mode.

    Raises:
        CheckpointError: no good checkpoint; a damaged or newer one; a published model; tensors
            that disagree with the configuration; NaN or infinity among the weights.
    """
    checkpoint = path if isinstance(path, Checkpoint) else find_checkpoint(path)
    config = load_config(checkpoint.file(CONFIG).parent)
    header = read_header(checkpoint.file(WEIGHTS))
    check_shapes(header, ((weight.name, weight.shape) for weight in weights(config)))
    wide = {weight.name for weight in weights(config) if weight.is_fp32}
    with torch.device("meta"):
        model = HybridLM(config)
    expected = _as_dtype(model.state_dict(), _stored_dtype(header), wide)
    tensors = read_tensors(header.path, expected=expected, device=device)
    if dtype is not None:
        tensors = _as_dtype(tensors, dtype, wide)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _stored_dtype(header: Header) -> torch.dtype:
    """What all weights but the wide ones must be stored in: the embedding's dtype."""
    code = header.tensors["embedding.weight"].dtype
    if code not in DTYPES or not DTYPES[code].is_floating_point:
        raise CheckpointError(
            f"{header.path}: tensor 'embedding.weight' is {code}; expected F32, BF16, F16 or F64"
        )
    return DTYPES[code]


def _as_dtype(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, wide: Collection[str]
) -> dict[str, Tensor]:
    """The tensors in ``dtype``; the ``wide`` ones in fp32, or in ``dtype`` if that is wider."""
    widened = torch.promote_types(dtype, torch.float32)
    return {name: tensor.to(widened if name in wide else dtype) for name, tensor in tensors.items()}
