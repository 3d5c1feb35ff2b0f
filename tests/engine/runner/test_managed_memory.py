"""Arrays that the host makes are sent to the GPU, where CUDA's driver does that."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine import managed_memory
from modelpack_engine.managed_memory import Prefetcher, sent


def driver(
    calls: list[tuple[Any, ...]], *, context: int = 0, stream: int = 0, prefetch: int = 0
) -> Any:
    """Return a driver that answers with these codes, and writes down what it is asked."""

    def device_of_context(device: Any) -> int:
        device._obj.value = 3
        return context

    def make_stream(handle: Any, flags: int) -> int:
        calls.append(("stream", flags))
        handle._obj.value = 77
        return stream

    def move(address: int, num_bytes: int, device: ctypes.c_int, handle: ctypes.c_void_p) -> int:
        calls.append(("prefetch", address, num_bytes, device.value, handle.value))
        return prefetch

    return SimpleNamespace(
        cuCtxGetDevice=device_of_context, cuStreamCreate=make_stream, cuMemPrefetchAsync=move
    )


def test_pages_go_to_the_device_of_the_context_on_one_stream() -> None:
    calls: list[tuple[Any, ...]] = []
    prefetcher = Prefetcher(driver(calls))
    prefetcher.send(4096, 100)
    prefetcher.send(8192, 16)
    assert calls == [("stream", 1), ("prefetch", 4096, 100, 3, 77), ("prefetch", 8192, 16, 3, 77)]


@pytest.mark.parametrize(
    ("codes", "asked"),
    [
        ({"stream": 2}, ["stream"]),
        ({"prefetch": 101}, ["stream", "prefetch"]),
        ({"context": 201}, []),
    ],
)
def test_a_refusal_is_the_last(codes: dict[str, int], asked: list[str]) -> None:
    calls: list[tuple[Any, ...]] = []
    prefetcher = Prefetcher(driver(calls, **codes))
    for _ in range(3):
        prefetcher.send(4096, 100)
    assert [call[0] for call in calls] == asked


def test_a_thread_without_a_context_is_asked_again() -> None:
    calls: list[tuple[Any, ...]] = []
    asked = driver(calls, context=201)
    prefetcher = Prefetcher(asked)
    prefetcher.send(4096, 100)
    prefetcher._get_device = driver(calls).cuCtxGetDevice
    prefetcher.send(4096, 100)
    assert [call[0] for call in calls] == ["stream", "prefetch"]


def test_arrays_are_sent_whole_and_small_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    prefetcher = Prefetcher(driver(calls))
    monkeypatch.setattr(managed_memory, "_prefetcher", lambda: prefetcher)
    array = mx.array(np.arange(5, dtype=np.int32))
    assert sent(array) is array
    address = np.asarray(array).ctypes.data
    assert calls[1:] == [("prefetch", address, 20, 3, 77)]
    sent(mx.array([1, 2], mx.int32))
    assert len(calls) == 2


def test_nothing_is_sent_without_cuda() -> None:
    managed_memory._prefetcher.cache_clear()
    assert managed_memory._prefetcher() is None
    array = mx.array([1.0, 2.0, 3.0])
    assert sent(array) is array
