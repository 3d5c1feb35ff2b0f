"""The CPU streams of models' threads: MLX never ends the thread that it starts for each."""

from __future__ import annotations

import threading
from collections.abc import Callable

import mlx.core as mx

from modelpack_engine.async_engine import AsyncEngine
from modelpack_engine.engine import Engine
from modelpack_engine.platform.streams import cpu_stream, reused_streams
from tests.engine.serving.tiny import tiny_engine


def in_threads(count: int, work: Callable[[], object]) -> None:
    """Run `work` in threads at the same time."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_models_one_after_another_use_the_same_streams() -> None:
    used: set[str] = set()

    def open_engine() -> Engine:
        used.add(str(mx.default_stream(mx.cpu)))
        return tiny_engine()

    for _ in range(5):
        engine = AsyncEngine(open_engine)
        engine.wait_until_ready(60)
        engine.close()
    assert len(used) <= 2  # an engine has a second one


def test_models_at_the_same_time_have_streams_of_their_own() -> None:
    together = threading.Barrier(3, timeout=60)
    used: list[str] = []
    sums: list[float] = []

    def work() -> None:
        with reused_streams():
            used.extend([str(mx.default_stream(mx.cpu)), str(cpu_stream())])
            together.wait()
            sums.append(mx.arange(100).sum(stream=mx.cpu).item())

    in_threads(3, work)
    assert sums == [4950] * 3
    assert len(set(used)) == 6


def test_a_thread_of_no_model_gets_a_new_stream() -> None:
    assert cpu_stream() != cpu_stream()
