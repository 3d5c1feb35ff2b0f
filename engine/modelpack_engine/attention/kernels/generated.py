"""The text that MLX on CUDA makes of a custom kernel, and the file that it looks for by it.

As of MLX 0.32 (`cuda_kernel` in custom_kernel.cpp, `JitModule` in jit_module.cpp).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from modelpack_engine.attention.kernels.sources import KernelSource

NAMESPACE = "mlx::core::cu"
#: What the text begins with: two seconds of NVRTC.
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
    """A kernel as MLX would compile it, called with these inputs, template and types of outputs.

    `function` is its name in the `NAMESPACE`; `text` is the text but for `MLX_HEADER`. Raises
    `KeyError` for types that our kernels do not have.
    """

    def __init__(
        self,
        source: KernelSource,
        inputs: Sequence[mx.array],
        template: Template,
        outputs: Sequence[mx.Dtype],
    ) -> None:
        self.function = "custom_kernel_" + source.name + "".join(map(_argument, template))
        self.text = _frame(self.function, source, inputs, template, outputs)

    @property
    def name(self) -> str:
        """The name that the compiler knows it by."""
        return f"{NAMESPACE}::{self.function}"

    @property
    def path(self) -> Path:
        """Where its binary would lie in MLX's folder, without a suffix; long names are folders."""
        module = f"{self.function}_{std_hash((MLX_HEADER + self.text).encode()):x}"
        return Path(*(module[i : i + _LONGEST] for i in range(0, len(module), _LONGEST)))


def binaries_folder() -> Path:
    """Return MLX's folder of binaries."""
    if given := os.environ.get("MLX_PTX_CACHE_DIR"):
        return Path(given)
    temporary = next(
        (place for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR") if (place := os.environ.get(name))),
        "/tmp",  # noqa: S108 - where MLX looks
    )
    version: str = mx.__version__  # type: ignore[attr-defined]
    return Path(temporary) / "mlx" / version / "ptx"


def std_hash(data: bytes) -> int:
    """Return what libstdc++'s `std::hash<std::string>` does on 64 bits (MurmurHash 2, 64A)."""
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


def _frame(
    function: str,
    source: KernelSource,
    inputs: Sequence[mx.array],
    template: Template,
    outputs: Sequence[mx.Dtype],
) -> str:
    """Return the text that MLX makes, without what it includes itself."""
    arguments = []
    for name, array in zip(source.inputs, inputs, strict=True):
        arguments.append(f"const {_CUDA_TYPES[array.dtype]}* {name}")
        if array.ndim and f"{name}_shape" in source.source:
            arguments.append(f"const __grid_constant__ Shape {name}_shape")
    arguments += [
        f"{_CUDA_TYPES[dtype]}* {name}" for name, dtype in zip(source.outputs, outputs, strict=True)
    ]
    constants = "".join(f"  {_constant(name, value)};\n" for name, value in template)
    return (
        f"{source.header}namespace {NAMESPACE} {{\n\nnamespace cg = cooperative_groups;\n\n"
        f"__global__ void {function}(\n"
        + ",\n".join(f"    {argument}" for argument in arguments)
        + f") {{\n{constants}\n{source.source}\n}}\n\n}} // namespace {NAMESPACE}\n"
    )


def _constant(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()}"
    if isinstance(value, int):
        return f"constexpr int {name} = {value}"
    return f"using {name} = {_CUDA_TYPES[value]}"
