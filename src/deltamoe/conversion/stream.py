"""Tensors on their way into files: converted one piece at a time, checked, counted.

Knows neither names nor formats. torch is imported when the first piece passes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deltamoe.checkpoint.header import TensorSpec
from deltamoe.checkpoint.published.config import DTYPE_NAMES
from deltamoe.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DTYPES", "OTHER_BYTES", "Progress", "Stream", "stored_dtype"]

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how many bytes are written, and of how many."""

DTYPES: Mapping[str, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""Our word for a dtype -> safetensors'."""

OTHER_BYTES = 64 << 20
"""Room to ask of the disk for vocabulary and configuration."""


def stored_dtype(dtype: str | None, source_dtype: str) -> str:
    """The dtype to write, in the word of safetensors: the one asked for, or else the source's.

    Raises:
        ConfigError: not one that other programs read.
    """
    stored = source_dtype if dtype is None else DTYPES.get(dtype, dtype)
    if stored not in DTYPE_NAMES:
        raise ConfigError(f"dtype {stored}: expected {', '.join(DTYPES)}; choose one by --dtype")
    return stored


@dataclass
class Stream:
    """Writes files of weights and knows how far it is.

    Attributes:
        source: what an error calls the tensors' origin.
        num_bytes: of all files together.
        progress: is told after each piece.
    """

    source: str
    num_bytes: int
    progress: Progress | None = None
    _written: int = 0

    def write(
        self,
        path: Path,
        specs: Sequence[TensorSpec],
        pieces: Callable[[TensorSpec], Iterable["Tensor"]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write one file; each piece may be of any float dtype.

        Raises:
            CheckpointError: a number is too large for the dtype it is to be written in.
        """
        from deltamoe.checkpoint.tensors import write_pieces

        def converted(spec: TensorSpec) -> Iterator["Tensor"]:
            for piece in pieces(spec):
                piece = self._converted(piece, spec)
                yield piece
                self._written += piece.nbytes
                if self.progress is not None:
                    self.progress("weights", self._written, self.num_bytes)

        write_pieces(path, specs, converted, metadata)

    def _converted(self, piece: "Tensor", spec: TensorSpec) -> "Tensor":
        from deltamoe.checkpoint.tensors import DTYPES as TORCH_DTYPES
        from deltamoe.checkpoint.tensors import require_finite

        dtype = TORCH_DTYPES[spec.dtype]
        if piece.dtype == dtype:
            return piece
        piece = piece.to(dtype)
        require_finite({spec.name: piece}, source=f"{self.source} as {spec.dtype}")
        return piece
