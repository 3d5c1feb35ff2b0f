"""CUDA's driver, in place of which a library counts the calls."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from modelpack_engine.platform.driver import (
    Driver,
    DriverError,
    KernelCall,
    find_driver,
    pointer_bytes,
    shape_bytes,
)

#: Functions whose first argument is where a handle goes.
MAKERS = {
    "cuMemHostAlloc", "cuStreamCreate", "cuEventCreate", "cuGraphInstantiateWithFlags",
    "cuModuleLoadData", "cuModuleGetFunction",
}  # fmt: skip


class Library:
    """Records calls; `codes` are the results of functions, 0 for others."""

    def __init__(self, **codes: int) -> None:
        self.codes, self.calls = codes, list[tuple[Any, ...]]()
        self.arguments: list[bytes] = []
        self.missing = ""
        self._handles = iter(range(100, 200))

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("cu") or name == self.missing:
            raise AttributeError(name)

        def function(*arguments: Any) -> int:
            given = list(arguments)
            if name in MAKERS or name == "cuStreamEndCapture":
                place = given.pop(1 if name == "cuStreamEndCapture" else 0)
                place._obj.value = next(self._handles)
            if name == "cuLaunchKernel":
                pointers = given[9]
                sizes = (8, 40, 8)[: len(pointers)]
                self.arguments += [
                    ctypes.string_at(pointer, size)
                    for pointer, size in zip(pointers, sizes, strict=True)
                ]
                del given[9]
            self.calls.append((name, *(getattr(each, "value", each) for each in given)))
            return self.codes.get(name, 0)

        self.__dict__[name] = function
        return function


CALL = KernelCall(
    5, (2, 3, 4), (64, 1, 1), 512, (pointer_bytes(9), shape_bytes((7, 8)), pointer_bytes(10))
)


def test_a_graph_is_captured_and_launched() -> None:
    library = Library()
    found = Driver(library)  # type: ignore[arg-type]
    stream = found.new_stream()
    graph = found.make_graph([CALL], stream)
    found.run_graph(graph, stream)
    found.free_graph(graph)
    assert library.calls == [
        ("cuStreamCreate", 1),
        ("cuStreamBeginCapture_v2", 100, 2),
        ("cuLaunchKernel", 5, 2, 3, 4, 64, 1, 1, 512, 100, None),
        ("cuStreamEndCapture", 100),
        ("cuGraphInstantiateWithFlags", 101, 0),
        ("cuGraphDestroy", 101),
        ("cuGraphUpload", 102, 100),
        ("cuGraphLaunch", 102, 100),
        ("cuGraphExecDestroy", 102),
    ]
    first, shape, last = library.arguments
    assert [int.from_bytes(each, "little") for each in (first, last)] == [9, 10]
    assert list(memoryview(shape).cast("i")) == [7, 8, *[0] * 8]


def test_a_capture_that_fails_is_ended() -> None:
    library = Library(cuLaunchKernel=1)
    with pytest.raises(DriverError, match="cuLaunchKernel failed: CUDA error 1"):
        Driver(library).make_graph([CALL], 3)  # type: ignore[arg-type]
    assert [name for name, *_ in library.calls] == [
        "cuStreamBeginCapture_v2", "cuLaunchKernel", "cuStreamEndCapture", "cuGraphDestroy",
    ]  # fmt: skip


def test_a_graph_that_cannot_be_made_is_freed() -> None:
    library = Library(cuGraphInstantiateWithFlags=2)
    with pytest.raises(DriverError, match="cuGraphInstantiateWithFlags"):
        Driver(library).make_graph([CALL], 3)  # type: ignore[arg-type]
    assert library.calls[-1] == ("cuGraphDestroy", 100)


def test_code_is_loaded_once() -> None:
    library = Library()
    found = Driver(library)  # type: ignore[arg-type]
    one = found.function(b"code", "name", 0)
    assert found.function(b"code", "name", 0) == one
    assert library.calls == [("cuModuleLoadData", b"code"), ("cuModuleGetFunction", 100, b"name")]
    assert found.function(b"code", "name", 99_000) == one
    assert found.function(b"code", "name", 50_000) == one
    assert library.calls[2:] == [("cuFuncSetAttribute", one, 8, 99_000)]
    assert found.function(b"other", "name", 0) != one


def test_memory_and_events() -> None:
    library = Library()
    found = Driver(library)  # type: ignore[arg-type]
    address, event = found.allocate_host(64), found.new_event()
    found.copy(7, address, 64, 3)
    found.copy_within(9, 7, 32, 3)
    found.record(event, 3)
    found.wait(event)
    found.synchronise(3)
    found.free_event(event)
    found.free_host(address)
    found.free_stream(3)
    assert library.calls == [
        ("cuMemHostAlloc", 64, 3),
        ("cuEventCreate", 2),
        ("cuMemcpyHtoDAsync_v2", 7, 100, 64, 3),
        ("cuMemcpyDtoDAsync_v2", 9, 7, 32, 3),
        ("cuEventRecord", 101, 3),
        ("cuEventSynchronize", 101),
        ("cuStreamSynchronize", 3),
        ("cuEventDestroy_v2", 101),
        ("cuMemFreeHost", 100),
        ("cuStreamDestroy_v2", 3),
    ]


def test_an_old_driver_is_refused() -> None:
    library = Library()
    library.missing = "cuGraphInstantiateWithFlags"
    with pytest.raises(DriverError, match="CUDA's driver has no cuGraphInstantiateWithFlags"):
        Driver(library)  # type: ignore[arg-type]


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    find_driver.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(DriverError, match="CUDA's driver is not found: libcuda"):
        find_driver()
