"""CUDA's driver, in place of which a library counts the calls."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from modelpack_engine.kernels.recording import Note, Output
from modelpack_engine.kernels.sources import OUTPUTS, Body, body_text, kernel_source
from modelpack_engine.platform.driver import (
    Driver,
    DriverError,
    KernelCall,
    find_driver,
    pointer_bytes,
    shape_bytes,
)
from modelpack_engine.runner.replay import EARLY, EARLY_AFTER, launched_early, may_read_early

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
            if name == "cuLaunchKernelEx":
                given[0] = ctypes.string_at(ctypes.addressof(given[0]._obj), 56)
                (attributes,) = struct.unpack("Q", given[0][40:48])
                given[0] = (given[0][:40], ctypes.string_at(attributes, 72), given[0][48:52])
                del given[2]
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


def test_a_kernel_is_launched_early() -> None:
    library = Library()
    found = Driver(library)  # type: ignore[arg-type]
    found.make_graph([replace(CALL, early=True)], 77)
    name, (sizes, attribute, count), function, more = library.calls[1]
    assert (name, function, more) == ("cuLaunchKernelEx", 5, None)
    # As in cuda.h: seven numbers of CUlaunchConfig and a gap, and its stream; then its attributes,
    # of which one says that the launch is early (6), with a number; and how many there are.
    assert struct.unpack("7IxxxxQ", sizes) == (2, 3, 4, 64, 1, 1, 512, 77)
    assert struct.unpack("ixxxxi60x", attribute) == (6, 1)
    assert struct.unpack("I", count) == (1,)


def test_kernels_that_wait_are_launched_early_after_kernels() -> None:
    def matmul(stream: int) -> None:
        raise AssertionError(stream)

    bodies = ["merge", "packed_strips", "matmul", "add_norm", "rotate", "prefill", "decode"]
    bodies += ["product", "adapters", "packed", "adapters", "matmul", "adapters_norm", "adapters"]
    bodies += ["product", "add_norm", "adapters_norm", "product", "adapters_norm", "adapters_norm"]
    bodies += ["shrink_wide", "expand_wide", "expand_wide"]
    calls = [matmul if body == "matmul" else CALL for body in bodies]
    found = launched_early(bodies, calls)
    assert [isinstance(call, KernelCall) and call.early for call in found] == [
        False, True, False, False, True, False, True,
        False, True, False, False, False, False, False,
        False, True, False, False, True, False,
        False, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("body", sorted(EARLY))
def test_kernels_that_are_launched_early_wait(body: Body) -> None:
    statements = [line.partition("//")[0].strip() for line in body_text(body).splitlines()]
    code = [line for line in statements if line and not line.startswith("#")]
    if body == "rotate_decode":  # the one that does not rotate waits at once
        code.remove("PA_WAIT_FOR_BEFORE();")
    wait = code.index("if (!EXPERTS) " * (body == "block_tiles") + "PA_WAIT_FOR_BEFORE();")
    before = " ".join(code[:wait])
    if body in ("packed_strips", "block_strips", "digit_strips"):
        # Weights are copied before. One warp writes what those that have waited tell it to.
        copied, _, added = before.partition("if (warp >= WARPS) {")
        told = "pa_barrier_wait(written"
        assert "out[" in added.partition(told)[2]
        for text in (copied, added.partition(told)[0]):
            assert not any(name in text for name in ("x)", "more", "norm)", "out["))
    elif body == "packed_wide":  # only what is called later reads rows
        call = "bring_rows(step"
        assert "x + " in before.partition("auto bring_rows")[2]
        assert not any(name in before for name in (call, "out[", "out +"))
        assert call in " ".join(code[wait:])
    elif body == "block_tiles":  # the same; spans of experts are read after a wait of their own
        assert not any(name in before for name in ("x)", "source[", "bias[", "out["))
        assert "spans[" not in before.partition("if (EXPERTS) PA_WAIT_FOR_BEFORE();")[0]
    elif body == "rotate_decode":  # what earlier steps wrote, and numbers of this step
        before = before.replace("q[(heads_before", "")  # of the other
        names = ("joint", "values[", "q_weight[", "out[", "token[", "stats[", "(PA_DEVICE P*)")
        assert not any(name in before.partition("typedef")[2] for name in names)
    else:
        assert wait == code.index("PA_LET_NEXT_START();") + 1 == 1


@pytest.mark.parametrize(
    ("name", "early"),
    [("joint", True), ("values", True), ("previous", True), ("context_lens", False),
     ("block_tables", False), ("slots", False), ("positions", False)],
)  # fmt: skip
def test_attention_reads_early_what_no_kernel_of_the_step_writes(name: str, early: bool) -> None:
    source = kernel_source("rotate_decode", "cuda")
    note = Note("rotate_decode", source, [], [], [], [], (1, 1, 1), (1, 1, 1), 0)
    reads = [Output(0, 0) if each == name else 256 for each in source.inputs]
    assert may_read_early(note, reads) is early
    assert may_read_early(replace(note, body="decode"), reads)


@pytest.mark.parametrize("body", sorted(EARLY_AFTER))
def test_kernels_follow_one_that_is_not_early(body: Body) -> None:
    """All that was written before that one can be read at once."""
    assert EARLY_AFTER[body] not in {*EARLY, *EARLY_AFTER}
    assert "PA_LET_NEXT_START();" in body_text(EARLY_AFTER[body])


def test_second_matrices_wait_for_products_with_first_ones() -> None:
    """Each of the kernel's two ways reads `inner`, and writes, after it has waited."""
    code = re.sub(r"//.*", "", body_text("expand_wide"))
    assert "PA_LET_NEXT_START();" in code
    first, _, second = code.partition("    return;\n  }\n")
    for way in (first, second):
        before, _, after = way.partition("PA_WAIT_FOR_BEFORE();")
        assert "given +" in before
        for name in ("inner +", "(out +"):
            assert name not in before
            assert name in after


@pytest.mark.parametrize("body", sorted({*EARLY_AFTER} - {"expand_wide"}))
def test_kernels_that_read_early_wait_for_the_product(body: Body) -> None:
    """What they read before that was written before the product, which starts after its end."""
    code = re.sub(r"//.*", "", body_text(body))
    code = re.sub(r"#ifndef PA_EXPANDED\n.*?#endif", "", code, flags=re.DOTALL)
    before, _, after = code.partition("PA_WAIT_FOR_BEFORE();")
    assert "PA_LET_NEXT_START();" in before
    assert ")x)" in before
    for name in ("given" if body == "adapters" else "b", *OUTPUTS[body]):
        assert f"){name})" not in before
        assert f"){name})" in after


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
