"""BLiMP: does the model find the grammatical sentence likelier than its ungrammatical twin?

67 sets of 1,000 minimal pairs of English sentences. A pair is won if the good sentence has the
larger total log-probability; guessing wins half. The files are not part of this package; they are
read from a folder of ``*.jsonl`` files or from a zip that holds one.

Source: Warstadt et al. (arXiv 1912.00582). Averages over the 67 sets published beside the data:
5-gram 61.2, LSTM 69.8, Transformer-XL 69.6, GPT-2 large 83.0.
"""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deltamoe.config.strict_json import open_regular, parse_json
from deltamoe.errors import DataError
from deltamoe.evaluation.token_losses import streamed_losses
from deltamoe.model import HybridLM
from deltamoe.tokenizer import Tokenizer

__all__ = ["MinimalPair", "blimp_accuracy", "read_blimp"]


class MinimalPair(NamedTuple):
    """Two sentences that differ in one point of grammar."""

    good: str
    bad: str


def read_blimp(path: Path) -> dict[str, list[MinimalPair]]:
    """Read the sets of a folder or a zip file, by name.

    Raises:
        DataError: nothing there, no set in it, or a line that is not a minimal pair.
    """
    sets = {
        name: [_pair(line, f"{path}: {name}, line {number}") for number, line in lines]
        for name, lines in _files(path)
    }
    if not sets:
        raise DataError(f"{path}: expected BLiMP's *.jsonl files in a folder or a zip, found none")
    return dict(sorted(sets.items()))


def blimp_accuracy(
    model: HybridLM, tokenizer: Tokenizer, pairs: list[MinimalPair], *, rows: int = 64
) -> float:
    """Share of the pairs whose good sentence is the likelier one, 0 to 1.

    Args:
        model: a trained model.
        tokenizer: the one it was trained with.
        pairs: one set.
        rows: sentences in one forward pass.
    """
    sentences = [sentence for pair in pairs for sentence in pair]
    encoded = [[tokenizer.end_id, *ids] for ids in tokenizer.encode_batch(sentences)]
    starts = np.cumsum([0, *map(len, encoded)])
    token_ids = np.concatenate([np.array(ids, dtype=np.int64) for ids in encoded])
    longest = max(map(len, encoded))
    scored = streamed_losses(model, token_ids, starts[:-1], chunk=longest, rows=rows)
    totals = np.add.reduceat(np.nan_to_num(scored.losses.astype(np.float64)), starts[:-1])
    good, bad = totals.reshape(-1, 2).T
    return float((good < bad).mean())


def _files(path: Path) -> Iterator[tuple[str, Iterator[tuple[int, bytes]]]]:
    """Yield (set, its numbered lines)."""
    if path.is_dir():
        for jsonl in filter(_is_set, path.rglob("*.jsonl")):
            yield jsonl.stem, enumerate(jsonl.read_bytes().splitlines(), start=1)
        return
    try:
        with open_regular(path, error=DataError) as file, zipfile.ZipFile(file) as archive:
            for name in filter(_is_set, map(Path, archive.namelist())):
                lines = archive.read(name.as_posix()).splitlines()
                yield name.stem, enumerate(lines, start=1)
    except (OSError, zipfile.BadZipFile, zlib.error) as fault:
        raise DataError(f"{path}: neither a folder nor a whole zip file ({fault})") from fault


def _is_set(name: Path) -> bool:
    return name.suffix == ".jsonl" and not name.name.startswith(".")  # "._x": a Mac's side file


def _pair(line: bytes, where: str) -> MinimalPair:
    record = parse_json(line, source=where, error=DataError)
    match record:
        case {"sentence_good": str(good), "sentence_bad": str(bad)} if good and bad:
            return MinimalPair(good, bad)
    raise DataError(f"{where}: expected an object with the texts sentence_good and sentence_bad")
