"""CUDA's driver: page-locked memory, and graphs of kernels (CUDA Driver API).

MLX has made the context that is current in the thread of a model. The functions are those of
libcuda.so.1, https://docs.nvidia.com/cuda/cuda-driver-api.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from modelpack_engine.errors import EngineError

_PORTABLE, _MAPPED = 1, 2  # CU_MEMHOSTALLOC_*
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED: MLX may allocate and free meanwhile
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

_POINTER, _SIZE, _UNSIGNED = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
_TYPES: dict[str, tuple[Any, ...]] = {
    "cuMemHostAlloc": (_POINTER, _SIZE, _UNSIGNED),
    "cuMemFreeHost": (_POINTER,),
    "cuMemcpyHtoDAsync_v2": (ctypes.c_uint64, _POINTER, _SIZE, _POINTER),
    "cuMemcpyDtoDAsync_v2": (ctypes.c_uint64, ctypes.c_uint64, _SIZE, _POINTER),
    "cuStreamCreate": (_POINTER, _UNSIGNED),
    "cuStreamDestroy_v2": (_POINTER,),
    "cuStreamSynchronize": (_POINTER,),
    "cuStreamBeginCapture_v2": (_POINTER, ctypes.c_int),
    "cuStreamEndCapture": (_POINTER, _POINTER),
    "cuEventCreate": (_POINTER, _UNSIGNED),
    "cuEventDestroy_v2": (_POINTER,),
    "cuEventRecord": (_POINTER, _POINTER),
    "cuEventSynchronize": (_POINTER,),
    "cuGraphInstantiateWithFlags": (_POINTER, _POINTER, ctypes.c_ulonglong),
    "cuGraphUpload": (_POINTER, _POINTER),
    "cuGraphLaunch": (_POINTER, _POINTER),
    "cuGraphDestroy": (_POINTER,),
    "cuGraphExecDestroy": (_POINTER,),
    "cuModuleLoadData": (_POINTER, ctypes.c_char_p),
    "cuModuleGetFunction": (_POINTER, _POINTER, ctypes.c_char_p),
    "cuFuncSetAttribute": (_POINTER, ctypes.c_int, ctypes.c_int),
    "cuLaunchKernel": (_POINTER, *(_UNSIGNED,) * 7, _POINTER, _POINTER, _POINTER),
    "cuLaunchKernelEx": (_POINTER, _POINTER, _POINTER, _POINTER),
}


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: its value is a union of 64 bytes, here an int."""

    _fields_ = (
        ("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )  # fmt: skip


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", _UNSIGNED * 3), ("threads", _UNSIGNED * 3), ("shared_bytes", _UNSIGNED),
        ("stream", _POINTER), ("attributes", ctypes.POINTER(_Attribute)), ("count", _UNSIGNED),
    )  # fmt: skip


class DriverError(EngineError):
    """CUDA's driver is missing, or refuses a call."""


@dataclass(frozen=True, slots=True)
class KernelCall:
    """A kernel with its arguments, each as its bytes; `grid` counts threadgroups.

    A kernel that is launched `early` may start before the one before has ended, and waits for it.
    """

    function: int
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared_bytes: int
    arguments: tuple[bytes, ...]
    early: bool = False


class Functions:
    """Functions of a C library, with the types of their arguments, which return 0 or a code.

    All methods raise `error`, which names the library by `title`, and a code by `code_name`.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        types: Mapping[str, tuple[Any, ...]],
        title: str,
        code_name: str,
        error: type[DriverError] = DriverError,
    ) -> None:
        self._functions: dict[str, Any] = {}
        self._code_name, self._error = code_name, error
        for name, of_arguments in types.items():
            try:
                function = getattr(library, name)
            except AttributeError as missing:
                raise error(f"{title} has no {name}") from missing
            function.argtypes = of_arguments
            self._functions[name] = function

    def call(self, name: str, *arguments: object) -> None:
        """Call a function."""
        if code := self._functions[name](*arguments):
            raise self._error(f"{name} failed: {self._code_name} {code}")

    def make(self, name: str, *arguments: object) -> int:
        """Call a function whose first argument is where its result goes; return the result."""
        found = _POINTER()
        self.call(name, ctypes.byref(found), *arguments)
        if found.value is None:
            raise self._error(f"{name} returned nothing")
        return found.value


class Driver:
    """CUDA's driver. All methods raise `DriverError`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        functions = Functions(library, _TYPES, "CUDA's driver", "CUDA error")
        self._call, self._made = functions.call, functions.make
        self._kernels: dict[tuple[bytes, str], int] = {}
        self._shared: dict[int, int] = {}  # by kernel: the most shared memory that it may use

    def allocate_host(self, num_bytes: int) -> int:
        """Return the address of page-locked memory."""
        return self._made("cuMemHostAlloc", num_bytes, _PORTABLE | _MAPPED)

    def free_host(self, address: int) -> None:
        """Free page-locked memory."""
        self._call("cuMemFreeHost", address)

    def new_stream(self) -> int:
        """Return a stream that does not wait for others."""
        return self._made("cuStreamCreate", _NON_BLOCKING)

    def free_stream(self, stream: int) -> None:
        """Free a stream without work."""
        self._call("cuStreamDestroy_v2", stream)

    def synchronise(self, stream: int) -> None:
        """Wait for all work of a stream."""
        self._call("cuStreamSynchronize", stream)

    def new_event(self) -> int:
        """Return an event that no stream has reached."""
        return self._made("cuEventCreate", _NO_TIMING)

    def free_event(self, event: int) -> None:
        """Free an event."""
        self._call("cuEventDestroy_v2", event)

    def record(self, event: int, stream: int) -> None:
        """Put an event behind the work of a stream."""
        self._call("cuEventRecord", event, stream)

    def wait(self, event: int) -> None:
        """Wait until a stream has reached an event."""
        self._call("cuEventSynchronize", event)

    def copy(self, to: int, address: int, num_bytes: int, stream: int) -> None:
        """Copy page-locked memory to the GPU, in the order of a stream."""
        self._call("cuMemcpyHtoDAsync_v2", to, address, num_bytes, stream)

    def copy_within(self, to: int, address: int, num_bytes: int, stream: int) -> None:
        """Copy memory of the GPU, in the order of a stream that may be captured."""
        self._call("cuMemcpyDtoDAsync_v2", to, address, num_bytes, stream)

    def function(self, code: bytes, symbol: str, shared_bytes: int) -> int:
        """Return a kernel of machine code, which may use so much dynamic shared memory."""
        key = code, symbol
        if key not in self._kernels:
            module = self._made("cuModuleLoadData", code)
            self._kernels[key] = self._made("cuModuleGetFunction", module, symbol.encode())
        found = self._kernels[key]
        if shared_bytes > self._shared.get(found, 0):
            self._call("cuFuncSetAttribute", found, _SHARED_BYTES, shared_bytes)
            self._shared[found] = shared_bytes
        return found

    def make_graph(self, calls: Iterable[KernelCall | Callable[[int], None]], stream: int) -> int:
        """Return a graph that runs the calls one after the other; `stream` must be idle.

        Functions launch what they do on the stream that they are called with.
        """
        self._call("cuStreamBeginCapture_v2", stream, _RELAXED)
        graph = _POINTER()
        try:
            try:
                for call in calls:
                    if isinstance(call, KernelCall):
                        self._launch(call, stream)
                    else:
                        call(stream)
            finally:
                self._call("cuStreamEndCapture", stream, ctypes.byref(graph))
            made = self._made("cuGraphInstantiateWithFlags", graph, 0)
        finally:
            if graph:
                self._call("cuGraphDestroy", graph)
        self._call("cuGraphUpload", made, stream)
        return made

    def run_graph(self, graph: int, stream: int) -> None:
        """Launch a graph."""
        self._call("cuGraphLaunch", graph, stream)

    def free_graph(self, graph: int) -> None:
        """Free a graph that is not running."""
        self._call("cuGraphExecDestroy", graph)

    def _launch(self, call: KernelCall, stream: int) -> None:
        values = [ctypes.create_string_buffer(value, len(value)) for value in call.arguments]
        pointers = (_POINTER * len(values))(*map(ctypes.addressof, values))
        if call.early:
            attribute = _Attribute(_EARLY, b"", 1)
            launch = _Launch(
                call.grid, call.threads, call.shared_bytes, stream, ctypes.pointer(attribute), 1
            )
            self._call("cuLaunchKernelEx", ctypes.byref(launch), call.function, pointers, None)
            return
        self._call(
            "cuLaunchKernel", call.function, *call.grid, *call.threads, call.shared_bytes,
            stream, pointers, None,
        )  # fmt: skip


@cache
def find_driver() -> Driver:
    """Return this machine's driver. Raises `DriverError`."""
    try:
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except OSError as error:
        raise DriverError(f"CUDA's driver is not found: {error}") from error


def pointer_bytes(address: int) -> bytes:
    """Return an address as an argument of a kernel."""
    return address.to_bytes(8, "little")


def shape_bytes(shape: Sequence[int]) -> bytes:
    """Return a shape as an argument of MLX's type: ten int32."""
    return b"".join(size.to_bytes(4, "little") for size in (*shape, *(0,) * (10 - len(shape))))
