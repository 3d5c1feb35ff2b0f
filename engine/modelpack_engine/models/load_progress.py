"""Progress of a load: a callback gets the bytes that are read, then that the engine warms up.

`watched` sets the callback of the loads in its block; threads that copy the context inherit it. The
loaders report how much of the weights they have read, `stored_models` when the engine starts.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """`completed` of `total` bytes of the weight files are read; then the engine is `warming_up`.

    With a draft model, the bytes are counted again for it.
    """

    completed: int
    total: int
    warming_up: bool = False


#: Called in the thread that loads, and must not raise.
LoadCallback = Callable[[LoadProgress], None]


class _Watch:
    def __init__(self, callback: LoadCallback) -> None:
        self.callback = callback
        self.latest = LoadProgress(0, 0)

    def report(self, completed: int, total: int, *, warming_up: bool = False) -> None:
        progress = LoadProgress(completed, total, warming_up)
        if progress != self.latest:
            self.latest = progress
            self.callback(progress)


_watch: contextvars.ContextVar[_Watch | None] = contextvars.ContextVar("load_watch", default=None)


@contextmanager
def watched(callback: LoadCallback | None) -> Iterator[None]:
    """Call `callback` with the progress of loads in the block; None leaves the callback as is."""
    if callback is None:
        yield
        return
    token = _watch.set(_Watch(callback))
    try:
        yield
    finally:
        _watch.reset(token)


def begin(weights: Iterable[Path]) -> None:
    """Report that these files are to be read; the loader reports files that cannot be."""
    if (watch := _watch.get()) is not None:
        with suppress(OSError):
            watch.report(0, sum(path.stat().st_size for path in weights))


def read(share: float) -> None:
    """Report that a share of these bytes is read, up to 1; a smaller share than before is ignored.

    GGUF tensors are read when they are decoded, and evaluated afterwards.
    """
    watch = _watch.get()
    if watch is not None and not watch.latest.warming_up:
        total = watch.latest.total
        watch.report(max(watch.latest.completed, int(total * min(share, 1.0))), total)


def forward(progress: LoadProgress) -> None:
    """Report the progress of a load in another process."""
    if (watch := _watch.get()) is not None:
        watch.report(progress.completed, progress.total, warming_up=progress.warming_up)


def warm_up() -> None:
    """Report that the weights are read, and the engine allocates, tests and compiles."""
    if (watch := _watch.get()) is not None:
        watch.report(watch.latest.total, watch.latest.total, warming_up=True)
