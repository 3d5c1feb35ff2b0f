"""Staged arrays are prefetched to the GPU by CUDA's driver, where that is possible."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack_engine.platform import device
from modelpack_engine.platform.device import Prefetcher, Staging


def driver(
    calls: list[tuple[Any, ...]], *, context: int = 0, stream: int = 0, prefetch: int = 0
) -> Any:
    """Return a fake driver that returns these codes and records its calls."""

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


def test_numbers_are_sent_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    prefetcher = Prefetcher(driver(calls))
    monkeypatch.setattr(device, "_prefetcher", lambda: prefetcher)
    array = Staging().put(np.arange(5, dtype=np.int32))
    address = np.asarray(array).ctypes.data
    assert calls[1:] == [("prefetch", address, 20, 3, 77)]
    assert array[:5].tolist() == [0, 1, 2, 3, 4]


class Staged(Staging):
    """Staging as on CUDA; on the CPU, arrays are in host memory as well."""

    def put(self, numbers: Any) -> mx.array:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device, "_prefetcher", lambda: Prefetcher(driver([])))
            return super().put(numbers)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.sampled_from([1, 255, 256, 257, 3000])),
            st.just(("turn", 0)),
            st.tuples(st.just("read"), st.integers(0, 3)),
        ),
        max_size=60,
    )
)
def test_arrays_keep_their_numbers_until_their_turn_has_ended(
    events: list[tuple[str, int]],
) -> None:
    staging, turn, made = Staged(), 0, 0
    held: list[tuple[int, mx.array, int, int]] = []
    for what, number in events:
        if what == "turn":
            turn = staging.next_step()
        elif what == "put":
            made += 1
            array = staging.put(np.arange(made, made + number, dtype=np.int32))
            assert array.size >= number
            held.append((turn, array, made, number))
        else:
            staging.read(turn - number)
            held = [one for one in held if one[0] >= turn - number]
        for _, array, first, count in held:
            assert array[0].item() == first
            assert array[count - 1].item() == first + count - 1


def test_staged_memory_is_used_again_and_does_not_grow_without_end() -> None:
    staging = Staged()
    seen: set[int] = set()
    for _ in range(100):
        turn = staging.next_step()
        array = staging.put(np.zeros(10, np.int32))
        seen.add(np.asarray(array).ctypes.data)
        staging.read(turn - 1)
    assert len(seen) <= 3
    staging.next_step()
    arrays = [staging.put(np.full(10, i, np.int32)) for i in range(50)]  # no token is read
    assert [array[9].item() for array in arrays] == list(range(50))
    assert {array.size for array in arrays} == {256}


def test_without_cuda_arrays_are_as_they_were_made() -> None:
    assert device._prefetcher() is None
    assert Staging().put(np.arange(3, dtype=np.int32)).tolist() == [0, 1, 2]


def test_an_engine_on_the_gpu_may_follow_one_on_the_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = Prefetcher(driver([]))
    monkeypatch.setattr(device, "_loaded_prefetcher", lambda: loaded)
    assert device._prefetcher() is None
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    assert device._prefetcher() is loaded
