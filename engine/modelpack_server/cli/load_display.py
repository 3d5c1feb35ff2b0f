"""LoadDisplay: show on stderr how far the loads of `run` and `serve` are."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from modelpack.cli.options import Settings
from modelpack.cli.output import human_size, note, one_line

if TYPE_CHECKING:
    from modelpack_engine.models.load_progress import LoadProgress

#: Seconds before the first report of a load on a terminal, and between two in a log.
_PATIENCE, _EVERY = 0.5, 5.0


class LoadDisplay:
    """Shows the progress of loads: in one line on a terminal, otherwise a line every few seconds.

    A load that is quicker shows nothing. `--quiet` and `--progress none` switch it off.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        mode = "none" if settings.quiet else settings.progress
        self._settings = settings
        self._is_on = mode != "none"
        self._in_place = mode != "plain" and sys.stderr.isatty() and not settings.json
        self._clock = clock
        self._lock = threading.Lock()
        self._next: dict[str, float] = {}  # by name: when to show the next report
        self._is_shown = False

    def report(self, name: str, progress: LoadProgress | None) -> None:
        """Show a report, if it is time for one; None is the end of a load. Thread-safe."""
        if not self._is_on:
            return
        now = self._clock()
        with self._lock:
            if progress is None:
                self._next.pop(name, None)
                if self._is_shown:
                    click.echo("\r\x1b[K", nl=False, err=True)
                    self._is_shown = False
                return
            if not progress.completed or name not in self._next:  # a load begins
                self._next[name] = now + (_PATIENCE if self._in_place else _EVERY)
            if now < self._next[name]:
                return
            if progress.warming_up:
                what = "warming up"
            else:
                share = f"{progress.completed * 100 // max(progress.total, 1)} %"
                sizes = f"{human_size(progress.completed)} of {human_size(progress.total)}"
                what = f"{sizes} ({share})"
            if self._in_place:
                click.echo(f"\r\x1b[K{one_line(f'loading {name}: {what}')}", nl=False, err=True)
                self._is_shown = True
            else:
                note(self._settings, f"loading {name}: {what}")
                self._next[name] = now + _EVERY
