"""Recurrent models decode in compiled steps, as on a GPU, and generate mlx-lm's tokens."""

from __future__ import annotations

import pytest

from modelpack_engine.core.buckets import Buckets
from modelpack_engine.patches.lora import LoRALayers
from modelpack_engine.runner.paged import CompiledSteps
from tests.engine.zoo.configuration import Configuration, prompts
from tests.engine.zoo.driving import Driver, Setting
from tests.engine.zoo.recurrent import RECURRENT
from tests.engine.zoo.specimen import adapter_of, make_specimen

pytestmark = pytest.mark.long

#: Recurrent layers of several kinds, with attention and alone.
ADAPTED = [each for each in RECURRENT if each.id in ("mamba2", "qwen3_next", "lfm2", "falcon_h1")]

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


@pytest.mark.parametrize("configuration", ADAPTED, ids=lambda configuration: configuration.id)
def test_recurrent_with_adapters(configuration: Configuration, uncompiled: None) -> None:
    """Some rows have one: all get the tokens of steps that are not compiled."""
    specimen, found = make_specimen(configuration), []
    for compiled in (False, True):
        runner = specimen.make_runner(
            buckets=BUCKETS, exact=False, compiled=compiled, self_test=False
        )
        assert runner.adapter_rows is not None
        loras = LoRALayers(specimen.model, runner.adapter_rows)
        loras.set(1, adapter_of(specimen.model))
        driver = Driver(runner, Setting(buckets=BUCKETS, exact=False, rows=32))
        for index, prompt in enumerate(prompts()):
            driver.add(prompt, 8, adapter=index % 2)
        driver.run()
        found.append(driver.tokens)
        loras.undo()
        runner.undo()
    assert found[0] == found[1]
    assert found[0][1] != specimen.reference.tokens[1][:8]
    assert found[0][0] == specimen.reference.tokens[0][:8]
