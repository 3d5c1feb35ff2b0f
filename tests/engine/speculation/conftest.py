"""Which steps draft must not depend on how long steps take on this machine."""

from __future__ import annotations

import pytest

from modelpack_engine.speculation.acceptance import StepTimes


@pytest.fixture
def measured_steps() -> None:
    """Leave the measurement of steps on."""


@pytest.fixture(autouse=True)
def unmeasured_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "measured_steps" not in request.fixturenames:
        monkeypatch.setattr(StepTimes, "observe", lambda self, num_sequences, seconds, *, drafts: 0)
        monkeypatch.setattr(StepTimes, "needs_plain_step", lambda self, num_sequences: False)
