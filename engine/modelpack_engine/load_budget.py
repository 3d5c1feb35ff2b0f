"""LoadBudget: the time and the number of modules that loading one model may take.

The pool sets the budget of a load with `applied`; code that loads calls `checkpoint` between its
steps, and `count_modules` bounds the module tree while mlx-lm's constructor builds it.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from modelpack_engine.errors import LoadCancelledError, ModelLoadError

#: Seconds that one load may take: 400 GB from a disk that reads 250 MB/s.
LOAD_SECONDS = 1800.0


class LoadBudget:
    """The budget of one load. Any thread may cancel it; the thread that loads checks it."""

    def __init__(
        self, seconds: float = LOAD_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds = seconds
        self._clock = clock
        self._deadline = clock() + seconds
        self._cancelled = threading.Event()

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Make the next check raise `LoadCancelledError`."""
        self._cancelled.set()

    def remaining(self) -> float:
        """Return the seconds until the deadline."""
        return max(0.0, self._deadline - self._clock())

    def check(self) -> None:
        """Raise `LoadCancelledError` if nobody waits, `ModelLoadError` after the deadline."""
        if self.is_cancelled:
            raise LoadCancelledError("the load was cancelled: nobody waits for the model any more")
        if self._clock() >= self._deadline:
            raise self.expired()

    def expired(self) -> ModelLoadError:
        """Return the error of a load that takes too long."""
        return ModelLoadError(f"loading took longer than {self.seconds:.0f} s")


_budget: contextvars.ContextVar[LoadBudget | None] = contextvars.ContextVar(
    "load_budget", default=None
)
_counter: contextvars.ContextVar[_ModuleCounter | None] = contextvars.ContextVar(
    "module_counter", default=None
)


class _ModuleCounter:
    def __init__(self, limit: int, what: str) -> None:
        self.limit = limit
        self.what = what
        self.count = 0

    def add(self) -> None:
        self.count += 1
        if self.count > self.limit:
            raise ModelLoadError(
                f"{self.what}: the sizes in the configuration ask for more than {self.limit}"
                " modules, which the tensors in the files do not justify"
            )
        if self.count % 256 == 0:
            checkpoint()


@contextmanager
def applied(budget: LoadBudget) -> Iterator[LoadBudget]:
    """Make `budget` the current one; threads started by `asyncio.to_thread` inherit it."""
    token = _budget.set(budget)
    try:
        yield budget
    finally:
        _budget.reset(token)


def checkpoint() -> None:
    """Raise if the current budget is spent or cancelled; does nothing without one."""
    budget = _budget.get()
    if budget is not None:
        budget.check()


@contextmanager
def count_modules(limit: int, what: str) -> Iterator[None]:
    """Raise `ModelLoadError` once this thread creates more than `limit` modules of MLX.

    MLX's arrays are lazy, its modules are not: a layer takes memory as soon as it is built.
    """
    _install()
    token = _counter.set(_ModuleCounter(limit, what))
    try:
        yield
    finally:
        _counter.reset(token)


_installing = threading.Lock()
_installed = False


def _install() -> None:
    """Have every new module counted where `count_modules` asks for it."""
    global _installed
    from mlx.nn.layers.base import Module

    with _installing:
        if _installed:
            return
        original = Module.__init__

        def __init__(self: Module) -> None:
            counter = _counter.get()
            if counter is not None:
                counter.add()
            original(self)

        Module.__init__ = __init__
        _installed = True
