"""The zoo has every architecture of mlx-lm."""

from __future__ import annotations

import pkgutil
import re

import gguf
import mlx_lm
import mlx_lm.models

from modelpack_engine.models.gguf_architectures import ARCHITECTURES
from modelpack_engine.models.mtp import LAYOUTS
from tests.engine.zoo import table
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.excluded import EXCLUDED, PARTS
from tests.engine.zoo.not_in_gguf import DIFFERS, NAMED, OTHERWISE


def test_every_architecture_is_listed() -> None:
    """New architectures of mlx-lm must be added, or excluded with a reason."""
    known = {c.architecture for c in CATALOGUE} | set(EXCLUDED) | PARTS
    found = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
    assert found == known


def test_every_gguf_architecture_is_in_the_document() -> None:
    lines = table.PATH.read_text().splitlines()
    for configuration in CATALOGUE:
        names = table.gguf_names(configuration.architecture)
        other = OTHERWISE.get(configuration.architecture, "no") + " ("
        start = f"| {configuration.id} | " + (f"{names} |" if names else other)
        assert any(line.startswith(start) for line in lines), "run python -m tests.engine.zoo.table"


def test_every_class_without_gguf_has_a_reason() -> None:
    """Reasons are for classes without a row only, and name architectures of llama.cpp."""
    without = {c.architecture for c in CATALOGUE if not table.gguf_names(c.architecture)}
    assert NAMED.keys() | OTHERWISE.keys() | DIFFERS.keys() <= without
    assert not NAMED.keys() & OTHERWISE.keys()
    known = set(gguf.MODEL_ARCH_NAMES.values())
    assert set(NAMED.values()) <= known - set(ARCHITECTURES)
    assert set(OTHERWISE.values()) <= set(ARCHITECTURES)
    for name in without - NAMED.keys() - OTHERWISE.keys() - DIFFERS.keys():
        similar = {name, name.replace("_", "-"), name.replace("_", "")}
        assert not similar & known, f"llama.cpp knows {name}"


def test_layers_that_are_not_read_are_named() -> None:
    known = {configuration.architecture for configuration in CATALOGUE}
    assert known > table.UNREAD
    assert not table.UNREAD & LAYOUTS.keys()
    rows = [line for line in table.PATH.read_text().splitlines() if "| yes, no mtp (" in line]
    assert {line.split()[1].rstrip(":") for line in rows} == table.UNREAD


def test_every_no_has_a_reason() -> None:
    text = table.PATH.read_text().split("### Reasons")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == len(CATALOGUE) + 1
    for line in rows:
        assert not re.search(r"\| no \||\|  \| (paged|patched|per|fall)", line), line


def test_the_block_types_in_the_document() -> None:
    text = table.PATH.read_text()
    assert table.block_types() in text, "run python -m tests.engine.zoo.table"
