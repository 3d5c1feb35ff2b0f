"""docs/models.md says what the code does, and names every architecture there is."""

from __future__ import annotations

import pkgutil

import mlx_lm
import mlx_lm.models
import pytest

from tests.engine.zoo import table
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.excluded import EXCLUDED, PARTS


def test_every_architecture_is_listed() -> None:
    """A new mlx-lm brings new ones: they are to be added, or excluded for a reason."""
    known = {c.architecture for c in CATALOGUE} | set(EXCLUDED) | PARTS
    found = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
    assert found == known


def test_committed_table_is_what_the_code_says(rows: dict[str, str]) -> None:
    if len(rows) < len(CATALOGUE):
        pytest.skip("only a part of the zoo has run")
    made = table.render([rows[configuration.id] for configuration in CATALOGUE])
    assert table.PATH.read_text() == made, "run python -m tests.engine.zoo.table"
