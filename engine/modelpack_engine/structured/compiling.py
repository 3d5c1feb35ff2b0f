"""Running the grammar compiler within limits.

It is native code that recurses along the references of a grammar, and a stack that overflows ends
the process. So it runs on a thread with a stack that the longest chain of references in a grammar
of the largest allowed size does not fill.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from llguidance import LLParserLimits

T = TypeVar("T")

LIMITS = LLParserLimits(verbose_errors=False)
_STACK = 512 << 20  # of address space: memory is taken as it is used
_sizing = threading.Lock()


def on_deep_stack(work: Callable[[], T]) -> T:
    """Return what `work` returns, or raise what it raises; it runs on a thread of its own."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="grammar-compiler", daemon=True)
    with _sizing:  # the size is that of all threads that are started meanwhile
        before = threading.stack_size(_STACK)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
