"""Binaries: our kernels on CUDA compiled by ourselves, and put where MLX looks for compiled ones.

MLX compiles a kernel the first time that it runs in a process, with headers of its own before the
text, which take NVRTC two seconds; ours need none of these, and take a fraction of one. MLX looks
into its folder of binaries first, though it never writes a kernel of others there. So a process
finds what earlier ones have compiled, too.

Were anything not as it is expected here, MLX would compile the kernel itself.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from modelpack_engine.attention.kernels import nvrtc
from modelpack_engine.attention.kernels.generated import (
    GeneratedKernel,
    Template,
    binaries_folder,
)
from modelpack_engine.attention.kernels.sources import KernelSource

logger = logging.getLogger(__name__)

#: What MLX's headers have that a kernel's frame and ours need: `Shape` is MLX's, of 10 sizes.
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
    """Return `kernel`, made by MLX of `source`, so that its binaries are there before it runs."""
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
    """Put the binary of a kernel that is called like this where MLX finds it, if that works."""
    if not found_by_mlx():
        return
    try:
        kernel, architecture = GeneratedKernel(source, inputs, template, outputs), _architecture()
        binary = Binary(kernel, architecture)
        if not binary.is_there:
            binary.write(compile_kernel(kernel, architecture, nvrtc.find()))
    except (nvrtc.CompileError, OSError, KeyError) as error:
        logger.info("MLX compiles %s itself: %s", source.name, error)


@cache
def found_by_mlx() -> bool:
    """Return whether MLX runs what lies in its folder."""
    try:
        found = _runs_another_text(_architecture(), nvrtc.find())
    except (nvrtc.CompileError, OSError, KeyError, RuntimeError) as error:
        logger.info("MLX compiles kernels itself: %s", error)
        return False
    if not found:
        logger.info("MLX compiles kernels itself: it has not looked into %s", binaries_folder())
    return found


def _runs_another_text(architecture: str, compiler: nvrtc.Nvrtc) -> bool:
    """Return whether MLX, given a kernel that puts out 0, runs the binary of one that does 1."""
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
    """What is made of a kernel for an architecture, and kept in MLX's folder."""

    def __init__(self, kernel: GeneratedKernel, architecture: str) -> None:
        path = binaries_folder() / kernel.path
        self._kernel = kernel
        self._architecture = architecture
        self._code = path.with_name(f"{path.name}.ptx")
        self._symbols = path.with_name(f"{path.name}.txt")

    @property
    def is_there(self) -> bool:
        """Whether it lies there as it would be written. Raises `OSError`."""
        try:
            digest = self._digest(self._code.read_bytes())
            return self._symbols.read_bytes().splitlines()[-1:] == [digest]
        except FileNotFoundError:
            return False

    def write(self, made: nvrtc.Compiled) -> None:
        """Keep what was compiled; nothing half-written is visible. Raises `OSError`."""
        # MLX reads lines that have a tab.
        symbols = f"{self._kernel.name}\t{made.symbol}\n".encode() + self._digest(made.code)
        self._code.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._code.parent) as scratch:
            for target, content in ((self._symbols, symbols), (self._code, made.code)):
                whole = Path(scratch, "whole")
                whole.write_bytes(content)
                whole.replace(target)

    def remove(self) -> None:
        """Have it no longer lie there."""
        for path in (self._code, self._symbols):
            path.unlink(missing_ok=True)

    def _digest(self, code: bytes) -> bytes:
        """Return what tells this from something else under its name: by other headers, damaged."""
        made_by = f"{self._architecture} {PRELUDE}".encode()
        return f"sha256 {hashlib.sha256(made_by + code).hexdigest()}".encode()


def compile_kernel(
    kernel: GeneratedKernel, architecture: str, compiler: nvrtc.Nvrtc
) -> nvrtc.Compiled:
    """Compile a kernel for an architecture, without MLX's headers. Raises `CompileError`."""
    return compiler.compile(PRELUDE + kernel.text, kernel.name, architecture)


@cache
def _architecture() -> str:
    """Return the GPU's architecture as MLX tells it to the compiler."""
    info = mx.device_info()
    major, minor = info["compute_capability_major"], info["compute_capability_minor"]
    return f"sm_{major}{minor}{'a' if int(major) >= 9 else ''}"
