"""What a call into C++ is told of tensors and threads.

Boundary: knows no operator.
"""

import torch
from torch import Tensor

__all__ = ["address", "num_threads"]

_SMALL = 2**15
"""Elements below which waking the other threads costs more than they bring."""


def address(tensor: Tensor | None) -> int | None:
    """Where the tensor's first element lies; None for no tensor (a null pointer)."""
    return None if tensor is None else tensor.data_ptr()


def num_threads(elements: int) -> int:
    """How many threads should share work that looks at each of ``elements`` once."""
    return 1 if elements < _SMALL else torch.get_num_threads()
