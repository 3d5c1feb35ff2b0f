"""How progress is shown on stderr: bars on a terminal, lines elsewhere, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from modelpack.cli.options import Settings
from modelpack.cli.output import one_line
from modelpack.progress import Action, Progress, ProgressCallback, silent

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

_VERBS = {
    Action.IMPORT: "Storing",
    Action.FETCH: "Fetching",
    Action.PUSH: "Pushing",
    Action.COPY: "Copying",
    Action.MOUNT: "Mounted",
    Action.SKIP: "Exists",
    Action.VERIFY: "Verifying",
    Action.UNPACK: "Unpacking",
}


@contextmanager
def shown_progress(settings: Settings) -> Iterator[ProgressCallback]:
    """Yield the callback that shows progress as the settings ask for."""
    mode = "none" if settings.quiet else settings.progress
    if mode == "auto":
        mode = "bars" if sys.stderr.isatty() and not settings.json else "notes"
    if mode == "none":
        yield silent
    elif mode == "bars":
        with _bars() as bars:
            yield BarDisplay(bars)
    else:
        yield LineDisplay(plain=mode == "plain")


class LineDisplay:
    """Prints a line for each note and, if `plain`, for each file or blob that is done."""

    def __init__(self, *, plain: bool) -> None:
        self._plain = plain

    def __call__(self, progress: Progress) -> None:
        """Show one report."""
        if progress.action in (Action.NOTE, Action.RETRY):
            click.echo(_message(progress), err=True)
        elif self._plain and progress.finished:
            name = one_line(progress.name)
            line = f"{_VERBS[progress.action]} {name}: {progress.completed} bytes"
            click.echo(line, err=True)


class BarDisplay:
    """Shows a bar for each file or blob under way."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, progress: Progress) -> None:
        """Show one report."""
        if progress.action in (Action.NOTE, Action.RETRY):
            self._bars.console.print(_message(progress), markup=False, highlight=False)
            return
        key = str(progress.digest or progress.name)
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task("", total=progress.total)
        self._bars.update(
            self._tasks[key],
            description=f"{_VERBS[progress.action]} {one_line(progress.name)}",
            completed=progress.completed,
            total=progress.total,
        )


def _message(progress: Progress) -> str:
    prefix = "retry" if progress.action is Action.RETRY else "note"
    return one_line(f"{prefix}: {progress.message or progress.name}")


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        refresh_per_second=8,
    )
