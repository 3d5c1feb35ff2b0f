"""The CPU streams of models' threads: MLX never ends the thread that it starts for each."""

from __future__ import annotations

import threading
from collections.abc import Callable

import mlx.core as mx
import pytest

from modelpack_engine.async_engine import AsyncEngine
from modelpack_engine.engine import Engine
from modelpack_engine.platform import streams
from modelpack_engine.platform.streams import cpu_stream, reused_streams
from tests.engine.serving.tiny import tiny_engine


def in_threads(count: int, work: Callable[[], object]) -> None:
    """Run `work` in threads at the same time."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.long
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


def test_a_stream_with_an_error_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other streams of its thread are, and the memory of the model is freed."""
    synchronize, cleared, found = mx.synchronize, [], []
    monkeypatch.setattr(streams, "_idle", [])
    monkeypatch.setattr(mx, "clear_streams", lambda: cleared.append("streams"))
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append("cache"))

    def work() -> None:
        with reused_streams():
            found.extend([mx.default_stream(mx.cpu), cpu_stream(), cpu_stream()])

            def fail(stream: mx.Stream | None = None) -> None:
                if stream is None or stream == found[1]:
                    raise RuntimeError("it failed")
                synchronize(stream)

            monkeypatch.setattr(mx, "synchronize", fail)
        assert streams._used.streams is None
        cleared.append("left")

    in_threads(1, work)
    assert streams._idle == [found[0], found[2]]
    assert cleared == ["cache", "streams", "left"]
    assert [record.getMessage() for record in caplog.records] == ["a stream failed"] * 2
