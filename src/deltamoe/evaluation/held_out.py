"""Which text a model is measured on: text it was not trained on.

That is the held-out part of the run's own data, or another text. Of another text all is taken,
unless the run was trained on it under another name: then again only the part that was held out.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamoe.config import read_json
from deltamoe.data import PreparedData, TokenStream, prepare
from deltamoe.errors import DataError
from deltamoe.inference.opened import OpenedModel

__all__ = ["HeldOut", "held_out", "training_ids"]


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """Text to be scored.

    Attributes:
        name: of the source.
        token_ids: the stream, each document with its border.
        document_starts: where the borders stand.
    """

    name: str
    token_ids: NDArray[np.int64]
    document_starts: NDArray[np.int64]


def held_out(
    opened: OpenedModel, name: str | None = None, *, max_tokens: int | None = None
) -> HeldOut:
    """Tokenise the text to measure a model on, or open it if that was done before.

    Args:
        opened: the model; its tokenizer is used.
        name: a file, a folder or a built-in source; None takes what the run held out.
        max_tokens: only the first so many; None takes all.

    Raises:
        ConfigError: nothing has that name.
        DataError: broken text, or shards of another tokenizer.
    """
    data = _prepared(opened, name)
    if name is None or _was_trained_on(opened, name, data):
        name, stream = name or opened.config.data.path, data.validation
    else:
        stream = TokenStream.joined([data.train, data.validation])
    end = stream.num_tokens if max_tokens is None else min(max_tokens, stream.num_tokens)
    starts = stream.document_starts.astype(np.int64)
    return HeldOut(name=name, token_ids=stream.tokens(0, end), document_starts=starts[starts < end])


def training_ids(opened: OpenedModel, *, max_tokens: int) -> NDArray[np.int64]:
    """The first tokens of the text a run was trained on.

    Raises:
        ConfigError, DataError: as for ``held_out``.
    """
    train = _prepared(opened).train
    return train.tokens(0, min(max_tokens, train.num_tokens))


def _prepared(opened: OpenedModel, name: str | None = None) -> PreparedData:
    config = replace(opened.config.data, tokenizer=str(opened.tokenizer_path))
    if name is not None:
        config = replace(config, path=name, mixture={})
    data = prepare(config)
    if data.tokenizer.fingerprint != opened.tokenizer.fingerprint:
        raise DataError(
            f"{name or config.path}: shards of the tokenizer {data.tokenizer.name}, not of this "
            f"model's ({opened.tokenizer.name}); give the text itself"
        )
    return data


def _was_trained_on(opened: OpenedModel, name: str, data: PreparedData) -> bool:
    """Whether a source is one of the run's, by its name or by its text."""
    own = opened.config.data
    if name in (own.mixture or {own.path: 1.0}):
        return True
    record = opened.checkpoint.path.parent.parent / "data.json"
    known = read_json(record, error=DataError) if record.is_file() else {}
    return any(
        source.manifest is not None and source.manifest.source_sha256 in _hashes(known)
        for source in data.sources
    )


def _hashes(record: dict[str, Any]) -> list[str]:
    """The hashes of a run's sources, out of its data.json."""
    manifests = (source.get("manifest") for source in record.get("sources", []))
    return [manifest["source_sha256"] for manifest in manifests if manifest]
