"""The CPU streams of models' threads: MLX never ends the thread that it starts for each."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

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


AT_ONCE = """
import threading, time
from modelpack_engine.platform.streams import reused_streams
import mlx.core as mx

shared = mx.compile(lambda x: {"a": x + 1})

class Model:
    def __init__(self):
        self.scale = 3  # the functions refer to the model, which refers to them
        self.functions = [mx.compile(lambda x: {"a": x * self.scale}) for _ in range(20)]

    def __del__(self):
        time.sleep(0.001)  # lets other threads run during a garbage collection

    def run(self):
        mx.eval([function(mx.zeros(4)) for function in (*self.functions, shared)])

def models():
    for _ in range(30):
        thread = threading.Thread(target=one)
        thread.start()
        thread.join()

def one():
    with reused_streams() as frees:
        model = Model()
        frees(model)
        model.run()
        del model

threads = [threading.Thread(target=models) for _ in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_models_that_end_at_the_same_time() -> None:
    """One frees the compiled functions of the other, which clears all of its own."""
    subprocess.run([sys.executable, "-c", AT_ONCE], check=True, timeout=60)


def test_a_garbage_collection_may_wait_for_the_thread_of_a_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cleared: list[str] = []
    ends, collects = threading.Event(), threading.Event()
    monkeypatch.setattr(streams, "_COLLECTION", 0.01)
    monkeypatch.setattr(mx, "clear_streams", lambda: cleared.append("streams"))

    def work() -> None:
        with reused_streams():
            assert ends.wait(60)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    class Owner:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            ends.set()
            thread.join(60)
            collects.set()

    Owner()
    gc.collect()
    assert collects.is_set()
    assert not thread.is_alive()
    assert cleared == []
    assert [record.getMessage() for record in caplog.records] == [
        "MLX's streams are left: a garbage collection takes too long"
    ]


def test_a_model_that_another_thread_uses_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams are cleared when the other thread has freed it."""
    collect = gc.collect
    used: list[Any] = []
    collected: list[int] = []
    alive_when_cleared: list[bool] = []
    models: list[weakref.ref[Any]] = []

    class Model:
        itself: Any

    def collect_while_it_is_used() -> int:
        collected.append(collect())
        used.clear()
        return collected[-1]

    monkeypatch.setattr(gc, "collect", collect_while_it_is_used)
    monkeypatch.setattr(mx, "clear_streams", lambda: alive_when_cleared.append(bool(models[0]())))

    def work() -> None:
        with reused_streams() as frees:
            used.append(Model())
            used[0].itself = used[0]
            models.append(weakref.ref(used[0]))
            frees(used[0])

    in_threads(1, work)
    assert alive_when_cleared == [False]
    assert len(collected) == 2
