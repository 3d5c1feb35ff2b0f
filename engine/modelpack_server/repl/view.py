"""Display of a streamed reply: Markdown on a terminal, plain text elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from modelpack.cli.output import visible

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live

# Seconds between two updates of the terminal: smooth, at low cost.
_FRAME = 1 / 15


class BareView:
    """Writes only the plain response, for files and pipes."""

    def __init__(self) -> None:
        self._ended = True

    def text(self, piece: str) -> None:
        """Write a piece."""
        click.echo(piece, nl=False)
        sys.stdout.flush()
        self._ended = piece.endswith("\n")

    def thought(self, piece: str) -> None:
        """Ignore the reasoning, which is not part of the response."""

    def end(self) -> None:
        """End the last line."""
        if not self._ended:
            click.echo()


class TerminalView:
    """Renders Markdown on a terminal.

    Complete blocks are printed once and scroll away. The last block, which is still growing, is
    redrawn in place.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._live: Live | None = None
        self._tail = _Tail("", spaced=False)
        self._pending = ""
        self._drawn = -1.0
        self._printed = False  # whether a block of this response was printed
        self._thinking = False

    def text(self, piece: str) -> None:
        """Show a piece; redraw at most every `_FRAME` seconds."""
        if self._thinking:
            self._thinking = False
            self._console.print("\n")
        self._pending += visible(piece)
        now = self._clock()
        if now - self._drawn >= _FRAME:
            self._draw()
            self._drawn = now

    def thought(self, piece: str) -> None:
        """Show a piece as dimmed plain text."""
        if not self._thinking:
            self.end()
            self._thinking = True
        self._console.print(
            visible(piece), style="dim", end="", markup=False, highlight=False, soft_wrap=True
        )

    def end(self) -> None:
        """Print the rest of the response."""
        if self._thinking:
            self._thinking = False
            self._console.print()
        self._draw()
        if self._live is not None:
            self._tail.whole = True
            self._live.stop()
            self._live = None
        self._pending, self._printed = "", False

    def _draw(self) -> None:
        from rich.live import Live
        from rich.markdown import Markdown

        if not self._pending.strip():
            return
        complete, self._pending = split_blocks(self._pending)
        if self._live is None:
            self._live = Live(
                console=self._console, auto_refresh=False, vertical_overflow="visible",
                redirect_stdout=False, redirect_stderr=False,
            )  # fmt: skip
            self._live.start()
        if complete:
            if self._printed:
                self._console.print()
            self._console.print(Markdown(complete))
            self._printed = True
        self._tail = _Tail(self._pending, spaced=self._printed)
        self._live.update(self._tail, refresh=True)


class _Tail:
    """Markdown that shows only its last lines, as many as fit on the terminal."""

    def __init__(self, text: str, *, spaced: bool) -> None:
        self._text = text
        self._spaced = spaced
        self.whole = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markdown import Markdown
        from rich.segment import Segment

        if not self._text.strip():
            return
        lines = console.render_lines(Markdown(self._text), options, pad=False)
        if self._spaced:
            lines.insert(0, [])
        if not self.whole:
            lines = lines[-max(1, console.height - 1) :]
        for at, line in enumerate(lines):
            yield from line
            if at < len(lines) - 1:
                yield Segment.line()


def split_blocks(text: str) -> tuple[str, str]:
    """Return the complete blocks of Markdown, and the last block, which may still grow."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt().enable("table").parse(text)
    starts = [token.map[0] for token in tokens if token.level == 0 and token.map is not None]
    if len(starts) < 2:
        return "", text
    lines = text.splitlines(keepends=True)
    return "".join(lines[: starts[-1]]), "".join(lines[starts[-1] :])
