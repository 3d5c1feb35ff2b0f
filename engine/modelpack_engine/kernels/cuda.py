"""NVRTC, the run-time compiler of MLX's CUDA build: compile kernels and cache their binaries."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from modelpack_engine.errors import EngineError
from modelpack_engine.kernels.sources import KernelSource

_SONAMES = ("libnvrtc.so.13", "libnvrtc.so.12")
_HEADER = "cuda_fp16.h"


class CompileError(EngineError):
    """NVRTC is missing, or cannot compile a source."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """The machine code of a kernel, and the kernel's symbol in it."""

    code: bytes
    symbol: str


class Nvrtc:
    """NVRTC, with CUDA's headers."""

    def __init__(self, library: ctypes.CDLL, include: Path) -> None:
        self._library = library
        self._include = include

    def compile(self, text: str, name: str, architecture: str) -> Compiled:
        """Compile `text` for an `architecture` such as sm_90a; `name` is the qualified name.

        Raises `CompileError` with the compiler's log.
        """
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None
        )
        try:
            self._call("nvrtcAddNameExpression", program, name.encode())
            options = [
                b"--device-as-default-execution-space",  # as MLX does
                f"--gpu-architecture={architecture}".encode(),
                f"--include-path={self._include}".encode(),
            ]
            array = (ctypes.c_char_p * len(options))(*options)
            try:
                self._call("nvrtcCompileProgram", program, len(options), array)
            except CompileError as error:
                log = self._read("nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program)
                raise CompileError(log.rstrip(b"\0").decode(errors="replace")) from error
            symbol = ctypes.c_char_p()
            self._call("nvrtcGetLoweredName", program, name.encode(), ctypes.byref(symbol))
            assert symbol.value is not None
            code = self._read("nvrtcGetCUBINSize", "nvrtcGetCUBIN", program)
            return Compiled(code, symbol.value.decode())
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _read(self, size_of: str, get: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(size_of, program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(get, program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise CompileError(f"{function} failed: status {status}")


@cache
def find() -> Nvrtc:
    """Return this machine's compiler; raise `CompileError` if it or its headers are missing."""
    folders = list(_folders())
    include = next((f / "include" for f in folders if (f / "include" / _HEADER).is_file()), None)
    if include is None:
        raise CompileError(f"{_HEADER} not found in {', '.join(map(str, folders)) or 'any folder'}")
    # The name without a folder finds the library that MLX has loaded.
    for place in ("", *(f"{folder / 'lib'}/" for folder in folders)):
        for name in _SONAMES:
            try:
                return Nvrtc(ctypes.CDLL(place + name), include)
            except OSError:
                continue
    raise CompileError(f"{' or '.join(_SONAMES)} not found")


def _folders() -> Iterator[Path]:
    """Yield folders that may have CUDA: Python packages, then those of CUDA's variables."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec and spec.submodule_search_locations) or ():
        yield from sorted(path for path in Path(root).iterdir() if path.is_dir())
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if place := os.environ.get(variable):
            yield Path(place)
    yield Path("/usr/local/cuda")


NAMESPACE = "mlx::core::cu"
#: The beginning of MLX's sources, which takes NVRTC two seconds to compile.
MLX_HEADER = """
#include "mlx/backend/cuda/device/utils.cuh"

#include <cooperative_groups.h>

"""
_CUDA_TYPES = {
    mx.bool_: "bool", mx.int8: "int8_t", mx.int16: "int16_t", mx.int32: "int32_t",
    mx.int64: "int64_t", mx.uint8: "uint8_t", mx.uint16: "uint16_t", mx.uint32: "uint32_t",
    mx.uint64: "uint64_t", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
}  # fmt: skip
_NAMES = _CUDA_TYPES | {mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}
_LONGEST = 245  # of a file's name without its suffix

Template = Sequence[tuple[str, Any]]


class GeneratedKernel:
    """The source that MLX generates for a kernel with these inputs, template and output types.

    `function` is the kernel's name in `NAMESPACE`; `text` is the source without `MLX_HEADER`.
    `takes_shape` has for each input whether its shape is an argument, after it. Raises `KeyError`
    for types that our kernels do not use.
    """

    def __init__(
        self,
        source: KernelSource,
        inputs: Sequence[mx.array],
        template: Template,
        outputs: Sequence[mx.Dtype],
    ) -> None:
        self.function = "custom_kernel_" + source.name + "".join(map(_argument, template))
        arguments, self.takes_shape = [], list[bool]()
        for name, array in zip(source.inputs, inputs, strict=True):
            arguments.append(f"const {_CUDA_TYPES[array.dtype]}* {name}")
            self.takes_shape.append(bool(array.ndim) and f"{name}_shape" in source.source)
            if self.takes_shape[-1]:
                arguments.append(f"const __grid_constant__ Shape {name}_shape")
        for name, dtype in zip(source.outputs, outputs, strict=True):
            arguments.append(f"{_CUDA_TYPES[dtype]}* {name}")
        constants = "".join(f"  {_constant(name, value)};\n" for name, value in template)
        self.text = (
            f"{source.header}namespace {NAMESPACE} {{\n\nnamespace cg = cooperative_groups;\n\n"
            f"__global__ void {self.function}(\n"
            + ",\n".join(f"    {argument}" for argument in arguments)
            + f") {{\n{constants}\n{source.source}\n}}\n\n}} // namespace {NAMESPACE}\n"
        )

    @property
    def name(self) -> str:
        """The qualified name of the kernel."""
        return f"{NAMESPACE}::{self.function}"

    @property
    def path(self) -> Path:
        """The path of its binary in MLX's folder, without a suffix; long names become folders."""
        module = f"{self.function}_{std_hash((MLX_HEADER + self.text).encode()):x}"
        return Path(*(module[i : i + _LONGEST] for i in range(0, len(module), _LONGEST)))


def binaries_folder() -> Path:
    """Return the folder in which MLX caches binaries."""
    if given := os.environ.get("MLX_PTX_CACHE_DIR"):
        return Path(given)
    temporary = next(
        (place for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR") if (place := os.environ.get(name))),
        "/tmp",  # noqa: S108 - where MLX looks
    )
    version: str = mx.__version__  # type: ignore[attr-defined]
    return Path(temporary) / "mlx" / version / "ptx"


def std_hash(data: bytes) -> int:
    """Return libstdc++'s `std::hash<std::string>` of `data` on 64 bits (MurmurHash 2, 64A)."""
    multiplier, mask = 0xC6A4A7935BD1E995, (1 << 64) - 1
    value = 0xC70F6907 ^ (len(data) * multiplier & mask)
    whole = len(data) & ~7
    for i in range(0, whole, 8):
        word = int.from_bytes(data[i : i + 8], "little") * multiplier & mask
        value = (value ^ (word ^ word >> 47) * multiplier & mask) * multiplier & mask
    if whole < len(data):
        value = (value ^ int.from_bytes(data[whole:], "little")) * multiplier & mask
    value = (value ^ value >> 47) * multiplier & mask
    return value ^ value >> 47


def _argument(argument: tuple[str, Any]) -> str:
    value = argument[1]
    if isinstance(value, bool):
        return "_t" if value else "_f"
    return f"_{value}" if isinstance(value, int) else f"_{_NAMES[value]}"


def _constant(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()}"
    if isinstance(value, int):
        return f"constexpr int {name} = {value}"
    return f"using {name} = {_CUDA_TYPES[value]}"


logger = logging.getLogger(__name__)

#: The parts of MLX's headers that our kernels need; `Shape` is MLX's, with 10 sizes.
PRELUDE = """\
#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
namespace cooperative_groups {}
namespace mlx::core::cu {
struct Shape {
  int32_t sizes[10];
  int32_t operator[](int axis) const { return sizes[axis]; }
};
}
"""


def prepared(kernel: Callable[..., list[mx.array]], source: KernelSource) -> Any:
    """Return `kernel`, which MLX made of `source`, with its binaries compiled before it runs."""
    seen: set[tuple[Any, ...]] = set()

    def call(
        *,
        inputs: Sequence[mx.array],
        template: Template,
        output_dtypes: Sequence[mx.Dtype],
        **more: Any,
    ) -> list[mx.array]:
        given = tuple((array.dtype, array.ndim > 0) for array in inputs)
        key = (tuple(template), given, tuple(output_dtypes))
        if key not in seen:
            seen.add(key)
            prepare(source, inputs, template, output_dtypes)
        return kernel(inputs=inputs, template=template, output_dtypes=output_dtypes, **more)

    return call


def prepare(
    source: KernelSource,
    inputs: Sequence[mx.array],
    template: Template,
    outputs: Sequence[mx.Dtype],
) -> None:
    """Compile a kernel for these arguments and store its binary where MLX finds it, if possible."""
    if not found_by_mlx():
        return
    try:
        kernel, architecture = GeneratedKernel(source, inputs, template, outputs), _architecture()
        binary = Binary(kernel, architecture)
        if not binary.is_there:
            binary.write(compile_kernel(kernel, architecture, find()))
    except (CompileError, OSError, KeyError) as error:
        logger.info("MLX compiles the kernel %s itself: %s", source.name, error)


@cache
def found_by_mlx() -> bool:
    """Return whether MLX runs the binaries in its folder."""
    try:
        found = _runs_another_text(_architecture(), find())
    except (CompileError, OSError, KeyError, RuntimeError) as error:
        logger.info("MLX compiles kernels itself: %s", error)
        return False
    if not found:
        logger.info("MLX compiles kernels itself: it does not look into %s", binaries_folder())
    return found


def _runs_another_text(architecture: str, compiler: Nvrtc) -> bool:
    """Return whether MLX, for a kernel that returns 0, runs a stored binary that returns 1."""
    name = f"paged_probe_{os.getpid()}"
    zero, one = (
        KernelSource(name, "", f"  out[0] = {value};\n", ("x",), ("out",)) for value in (0, 1)
    )
    inputs, template, dtypes = [mx.zeros((1,), mx.int32)], [("SMALL", 0)], [mx.int32]
    compiled = compile_kernel(
        GeneratedKernel(one, inputs, template, dtypes), architecture, compiler
    )
    binary = Binary(GeneratedKernel(zero, inputs, template, dtypes), architecture)
    made: Any = mx.fast.cuda_kernel(
        name=name, input_names=["x"], output_names=["out"], source=zero.source, header=""
    )
    try:
        binary.write(compiled)
        (out,) = made(
            inputs=inputs,
            template=template,
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=dtypes,
        )
        return int(out.item()) == 1
    finally:
        with suppress(OSError):
            binary.remove()


class Binary:
    """The stored binary of a kernel for an architecture, in MLX's folder."""

    def __init__(self, kernel: GeneratedKernel, architecture: str) -> None:
        path = binaries_folder() / kernel.path
        self._kernel = kernel
        self._architecture = architecture
        self._code = path.with_name(f"{path.name}.ptx")
        self._symbols = path.with_name(f"{path.name}.txt")

    @property
    def is_there(self) -> bool:
        """Whether the binary is stored and complete. Raises `OSError`."""
        try:
            digest = self._digest(self._code.read_bytes())
            return self._symbols.read_bytes().splitlines()[-1:] == [digest]
        except FileNotFoundError:
            return False

    def read(self) -> Compiled:
        """Return the stored kernel. Raises `OSError`."""
        name, symbol = self._symbols.read_text().splitlines()[0].split("\t")
        assert name == self._kernel.name
        return Compiled(self._code.read_bytes(), symbol)

    def write(self, made: Compiled) -> None:
        """Store the compiled kernel atomically. Raises `OSError`."""
        # MLX reads only lines that have a tab, so it ignores the digest.
        symbols = f"{self._kernel.name}\t{made.symbol}\n".encode() + self._digest(made.code)
        self._code.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._code.parent) as scratch:
            for target, content in ((self._symbols, symbols), (self._code, made.code)):
                whole = Path(scratch, "whole")
                whole.write_bytes(content)
                whole.replace(target)

    def remove(self) -> None:
        """Remove the stored binary."""
        for path in (self._code, self._symbols):
            path.unlink(missing_ok=True)

    def _digest(self, code: bytes) -> bytes:
        """Return a line that changes if the binary is damaged or is made with other headers."""
        made_by = f"{self._architecture} {PRELUDE}".encode()
        return f"sha256 {hashlib.sha256(made_by + code).hexdigest()}".encode()


def compiled_kernel(kernel: GeneratedKernel) -> Compiled:
    """Return a kernel's machine code: the stored one, or compiled now. Raises `CompileError`."""
    try:
        binary = Binary(kernel, _architecture())
        if binary.is_there:
            return binary.read()
    except OSError as error:
        logger.info("the stored kernel %s cannot be read: %s", kernel.name, error)
    return compile_kernel(kernel, _architecture(), find())


def compile_kernel(kernel: GeneratedKernel, architecture: str, compiler: Nvrtc) -> Compiled:
    """Compile a kernel for an architecture, without MLX's headers. Raises `CompileError`."""
    return compiler.compile(PRELUDE + kernel.text, kernel.name, architecture)


@cache
def _architecture() -> str:
    """Return the GPU's architecture as MLX passes it to the compiler."""
    info = mx.device_info()
    major, minor = info["compute_capability_major"], info["compute_capability_minor"]
    return f"sm_{major}{minor}{'a' if int(major) >= 9 else ''}"
