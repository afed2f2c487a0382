"""A published checkpoint's folder: found, read and compared with its own config.json.

    config.json  model.safetensors                                     or
    config.json  model.safetensors.index.json  model-00001-of-00020.safetensors  …

The weights may lie in one file or in many that an index lists. Everything is checked before any
tensor is read: names, shapes and dtypes against the configuration, the index against the files,
the places against the files' lengths. Nothing in the folder is executed; a file is opened only if
its name is plain and it does not lead out of the folder.

Knows nothing of tokenizers. No torch. ``weights.py`` reads the tensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamoe.checkpoint.folder import CONFIG, WEIGHTS, Checkpoint, open_checkpoint
from deltamoe.checkpoint.header import (
    MAX_TENSORS,
    Header,
    TensorInfo,
    check_shapes,
    read_header,
)
from deltamoe.checkpoint.manifest import FILE_NAME, MANIFEST, Manifest, record_file
from deltamoe.checkpoint.published.config import (
    TOKEN_IDS,
    is_published_config,
    model_config,
)
from deltamoe.checkpoint.published.names import PublishedTensor, official_name, published_tensors
from deltamoe.config.model import ModelConfig
from deltamoe.config.strict_json import read_json
from deltamoe.errors import CheckpointError

__all__ = [
    "FLOATS",
    "INDEX",
    "PublishedFolder",
    "is_published",
    "open_published",
    "published_checkpoint",
    "read_published_config",
]

INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16", "F64")
"""The dtypes a weight may be stored in; anything narrower is a quantised model."""

_MAX_INDEX_BYTES = 16 << 20  # the 48B's is 2 MiB
_MAX_FILES = 512
_MAX_HEADERS_BYTES = 64 << 20  # of all files together: what a hostile folder may make us parse


@dataclass(frozen=True)
class PublishedFolder:
    """A folder whose configuration and headers were found to agree.

    Attributes:
        path: the folder.
        config: our geometry.
        settings: config.json as it stands there.
        header: all tensors of all files as one header, under their official names; ``begin`` and
            ``end`` count in each tensor's own file.
        places: official name -> the header of its file, and its name there.
    """

    path: Path
    config: ModelConfig
    settings: Mapping[str, Any]
    header: Header
    places: Mapping[str, tuple[Header, str]]

    @property
    def dtype(self) -> str:
        """The dtype, in the word of safetensors, of the embedding, and so of the model."""
        return self.header.tensors["model.embed_tokens.weight"].dtype

    @property
    def token_ids(self) -> dict[str, int]:
        """What config.json says of ids; one that is no id of the vocabulary is left out.

        Where several tokens may end a text the first one counts.
        """
        ids = {}
        for key in TOKEN_IDS:
            value = self.settings.get(key)
            value = value[0] if isinstance(value, list) and value else value
            if type(value) is int and 0 <= value < self.config.vocab_size:
                ids[key] = value
        return ids

    def tensors(self) -> Iterator[PublishedTensor]:
        """Its tensors, with the place of each in our model."""
        return published_tensors(self.config)


def is_published(path: Path | str) -> bool:
    """Whether this is a folder whose config.json names a ``model_type``, as ours never does."""
    try:
        return is_published_config(read_json(Path(path) / CONFIG, error=CheckpointError))
    except CheckpointError:
        return False


def read_published_config(path: Path | str) -> ModelConfig:
    """The geometry that a published folder's config.json describes.

    Raises:
        CheckpointError: as ``model_config``; or the file is missing or no JSON.
    """
    file = Path(path) / CONFIG
    return model_config(read_json(file, error=CheckpointError), source=str(file))


def published_checkpoint(path: Path | str, *, check_hashes: bool = True) -> Checkpoint:
    """A published folder as a checkpoint: verified by its manifest, if it has one.

    Without a manifest its files are listed as they are, without hashes.

    Raises:
        CheckpointError: a manifest that disagrees with the files, or a file that leads out of the
            folder.
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        return open_checkpoint(path, check_hashes=check_hashes)
    names = sorted(file.name for file in path.iterdir() if file.is_file())
    names = [name for name in names if FILE_NAME.fullmatch(name)]
    files = {name: record_file(path / name, hashed=False) for name in names}
    return Checkpoint(path, Manifest(0, files))


