"""Prepared data: what a run reads, a tokenizer and one or more tokenised sources.

Knows nothing of where the text came from (preparation.py) or how it is cut (loader.py).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deltamoe.data.manifest import MANIFEST, Manifest, read_manifest
from deltamoe.data.shards import open_split
from deltamoe.data.stream import TokenStream
from deltamoe.errors import DataError
from deltamoe.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

__all__ = ["PreparedData", "PreparedSource", "is_prepared", "open_prepared"]


@dataclass(frozen=True)
class PreparedSource:
    """One source, tokenised.

    Attributes:
        name: as in the configuration.
        weight: its share of the training rows, relative to the others.
        train, validation: its two splits.
        folder, manifest: where it lies and what is there; None for one made in memory.
    """

    name: str
    weight: float
    train: TokenStream
    validation: TokenStream
    folder: Path | None = None
    manifest: Manifest | None = None


@dataclass(frozen=True)
class PreparedData:
    """All that a run reads: a tokenizer and one or more tokenised sources."""

    tokenizer: Tokenizer
    sources: tuple[PreparedSource, ...]

    @classmethod
    def in_memory(
        cls, train: Sequence[str], validation: Sequence[str], tokenizer: Tokenizer | None = None
    ) -> "PreparedData":
        """Documents given as texts, by default as bytes, kept in memory."""
        tokenizer = tokenizer or ByteTokenizer()
        train_stream, validation_stream = (
            TokenStream.in_memory(
                tokenizer.encode_batch(list(texts)),
                end_id=tokenizer.end_id,
                vocab_size=tokenizer.vocab_size,
                num_bytes=sum(len(text.encode()) for text in texts),
            )
            for texts in (train, validation)
        )
        return cls(tokenizer, (PreparedSource("memory", 1.0, train_stream, validation_stream),))

    @cached_property
    def train(self) -> TokenStream:
        """The training text of all sources, one after another."""
        return TokenStream.joined([source.train for source in self.sources])

    @cached_property
    def validation(self) -> TokenStream:
        """The held-out text of all sources, one after another."""
        return TokenStream.joined([source.validation for source in self.sources])

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides the batches: tokens, weights and tokenizer."""
        parts = [
            (source.weight, source.train.fingerprint, source.validation.fingerprint)
            for source in self.sources
        ]
        text = json.dumps([self.tokenizer.fingerprint, *parts])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def manifest(self) -> dict[str, Any]:
        """Plain data for a run's record: the sources' manifests, weights and the fingerprint."""
        return {
            "format": 1,
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer.name,
            "sources": [
                {
                    "name": source.name,
                    "weight": source.weight,
                    "manifest": source.manifest.to_dict() if source.manifest else None,
                }
                for source in self.sources
            ],
        }


def is_prepared(folder: Path) -> bool:
    """Whether a folder is one that ``prepare`` has made."""
    return (folder / MANIFEST).is_file() and (folder / "train.documents.npy").is_file()


def open_prepared(folder: Path | str, *, verify: bool = False) -> PreparedData:
    """Open a prepared folder.

    Args:
        folder: as made by ``prepare``.
        verify: check every hash and every token id; reads all of it.

    Raises:
        DataError: a file is missing, truncated, altered or from a newer deltamoe.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise DataError(
            f"{folder / 'tokenizer.json'}: not the tokenizer that made these shards "
            f"({manifest.tokenizer}): it was replaced; prepare the data again"
        )
    source = PreparedSource(
        manifest.source,
        1.0,
        open_split(folder, manifest, "train", verify=verify),
        open_split(folder, manifest, "validation", verify=verify),
        folder,
        manifest,
    )
    return PreparedData(tokenizer, (source,))
