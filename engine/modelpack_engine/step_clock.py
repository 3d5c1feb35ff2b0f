"""StepClock: where the host's time goes while it drives the device."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Literal

from modelpack_engine.outputs import EngineStats

Part = Literal["build", "launch", "wait"]


class StepClock:
    """Adds up the seconds of the parts of steps: each from the end of the one before."""

    def __init__(self) -> None:
        self._seconds: dict[Part, float] = {"build": 0.0, "launch": 0.0, "wait": 0.0}
        self._last = 0.0

    def start(self) -> None:
        """Begin a step."""
        self._last = time.perf_counter()

    def ended(self, part: Part) -> None:
        """End a part of it."""
        now = time.perf_counter()
        self._seconds[part] += now - self._last
        self._last = now

    def counted(self, stats: EngineStats) -> EngineStats:
        """Return `stats` with the seconds since the engine began."""
        return replace(
            stats,
            build_seconds=self._seconds["build"],
            launch_seconds=self._seconds["launch"],
            wait_seconds=self._seconds["wait"],
        )