def open_published(path: Path | str) -> PublishedFolder:
    """Open a published folder and check all of it but the tensors' values.

    Raises:
        CheckpointError: a config.json that cannot be read (config.py), an index or a file that
            lies, a tensor that is missing, unknown, there twice, misshapen or no float. The
            message names the key, the file or the tensor.
    """
    path = Path(path)
    settings = read_json(path / CONFIG, error=CheckpointError)
    config = model_config(settings, source=str(path / CONFIG))
    places = _renamed(path, _places(path))
    tensors = {name: header.tensors[stored] for name, (header, stored) in places.items()}
    files = {header.path: header for header, _ in places.values()}
    header = Header(path, tensors, {}, sum(file.file_bytes for file in files.values()))
    check_shapes(header, ((tensor.name, tensor.shape) for tensor in published_tensors(config)))
    for name, info in tensors.items():
        _require_float(path, name, info)
    return PublishedFolder(path, config, settings, header, places)


def _require_float(path: Path, name: str, info: TensorInfo) -> None:
    if info.dtype not in FLOATS:
        raise CheckpointError(
            f"{path}: tensor {name!r} is {info.dtype}; expected {', '.join(FLOATS)}: "
            "quantised models are not read"
        )


def _places(path: Path) -> dict[str, tuple[Header, str]]:
    """Each stored tensor's file, as the single file or the index has it."""
    has_index, has_single = (path / INDEX).exists(), (path / WEIGHTS).exists()
    if has_index and has_single:
        raise CheckpointError(
            f"{path}: holds both {WEIGHTS} and {INDEX}; remove the one that is not meant"
        )
    if has_index:
        return _indexed_places(path)
    if not has_single:
        raise CheckpointError(f"{path}: holds neither {WEIGHTS} nor {INDEX}: no weights to read")
    header = read_header(path / WEIGHTS)
    return {name: (header, name) for name in header.tensors}


def _indexed_places(path: Path) -> dict[str, tuple[Header, str]]:
    index = path / INDEX
    listed = _weight_map(index)
    files = sorted(set(listed.values()))
    if len(files) > _MAX_FILES:
        raise CheckpointError(f"{index}: {len(files):,} files; expected at most {_MAX_FILES}")
    places: dict[str, tuple[Header, str]] = {}
    num_header_bytes = 0
    for file in files:
        header = read_header(path / file)
        num_header_bytes += header.data_begin
        if num_header_bytes > _MAX_HEADERS_BYTES or len(places) > MAX_TENSORS:
            raise CheckpointError(
                f"{path}: more than {_MAX_HEADERS_BYTES:,} bytes of headers or {MAX_TENSORS:,} "
                "tensors, which no such folder needs"
            )
        for name in header.tensors:
            if name in places:
                raise CheckpointError(
                    f"{path}: tensor {name!r} stands twice, in {places[name][0].path.name} "
                    f"and in {file}"
                )
            if listed.get(name) != file:
                said = f"puts it in {listed[name]}" if name in listed else "does not list it"
                raise CheckpointError(f"{path / file}: tensor {name!r}: {INDEX} {said}")
            places[name] = (header, name)
    for name, file in listed.items():
        if name not in places:
            raise CheckpointError(f"{index}: tensor {name[:200]!a} is not in {file}")
    return places


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file name, every file name plain."""
    data = read_json(index, max_bytes=_MAX_INDEX_BYTES, error=CheckpointError)
    listed = data.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index}: expected a weight_map of tensor names and file names")
    for file in listed.values():
        is_plain = isinstance(file, str) and FILE_NAME.fullmatch(file) is not None
        if not is_plain or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: {ascii(file)[:100]} cannot be a file of this folder; "
                "expected a plain name that ends in .safetensors"
            )
    return listed


def _renamed(path: Path, places: Mapping[str, tuple[Header, str]]) -> dict[str, tuple[Header, str]]:
    """Under official names, where transformers 5.23 wrote its own."""
    renamed: dict[str, tuple[Header, str]] = {}
    for stored, place in places.items():
        name = official_name(stored)
        if name in renamed:
            first = renamed[name][1]
            raise CheckpointError(f"{path}: tensor {name!r} stands twice, as {first} and {stored}")
        renamed[name] = place
    return renamed
