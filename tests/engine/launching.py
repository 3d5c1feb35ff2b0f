"""Make engines launch their steps as on a CPU or as on a GPU, on any device."""

from __future__ import annotations

import pytest

from modelpack_engine.runner.paged import PagedRunner

#: After the previous step has been read, or before.
WAYS = ("launched late", "launched early")


def launch(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make engines launch steps in one of `WAYS`."""
    monkeypatch.setattr(PagedRunner, "writes_in_place", property(lambda self: way != WAYS[0]))
