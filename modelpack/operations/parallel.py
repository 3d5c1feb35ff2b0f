"""Run the independent parts of one call side by side, and stop them together."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import TypeVar

from modelpack.progress import Stop

T = TypeVar("T")


def run_all(tasks: Sequence[Callable[[], T]], workers: int, stop: Stop) -> list[T]:
    """Return the results of `tasks`, in their order, run by up to `workers` threads.

    The first failure asks the others to stop and is raised once all of them have ended, so that
    nothing goes on in the background after an error. Ctrl-C does the same.
    """
    if len(tasks) <= 1 or workers <= 1:
        return [task() for task in tasks]
    with concurrent.futures.ThreadPoolExecutor(min(workers, len(tasks)), "modelpack") as executor:
        futures = [executor.submit(task) for task in tasks]
        try:
            done, _ = concurrent.futures.wait(
                futures, return_when=concurrent.futures.FIRST_EXCEPTION
            )
            failed = next((f for f in futures if f in done and f.exception() is not None), None)
            if failed is not None:
                failed.result()
            return [future.result() for future in futures]
        except BaseException:
            stop.request()
            for future in futures:
                future.cancel()
            raise
