"""Hugging Face datasets as rows. The only file that knows ``datasets``."""

import hashlib
from collections.abc import Iterator

from deltamoe.data.rows import Rows
from deltamoe.errors import ConfigError, DataError

__all__ = ["hub"]


def hub(name: str, text_field: str) -> Rows:
    """The texts of a dataset's ``train`` split, downloaded at first use.

    Args:
        name: ``OWNER/NAME``, or ``OWNER/NAME:CONFIGURATION``.
        text_field: the column that holds the text.

    Raises:
        ConfigError: ``datasets`` is not installed.
        DataError: the dataset cannot be had, or has no such column.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"hf:{name}: Hugging Face datasets need a package: pip install 'deltamoe[hub]'"
        ) from None
    dataset_name, _, configuration = name.partition(":")
    try:
        dataset = datasets.load_dataset(dataset_name, configuration or None, split="train")
    except Exception as error:  # the library's errors share no base
        raise DataError(
            f"hf:{name} could not be loaded ({type(error).__name__}: {error}); check the name and "
            "the network, or point data.path to a file you have"
        ) from error
    if text_field not in dataset.column_names:
        raise DataError(
            f"hf:{name} has no column {text_field!r}, but {dataset.column_names!r:.200}; "
            "set data.text_field"
        )

    def texts() -> Iterator[tuple[str, str]]:
        for row, text in enumerate(dataset[text_field]):
            if not isinstance(text, str):
                raise DataError(f"hf:{name} row {row:,}: {text!r:.40} is no text")
            yield f"hf:{name} row {row:,}", text

    identity = f"{name}\0{text_field}\0{len(dataset)}\0{dataset._fingerprint}"
    return Rows(
        f"hf:{name}",
        f"the column {text_field!r} of the Hugging Face dataset {name}: {len(dataset):,} rows",
        hashlib.sha256(identity.encode()).hexdigest(),
        texts,
    )
