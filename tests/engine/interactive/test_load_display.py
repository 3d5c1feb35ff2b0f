"""What `run` and `serve` show while a model is loaded."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from modelpack.cli.options import Settings
from modelpack_engine.models.load_progress import LoadProgress
from modelpack_server.cli.load_display import LoadDisplay

GIGABYTE = 10**9


def shown(capsys: pytest.CaptureFixture[str], **settings: Any) -> str:
    """Show a load of 20 seconds, with a report each second, and one that is quick."""
    now = [0.0]
    display = LoadDisplay(Settings(**settings), clock=lambda: now[0])
    for second in range(17):
        now[0] = second
        display.report("m", LoadProgress(second * GIGABYTE // 2, 8 * GIGABYTE))
    now[0] = 20
    display.report("m", LoadProgress(8 * GIGABYTE, 8 * GIGABYTE, warming_up=True))
    display.report("m", None)
    display.report("quick", LoadProgress(0, 10))
    display.report("quick", LoadProgress(10, 10, warming_up=True))
    display.report("quick", None)
    return capsys.readouterr().err


def test_a_line_every_few_seconds_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys).splitlines() == [
        "loading m: 2.50 GB of 8.00 GB (31 %)",
        "loading m: 5.00 GB of 8.00 GB (62 %)",
        "loading m: 7.50 GB of 8.00 GB (93 %)",
        "loading m: warming up",
    ]


def test_one_line_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    written = shown(capsys)
    lines = written.split("\r\x1b[K")
    assert lines[1] == "loading m: 500.00 MB of 8.00 GB (6 %)"
    assert lines[-2:] == ["loading m: warming up", ""]  # the line is removed
    assert "\n" not in written
    assert "quick" not in written


@pytest.mark.parametrize("settings", [{"quiet": True}, {"progress": "none"}])
def test_it_can_be_switched_off(
    capsys: pytest.CaptureFixture[str], settings: dict[str, Any]
) -> None:
    assert shown(capsys, **settings) == ""
