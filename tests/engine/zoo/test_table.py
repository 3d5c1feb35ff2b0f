"""The zoo has every architecture of mlx-lm."""

from __future__ import annotations

import pkgutil

import mlx_lm
import mlx_lm.models

from tests.engine.zoo import table
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.excluded import EXCLUDED, PARTS


def test_every_architecture_is_listed() -> None:
    """New architectures of mlx-lm must be added, or excluded with a reason."""
    known = {c.architecture for c in CATALOGUE} | set(EXCLUDED) | PARTS
    found = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
    assert found == known


def test_every_gguf_architecture_is_in_the_document() -> None:
    lines = table.PATH.read_text().splitlines()
    for configuration in CATALOGUE:
        start = f"| {configuration.id} | {table.gguf_names(configuration.architecture)} |"
        assert any(line.startswith(start) for line in lines), "run python -m tests.engine.zoo.table"


def test_the_block_types_in_the_document() -> None:
    text = table.PATH.read_text()
    assert table.block_types() in text, "run python -m tests.engine.zoo.table"
