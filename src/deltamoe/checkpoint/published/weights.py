"""From a published folder to a model, tensor by tensor.

Each tensor's bytes are mapped, checked, copied to their place and let go, so that reading costs the
model and one tensor. Everything about names and shapes was settled by ``open_published``.
"""

import torch
from torch import Tensor

from deltamoe.checkpoint.published.folder import PublishedFolder
from deltamoe.checkpoint.tensors import DTYPES, map_tensor, require_finite
from deltamoe.errors import DoesNotFitError
from deltamoe.model import HybridLM
from deltamoe.plan import machine_memory, weights

__all__ = ["read_model", "read_published_tensor"]


def read_model(
    folder: PublishedFolder,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> HybridLM:
    """Read a published folder's weights into a model.

    Args:
        folder: with the configuration that the model gets; ``dataclasses.replace`` on
            ``folder.config`` chooses other readings of the same tensors.
        dtype: of the weights; None is that of the folder's embedding. ``A_log``, ``dt_bias`` and
            the balance bias are never narrower than fp32.
        device: where the weights go, one by one.

    Returns:
        the model, in evaluation mode.

    Raises:
        DoesNotFitError: the model is larger than this machine's memory; said before anything is
            allocated.
        CheckpointError: NaN or infinity among the weights, or a file that changed meanwhile.
    """
    narrow = DTYPES[folder.dtype] if dtype is None else dtype
    wide = torch.promote_types(narrow, torch.float32)
    device = torch.device(device)
    dtypes = {w.name: wide if w.is_fp32 else narrow for w in weights(folder.config)}
    shapes = {w.name: w.shape for w in weights(folder.config)}
    if device.type == "cpu":
        _require_room(folder, sum(w.size * dtypes[w.name].itemsize for w in weights(folder.config)))
    tensors: dict[str, Tensor] = {}
    for tensor in folder.tensors():
        value = read_published_tensor(folder, tensor.name)
        if tensor.ours not in tensors:
            tensors[tensor.ours] = torch.empty(
                shapes[tensor.ours], dtype=dtypes[tensor.ours], device=device
            )
        ours = tensors[tensor.ours]
        place = ours if tensor.expert is None else ours[tensor.expert]
        place.copy_(value.view(place.shape))
    with torch.device("meta"):
        model = HybridLM(folder.config)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def read_published_tensor(folder: PublishedFolder, name: str) -> Tensor:
    """One tensor by its official name, as a view of the mapped file in the file's dtype.

    Raises:
        CheckpointError: it holds NaN or infinity, or the file changed since it was opened.
    """
    header, stored = folder.places[name]
    value = map_tensor(header, stored)
    require_finite({name: value}, source=str(header.path))
    return value


def _require_room(folder: PublishedFolder, num_bytes: int) -> None:
    if num_bytes > machine_memory():
        raise DoesNotFitError(
            f"{folder.path}: the model takes {num_bytes:,} bytes, this machine has "
            f"{machine_memory():,} of memory; a narrower dtype or another device may do"
        )
