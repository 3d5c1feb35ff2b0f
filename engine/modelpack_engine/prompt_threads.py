"""Threads that turn large prompts into tokens: a few, so that small prompts never wait for them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from modelpack_engine.worker.cancelling import in_executor, in_thread

T = TypeVar("T")

#: Characters, or token ids, from which a prompt counts as large.
LARGE = 64 * 1024
_WORKERS = ThreadPoolExecutor(2, "modelpack-prompts")


async def prepare(size: int, work: Callable[[], T]) -> T:
    """Return `work()`, called in a thread; those of large prompts are two."""
    return await (in_thread(work) if size < LARGE else in_executor(_WORKERS, work))
