"""Every architecture generates the same tokens as mlx-lm does for a single request.

Five requests arrive in different steps. Steps are small, so that prompts are chunked and mixed with
decoding. Steps are built ahead, as in the engine.
"""

from __future__ import annotations

import pytest

from tests.engine.zoo import table
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.driving import Setting
from tests.engine.zoo.specimen import Specimen, make_specimen
from tests.engine.zoo.table import row

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=CATALOGUE, ids=lambda configuration: configuration.id)
def specimen(request: pytest.FixtureRequest, uncompiled: None) -> Specimen:
    return make_specimen(request.param)


def test_gate_is_strong(specimen: Specimen) -> None:
    assert specimen.reference.distinct >= 12
    assert specimen.reference.gap > 1e-4


def test_mixed_steps(specimen: Specimen, rows: dict[str, str]) -> None:
    runner = specimen.runner(exact=True)
    driver = specimen.drive(Setting())
    rows[specimen.configuration.id] = row(specimen.configuration, specimen.model, runner)
    stats = driver.scheduler.stats()
    assert driver.tokens == specimen.reference.tokens
    assert stats.num_mixed_steps >= 3
    assert stats.cached_tokens == (32 if runner.supports_prefix_cache else 0)


def test_committed_table_is_what_the_code_says(rows: dict[str, str]) -> None:
    """This test must be in this file: the tests above make the rows of docs/models.md."""
    if len(rows) < len(CATALOGUE):
        pytest.skip("only a part of the zoo has run")
    made = table.render([rows[configuration.id] for configuration in CATALOGUE])
    assert table.PATH.read_text() == made, "run python -m tests.engine.zoo.table"
