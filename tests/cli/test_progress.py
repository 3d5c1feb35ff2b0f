"""Progress off a terminal: lines every few seconds, and none for what is quick."""

from __future__ import annotations

import pytest

from modelpack.cli.output import LineDisplay, _bars
from modelpack.progress import Action, Progress

GB = 10**9


def lines(
    capsys: pytest.CaptureFixture[str], reports: list[tuple[float, Progress]], *, every_file: bool
) -> list[str]:
    """Return what the display prints for reports, each at its second."""
    now = 0.0
    display = LineDisplay(every_file=every_file, clock=lambda: now)
    for at, report in reports:
        now = at
        display(report)
    return capsys.readouterr().err.splitlines()


def stored(completed: int, name: str = "a.gguf") -> Progress:
    return Progress(Action.IMPORT, name, None, completed, 4 * GB)


@pytest.mark.parametrize(
    ("reports", "every_file", "shown"),
    [
        ([(0, stored(0)), (4.9, stored(3 * GB)), (4.95, stored(4 * GB))], False, []),
        ([(0, stored(0)), (4.9, stored(3 * GB)), (4.95, stored(4 * GB))], True,
         ["Storing a.gguf: 4000000000 bytes"]),
        ([(1, stored(0)), (5, stored(GB)), (6, stored(2 * GB)), (10, stored(3 * GB))], False,
         ["Storing a.gguf: 1.00 GB of 4.00 GB (25 %)",
          "Storing a.gguf: 3.00 GB of 4.00 GB (75 %)"]),
        # Many small files that together take long are shown too.
        ([(float(i), stored(GB, f"{i}.gguf")) for i in range(12)], False,
         ["Storing 5.gguf: 1.00 GB of 4.00 GB (25 %)",
          "Storing 10.gguf: 1.00 GB of 4.00 GB (25 %)"]),
        ([(7, Progress(Action.FETCH, "b", None, GB))], False, ["Fetching b: 1.00 GB"]),
        ([(0, Progress(Action.NOTE, message="skipped x"))], False, ["note: skipped x"]),
        ([(at, Progress(Action.RETRY, message=f"blob sha256:{at:02x}: refused; again in {at} s"))
          for at in (0, 1, 4, 6)],
         False,
         ["retry: blob sha256:00: refused; again in 0 s",
          "retry: blob sha256:06: refused; again in 6 s"]),
        ([(0, Progress(Action.RETRY, message=f"blob blake3:{kind}0: refused")) for kind in "abc"],
         False, ["retry: blob blake3:a0: refused"]),
        ([(0, Progress(Action.RETRY, message="refused")), (1, Progress(Action.RETRY, message="x"))],
         False, ["retry: refused", "retry: x"]),
    ],
    ids=["quick", "every file", "long", "many files", "unknown size", "note", "retries",
         "retries of BLAKE3", "other reasons"],
)  # fmt: skip
def test_lines(
    capsys: pytest.CaptureFixture[str],
    reports: list[tuple[float, Progress]],
    every_file: bool,
    shown: list[str],
) -> None:
    assert lines(capsys, reports, every_file=every_file) == shown


@pytest.mark.parametrize(("width", "columns"), [(59, 2), (60, 5)])
def test_a_narrow_terminal_shows_names_and_sizes(
    monkeypatch: pytest.MonkeyPatch, width: int, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert len(_bars().columns) == columns


def test_every_action_has_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    for action in set(Action) - {Action.NOTE, Action.RETRY}:
        [line] = lines(capsys, [(0, Progress(action, "x", None, 1, 1))], every_file=True)
        assert line.endswith(" x: 1 bytes")
