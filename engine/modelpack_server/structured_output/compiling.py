"""Running the grammar compiler within limits.

It is native code that recurses along the references of a grammar, and a stack that overflows ends
the process. So it runs on a thread with a stack that the longest chain of references in a grammar
of the largest allowed size does not fill. One grammar is compiled at a time, so that many requests
cannot take the address space of many such stacks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from llguidance import LLParserLimits

from modelpack_engine.errors import QueueFullError
from modelpack_engine.panics import as_error

T = TypeVar("T")

LIMITS = LLParserLimits(verbose_errors=False)
_STACK = 512 << 20  # of address space: memory is taken as it is used
_one_at_a_time = threading.Lock()


def on_deep_stack(work: Callable[[], T]) -> T:
    """Return what `work` returns, or raise what it raises; it runs on a thread of its own.

    Raises `QueueFullError` if the system has no memory for the thread's stack.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="grammar-compiler", daemon=True)
    with _one_at_a_time:
        before = threading.stack_size(_STACK)  # also that of threads that others start now
        try:
            thread.start()
        except RuntimeError as error:
            raise QueueFullError(
                f"compiling the grammar failed: no memory for a stack of {_STACK >> 20} MiB"
            ) from error
        finally:
            threading.stack_size(before)
        thread.join()
    if errors:
        raise as_error(errors[0], "compiling the grammar") from errors[0]
    return results[0]
