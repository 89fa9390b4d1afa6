"""README.md promises the architectures that are served and tested, and no others."""

from __future__ import annotations

from services.shard.supported import MODEL_TYPES
from tests.architectures import ARCHITECTURES
from tests.supported_table import README, section, table


def test_readme_table_is_current() -> None:
    assert section(README.read_text()) == table(), "run `make supported-table`"


def test_table_names_every_model_type_that_is_tested() -> None:
    named = [row.split("|")[1].strip() for row in table().splitlines()[2:]]
    assert named == sorted(MODEL_TYPES) == sorted(ARCHITECTURES)
