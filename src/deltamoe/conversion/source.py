"""What is converted: a checkpoint of ours, a published folder or a GGUF file, seen the same way.

Tensors are asked for by their published place (``PublishedTensor``), since every published tensor
is one of ours or a slice of one; so each is read alone, in whichever form it lies on the disk.

Knows nothing of where it goes. torch is imported when a tensor is read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deltamoe.checkpoint import Checkpoint, find_checkpoint, load_run_config, read_header
from deltamoe.checkpoint.folder import CONFIG, WEIGHTS
from deltamoe.checkpoint.header import check_shapes
from deltamoe.checkpoint.published import (
    PublishedTensor,
    is_published,
    open_published,
    published_places,
    published_tensors,
)
from deltamoe.checkpoint.quantized import quantization_of
from deltamoe.config import ModelConfig, RunConfig, overridden
from deltamoe.errors import CheckpointError, ConfigError
from deltamoe.plan import Weight, weights
from deltamoe.tokenizer import (
    ChatTemplate,
    Tokenizer,
    check_fit,
    load_tokenizer,
    read_chat_template,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Source", "open_source"]

_TOKENIZER_FILES = ("tokenizer.json", "tiktoken.model")


@dataclass(frozen=True)
class Source:
    """An opened model: its geometry, its tensors one by one, its tokenizer.

    Attributes:
        path: what is read (of a run: its checkpoint's folder).
        kind: "checkpoint" is one of ours.
        run: the configuration; of a published model only ``run.model`` means something.
        step: optimizer steps taken; 0 for a published model.
        dtype: safetensors' word for the dtype of all weights but the wide ones.
        read: one tensor in its published shape and the file's dtype, as a view of the mapped
            file. Raises CheckpointError if it holds NaN or infinity.
        tokenizer: the one beside the weights; None if there is none.
        turns: the form of a conversation; None for a base model.
        token_ids: what a published config.json says of ids; empty for others.
    """

    path: Path
    kind: Literal["checkpoint", "published", "gguf"]
    run: RunConfig
    step: int
    dtype: str
    read: Callable[[PublishedTensor], "Tensor"]
    tokenizer: Tokenizer | None = None
    turns: ChatTemplate | None = None
    token_ids: Mapping[str, int] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        """The geometry."""
        return self.run.model

    def tensors(self) -> Iterator[PublishedTensor]:
        """All its tensors, block by block; with tied embeddings there is no head."""
        return published_tensors(self.config)

    def pieces(self, weight: Weight) -> Iterator["Tensor"]:
        """One tensor of ours in consecutive pieces along its first axis, read one by one.

        A stack of experts comes an expert a piece, any other tensor whole.
        """
        for place in published_places(weight):
            shape = weight.shape if place.expert is None else (1, *weight.shape[1:])
            yield self.read(place).view(shape)


def open_source(path: Path | str, overrides: Sequence[str] = ()) -> Source:
    """Open what is to be converted, and check all of it but the tensors' values.

    Args:
        path: a run folder (its newest good checkpoint), a step folder, a published folder, or a
            file that ends in .gguf (which is read into memory at once).
        overrides: texts such as "model.mla.latent_norm_eps=1e-6": another reading of the same
            tensors. One that would need other tensors is an error.

    Raises:
        CheckpointError: no good checkpoint there, or it disagrees with its configuration.
        BadFileError: a tokenizer that cannot be trusted.
        ConfigError: an override that cannot work, or does not concern the model; a tokenizer with
            more ids than the model.
    """
    for text in overrides:
        if not text.startswith("model."):
            raise ConfigError(f"{text[:200]!r}: only the model's own keys can be set here, model.…")
    path = Path(path)
    if path.suffix == ".gguf":
        return _gguf(path, overrides)
    checkpoint = find_checkpoint(path)
    if is_published(checkpoint.path):
        return _published(checkpoint.path, overrides)
    return _checkpoint(checkpoint, overrides)


def _checkpoint(checkpoint: Checkpoint, overrides: Sequence[str]) -> Source:
    run = overridden(load_run_config(checkpoint.file(CONFIG).parent), overrides)
    header = read_header(checkpoint.file(WEIGHTS))
    if bits := quantization_of(header):
        raise CheckpointError(
            f"{checkpoint.path}: quantised to {bits} bits; give the model that it was made from"
        )
    check_shapes(header, ((weight.name, weight.shape) for weight in weights(run.model)))

    tokenizer = _tokenizer(checkpoint.path, run.model)

    def read(tensor: PublishedTensor) -> "Tensor":
        from deltamoe.checkpoint.tensors import map_tensor, require_finite

        value = map_tensor(header, tensor.ours, index=tensor.expert)
        require_finite({tensor.ours: value}, source=str(header.path))
        return value.view(tensor.shape)

    return Source(
        path=checkpoint.path,
        kind="checkpoint",
        run=run,
        step=checkpoint.step,
        dtype=header.tensors["embedding.weight"].dtype,
        read=read,
        tokenizer=tokenizer,
        turns=None if tokenizer is None else read_chat_template(checkpoint.path, tokenizer),
    )


def _published(path: Path, overrides: Sequence[str]) -> Source:
    folder = open_published(path)
    run = overridden(RunConfig(model=folder.config), overrides)
    check_shapes(folder.header, ((t.name, t.shape) for t in published_tensors(run.model)))
    tokenizer = _tokenizer(path, run.model)

    def read(tensor: PublishedTensor) -> "Tensor":
        from deltamoe.checkpoint.published.weights import read_published_tensor

        return read_published_tensor(folder, tensor.name)

    return Source(
        path=path,
        kind="published",
        run=run,
        step=0,
        dtype=folder.dtype,
        read=read,
        tokenizer=tokenizer,
        turns=None if tokenizer is None else read_chat_template(path, tokenizer),
        token_ids=folder.token_ids,
    )


def _gguf(path: Path, overrides: Sequence[str]) -> Source:
    """Read whole: what is quantised in the file has no bytes of ours to map."""
    from deltamoe.checkpoint.tensors import DTYPE_CODES
    from deltamoe.conversion.gguf import read_gguf

    model, tokenizer = read_gguf(path)
    tensors = model.state_dict()
    run = overridden(RunConfig(model=model.config), overrides)
    if [w[:2] for w in weights(run.model)] != [w[:2] for w in weights(model.config)]:
        raise ConfigError(f"{path}: {' '.join(overrides)} needs other tensors than it holds")

    def read(tensor: PublishedTensor) -> "Tensor":
        value: Tensor = tensors[tensor.ours]
        return (value if tensor.expert is None else value[tensor.expert]).reshape(tensor.shape)

    return Source(
        path=path,
        kind="gguf",
        run=run,
        step=0,
        dtype=DTYPE_CODES[tensors["embedding.weight"].dtype],
        read=read,
        tokenizer=tokenizer,
    )


def _tokenizer(folder: Path, config: ModelConfig) -> Tokenizer | None:
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    tokenizer = load_tokenizer(folder)
    check_fit(tokenizer, config.vocab_size)
    return tokenizer
