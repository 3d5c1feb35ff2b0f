"""The thread on which grammars are compiled."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from modelpack_engine.errors import QueueFullError
from modelpack_server.structured_output.grammar import on_deep_stack


def test_one_grammar_is_compiled_at_a_time() -> None:
    """Each stack takes half a gibibyte of address space."""
    running = threading.Semaphore(1)
    together = threading.Barrier(8)

    def work() -> bool:
        alone = running.acquire(blocking=False)
        threading.Event().wait(0.002)  # let the other threads start
        if alone:
            running.release()
        return alone

    def ask(_: int) -> bool:
        together.wait()
        return on_deep_stack(work)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))


def test_no_memory_for_the_stack_is_no_fault_of_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    before = threading.stack_size()
    with pytest.raises(QueueFullError, match="no memory for a stack of 512 MiB"):
        on_deep_stack(lambda: None)
    assert threading.stack_size() == before


def test_what_the_work_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        on_deep_stack(lambda: 1 // 0)
