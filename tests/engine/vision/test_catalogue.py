"""Every model type of mlx-vlm has a line in docs/models.md, with what becomes of it here."""

from __future__ import annotations

import re

from modelpack_engine.vision.models import CLASSES
from tests.engine.vision import catalogue, tiny
from tests.engine.zoo.table import PATH


def test_the_types_of_mlx_vlm_in_the_document() -> None:
    assert catalogue.table() in PATH.read_text(), "run python -m tests.engine.zoo.table"


def test_reasons_are_of_types_that_do_not_read_pictures() -> None:
    assert set(catalogue.REASONS) <= set(catalogue.names())
    read = [name for name in catalogue.REASONS if catalogue.outcome(name)[0].startswith("pictures")]
    assert read == []


def test_what_is_not_read_has_a_reason() -> None:
    reasons = {name: catalogue.outcome(name)[1] for name in catalogue.names()}
    assert [name for name, why in reasons.items() if re.search("not read yet(?!: )", why)] == []


def test_every_type_that_reads_pictures_is_compared_with_mlx_vlm() -> None:
    assert set(tiny.KINDS) | {"lfm2-vl"} >= {k for k, needs in CLASSES.items() if needs.pictures}
