"""How an engine launches its steps, whatever the device: as a CPU has them, and as a GPU."""

from __future__ import annotations

import pytest

from modelpack_engine.runner.paged import PagedRunner

#: After the step before has been read, and before.
WAYS = ("launched late", "launched early")


def launch(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have engines launch steps in one of `WAYS`."""
    monkeypatch.setattr(PagedRunner, "writes_in_place", property(lambda self: way != WAYS[0]))
