"""`run_all` stops every task after a failure or Ctrl-C, however the interrupt arrives."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

import pytest

from modelpack.errors import InterruptedTransferError, ModelpackError
from modelpack.operations.transfer import run_all
from modelpack.progress import RunningTasks, Stop


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
            time.sleep(0.2)  # it takes a while to stop
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


@pytest.mark.usefixtures("interrupts")
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


def test_an_interrupt_while_a_thread_starts_stops_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor does not know such a thread."""
    stop = Stop()
    waiter = Waiter(stop)
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        assert waiter.began.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_all([waiter, lambda: None], 2, stop)
    assert waiter.stopped


def test_no_task_begins_after_the_wait() -> None:
    tasks = RunningTasks()
    assert tasks.begin()
    tasks.end()
    tasks.wait()
    assert not tasks.begin()
    tasks.wait()
