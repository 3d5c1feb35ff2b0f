"""Output of all commands: results as text or JSON, notes, errors, progress and request logs."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from modelpack.cli.options import Settings
from modelpack.errors import InvalidReferenceError, ModelpackError
from modelpack.progress import Action, Progress, ProgressCallback, silent

if TYPE_CHECKING:
    import logging

    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from modelpack.artifacts.reference import Reference

#: Incremented when a field of `--json` output is removed or changes its meaning.
SCHEMA_VERSION = 1

# Text from models, registries and file names may hold terminal escape sequences: only line feeds
# and tabs are safe. Within a line, line feeds and bidirectional controls could forge other output.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LINE_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Return `text` with a replacement character for each control character."""
    return _CONTROLS.sub("\ufffd", text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """Return `text` with control characters, line breaks and bidirectional controls replaced."""
    return _LINE_CONTROLS.sub("\ufffd", text)


def show(settings: Settings, value: dict[str, Any], text: str) -> None:
    """Print a result on stdout: `value` with --json, else `text`."""
    if settings.json:
        show_json(value)
    elif text:
        click.echo(visible(text))


def show_json(value: dict[str, Any]) -> None:
    """Print a JSON result, with the version of its schema."""
    click.echo(json.dumps({"schemaVersion": SCHEMA_VERSION} | value, indent=2))


def show_error(error: ModelpackError, *, err: bool = True) -> None:
    """Print an error and its hint, on stderr or, without `err`, on stdout."""
    click.echo(_indented(f"error: {error}"), err=err)
    if error.hint:
        click.echo(_indented(f"hint: {error.hint}"), err=err)


def _indented(text: str) -> str:
    """Return `text` with all lines but the first indented, so that none imitates our output."""
    return "\n  ".join(one_line(line.expandtabs()) for line in visible(text).split("\n"))


def note(settings: Settings, message: str) -> None:
    """Print a message to stderr, unless --quiet is given."""
    if not settings.quiet:
        click.echo(one_line(message), err=True)


def full_reference(settings: Settings, typed: str) -> Reference:
    """Return the reference that the user typed, and print it if they typed a shorter one.

    Raises `InvalidReferenceError` for a digest too, which Docker reads as the name `sha256` and a
    tag.
    """
    from modelpack.artifacts.reference import Reference, is_model_id

    if ":" in typed and is_model_id(typed.strip()):
        raise InvalidReferenceError(
            f"{typed.strip()}: a digest does not name a model in a registry",
            reference=typed,
            hint=f"type NAME@{typed.strip()}",
        )
    reference = Reference.parse(typed)
    if typed.strip() not in (str(reference), reference.name):
        note(settings, f"{typed.strip()} is {reference}")
    return reference


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return left-aligned columns, two spaces apart, as `docker model list` prints them."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join(lines)


def human_size(size: int) -> str:
    """Return a size in decimal units, as registries and `docker model` show it."""
    value, units = float(size), iter(("B", "kB", "MB", "GB", "TB", "PB"))
    unit = next(units)
    while value >= 1000 and unit != "PB":
        value, unit = value / 1000, next(units)
    return f"{size} B" if unit == "B" else f"{value:.2f} {unit}"


def plural(count: int, noun: str) -> str:
    """Return `count` with its noun: 1 blob, 2 blobs."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


_VERBS = {
    Action.IMPORT: "Storing",
    Action.FETCH: "Fetching",
    Action.PUSH: "Pushing",
    Action.COPY: "Copying",
    Action.MOUNT: "Mounted",
    Action.SKIP: "Exists",
    Action.VERIFY: "Verifying",
    Action.UNPACK: "Unpacking",
    Action.QUANTIZE: "Quantising",
}
_SECONDS_BETWEEN_LINES = 5.0
# Narrower terminals show only the names and sizes of transfers: more columns would wrap.
_MIN_BAR_WIDTH = 60
# What differs between the messages of several blobs that fail for one reason.
_VARYING = re.compile(r"(sha\d+|blake3):[0-9a-f]+|\d+(\.\d+)?")


@contextmanager
def shown_progress(settings: Settings) -> Iterator[ProgressCallback]:
    """Yield the progress callback that the settings select."""
    mode = "none" if settings.quiet else settings.progress
    if mode == "auto":
        mode = "bars" if sys.stderr.isatty() and not settings.json else "notes"
    if mode == "none":
        yield silent
    elif mode == "bars":
        with _bars() as bars:
            yield _bar_display(bars)
    else:
        yield LineDisplay(every_file=mode == "plain")


@contextmanager
def request_log(settings: Settings, formatter: logging.Formatter | None = None) -> Iterator[None]:
    """Write request logs and warnings to stderr in the block; with --quiet, only warnings."""
    import logging

    from modelpack.http.listener import LOGGERS

    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING if settings.quiet else logging.INFO)
    handler.setFormatter(formatter)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)  # GET /logs has its own handler and needs all records
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


class Notes:
    """Prints notes and retries; of the retries for one reason, one every few seconds."""

    def __init__(self, print_line: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._print_line = print_line
        self._clock = clock
        self._due: dict[str, float] = {}

    def __call__(self, progress: Progress) -> None:
        """Print a report, unless one like it was printed a moment ago."""
        prefix = "retry" if progress.action is Action.RETRY else "note"
        text = one_line(f"{prefix}: {progress.message or progress.name}")
        if progress.action is Action.RETRY:
            reason = _VARYING.sub("", text)
            now = self._clock()
            if now < self._due.get(reason, now):
                return
            self._due[reason] = now + _SECONDS_BETWEEN_LINES
        self._print_line(text)


class LineDisplay:
    """A progress callback that prints lines: for each note, and for a file every few seconds.

    A call that is quicker shows only notes and, with `every_file`, each finished file or blob.
    """

    def __init__(self, *, every_file: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_file = every_file
        self._clock = clock
        self._due = clock() + _SECONDS_BETWEEN_LINES
        self._notes = Notes(partial(click.echo, err=True), clock)

    def __call__(self, progress: Progress) -> None:
        """Print a report, if it is time for one."""
        if progress.action in (Action.NOTE, Action.RETRY):
            self._notes(progress)
        elif progress.finished:
            if self._every_file:
                self._print(progress, f"{progress.completed} bytes")
        elif self._clock() >= self._due:
            done = human_size(progress.completed)
            if progress.total:
                percent = progress.completed * 100 // progress.total
                done += f" of {human_size(progress.total)} ({percent} %)"
            self._print(progress, done)
            self._due = self._clock() + _SECONDS_BETWEEN_LINES

    def _print(self, progress: Progress, done: str) -> None:
        click.echo(f"{_VERBS[progress.action]} {one_line(progress.name)}: {done}", err=True)


def _bar_display(bars: Bars) -> ProgressCallback:
    """Return a callback that shows a bar for each file or blob in transfer."""
    tasks: dict[str, TaskID] = {}
    notes = Notes(partial(bars.console.print, markup=False, highlight=False), time.monotonic)

    def show(progress: Progress) -> None:
        if progress.action in (Action.NOTE, Action.RETRY):
            notes(progress)
            return
        key = str(progress.digest or progress.name)
        if key not in tasks:
            tasks[key] = bars.add_task("", total=progress.total)
        bars.update(
            tasks[key],
            description=f"{_VERBS[progress.action]} {one_line(progress.name)}",
            completed=progress.completed,
            total=progress.total,
        )

    return show


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

    console = Console(stderr=True)
    columns = [TextColumn("{task.description}", markup=False), DownloadColumn()]
    if console.width >= _MIN_BAR_WIDTH:
        columns.insert(1, BarColumn())
        columns += [TransferSpeedColumn(), TimeRemainingColumn()]
    return Bars(*columns, console=console, refresh_per_second=8)
