"""What a conversion would write, before it writes anything.

Knows nothing of formats: each writer fills one in. No torch.
"""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["ConversionPlan", "PlannedFile"]


@dataclass(frozen=True)
class PlannedFile:
    """A file of weights; ``num_bytes`` is its exact size, header included."""

    name: str
    num_bytes: int
    num_tensors: int


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """One conversion.

    Attributes:
        source, out: paths.
        kind: of the source, as ``Source.kind``.
        to: the target format, "hf", "gguf" or "deltamoe".
        dtype: of the written matrices, in the target's word.
        num_parameters: elements written.
        files: those that hold weights; configuration and vocabulary come on top.
        tokenizer: its name; None if the source has none.
        notes: what changes on the way, a sentence each.
    """

    source: str
    out: str
    kind: str
    to: str
    dtype: str
    num_parameters: int
    files: tuple[PlannedFile, ...]
    tokenizer: str | None
    notes: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights' files."""
        return sum(file.num_bytes for file in self.files)

    @property
    def num_tensors(self) -> int:
        """Tensors of all files."""
        return sum(file.num_tensors for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """For one JSON object."""
        return asdict(self) | {"num_bytes": self.num_bytes, "num_tensors": self.num_tensors}
