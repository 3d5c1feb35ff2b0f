"""Run blocking work off the event loop; cancelling the call kills its worker process."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Each thread waits for a worker or a URL, whose queues reject more before all threads wait.
_threads = ThreadPoolExecutor(max_workers=256, thread_name_prefix="modelpack-rendering")


class Cancellation:
    """Cancels work whose caller no longer waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_set = False
        self._end: Callable[[], object] | None = None

    @property
    def is_set(self) -> bool:
        """Whether the work was cancelled."""
        return self._is_set

    def set(self) -> None:
        """End the running work, and any work that starts later."""
        with self._lock:
            self._is_set = True
            if self._end is not None:
                self._end()

    def set_end(self, end: Callable[[], object] | None) -> None:
        """Set the function that ends the running work, or None if nothing runs."""
        with self._lock:
            self._end = end
            if self._is_set and end is not None:
                end()


#: The cancellation of the current thread's work.
current_cancellation: contextvars.ContextVar[Cancellation | None] = contextvars.ContextVar(
    "cancellation", default=None
)
_loop: contextvars.ContextVar[asyncio.AbstractEventLoop] = contextvars.ContextVar("loop")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` in a thread, and return its result.

    Cancelling the call kills the worker that runs for the function.
    """
    return await in_executor(_threads, functools.partial(function, *args, **kwargs))


async def in_executor(threads: ThreadPoolExecutor, function: Callable[[], T]) -> T:
    """Run `function` in one of `threads`, and return its result, as `in_thread` does."""
    cancellation = Cancellation()
    context, loop = contextvars.copy_context(), asyncio.get_running_loop()
    context.run(current_cancellation.set, cancellation)
    context.run(_loop.set, loop)
    call = functools.partial(context.run, function)
    try:
        return await loop.run_in_executor(threads, call)
    except asyncio.CancelledError:
        cancellation.set()
        raise


def in_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` in the event loop that waits for this thread, and return its result.

    Call it in a thread of `in_thread`. Raises `concurrent.futures.CancelledError` if the caller of
    that no longer waits.
    """
    future = asyncio.run_coroutine_threadsafe(work, _loop.get())
    cancellation = current_cancellation.get() or Cancellation()
    cancellation.set_end(future.cancel)
    try:
        return future.result()
    finally:
        cancellation.set_end(None)


#: Characters, or token ids, from which a prompt counts as large.
LARGE = 64 * 1024
_WORKERS = ThreadPoolExecutor(2, "modelpack-prompts")


async def prepare(size: int, work: Callable[[], T]) -> T:
    """Run `work` in a thread, and return its result; large prompts share two threads."""
    return await (in_thread(work) if size < LARGE else in_executor(_WORKERS, work))
