"""`run_all` stops every task after a failure or Ctrl-C, however the interrupt arrives."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from modelpack.errors import InterruptedTransferError, ModelpackError
from modelpack.operations.transfer import run_all
from modelpack.progress import Stop


class Waiter:
    """A task that runs until it is stopped, and records whether it was."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self.began = threading.Event()
        self.stopped = False

    def __call__(self) -> None:
        self.began.set()
        try:
            self._stop.wait(20)
        except InterruptedTransferError:
            self.stopped = True
            raise


def test_results_have_the_order_of_the_tasks() -> None:
    tasks: list[Callable[[], int]] = [lambda n=n: n for n in range(50)]  # type: ignore[misc]
    assert run_all(tasks, 4, Stop()) == list(range(50))


def test_a_failure_stops_the_others() -> None:
    stop = Stop()
    waiter = Waiter(stop)

    def fail() -> None:
        assert waiter.began.wait(20)
        raise ModelpackError("no space")

    with pytest.raises(ModelpackError, match="no space"):
        run_all([waiter, fail], 2, stop)
    assert waiter.stopped


def test_an_interrupt_that_another_thread_receives_stops_the_tasks() -> None:
    """The system may deliver a signal to any thread; the main thread is not woken by it then."""
    stop = Stop()
    waiter = Waiter(stop)

    def interrupt() -> None:
        assert waiter.began.wait(20)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_all([waiter, interrupt], 2, stop)
    assert waiter.stopped


def test_an_interrupt_while_tasks_are_started_stops_those_that_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop = Stop()
    waiter = Waiter(stop)
    submit = ThreadPoolExecutor.submit

    def interrupted(executor: ThreadPoolExecutor, task: Callable[..., Any]) -> Future[Any]:
        if task is waiter:
            return submit(executor, task)
        assert waiter.began.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_all([waiter, lambda: None], 2, stop)
    assert waiter.stopped
