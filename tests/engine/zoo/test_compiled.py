"""Recurrent models decode in compiled steps, as on a GPU, and generate mlx-lm's tokens."""

from __future__ import annotations

import pytest

from modelpack_engine.core.buckets import Buckets
from modelpack_engine.runner.paged import CompiledSteps
from tests.engine.zoo.configuration import Configuration
from tests.engine.zoo.driving import Setting
from tests.engine.zoo.recurrent import RECURRENT
from tests.engine.zoo.specimen import make_specimen

pytestmark = pytest.mark.long

BUCKETS = Buckets(rows=(4, 8), chunk=(8, 16), table_width=(2, 8))
#: Not compiled: attention and recurrence are in one module, or attention is written by hand.
NOT_COMPILED = {"baichuan_m1", "gear: capped scores"}


@pytest.mark.parametrize("configuration", RECURRENT, ids=lambda configuration: configuration.id)
def test_recurrent(
    configuration: Configuration,
    uncompiled: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = make_specimen(configuration)
    taken: list[bool] = []
    takes = CompiledSteps.takes

    def noticed(self: CompiledSteps, batch: object) -> bool:
        taken.append(takes(self, batch))  # type: ignore[arg-type]
        return taken[-1]

    monkeypatch.setattr(CompiledSteps, "takes", noticed)
    runner = found.make_runner(buckets=BUCKETS, exact=False, compiled=True, self_test=False)
    try:
        taken.clear()
        setting = Setting(buckets=BUCKETS, exact=False, rows=32, blocks=9)
        driver = found.drive(setting, runner)
        assert driver.tokens == found.reference.tokens
        assert driver.scheduler.stats().num_mixed_steps >= 3
        assert driver.scheduler.stats().num_preemptions > 0
    finally:
        runner.undo()
    assert (True in taken) == (configuration.id not in NOT_COMPILED)
