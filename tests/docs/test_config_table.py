"""docs/training.md and the docstrings of the configuration classes say the same."""

from dataclasses import fields

import pytest

from tests.docs.config_table import PAGE, SECTIONS, TABLES, described
from tests.docs.pages import table


@pytest.mark.parametrize("name", TABLES)
def test_the_table_is_written_from_the_code(name: str) -> None:
    written = "\n".join(TABLES[name]()).strip()
    assert table(PAGE, name) == written, "run `python -m tests.docs.config_table`"


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_is_described_and_nothing_else(section: str) -> None:
    kind = SECTIONS[section]
    assert list(described(kind)) == [field.name for field in fields(kind)]
