"""cuBLAS: matmuls of steps that run as graphs, as MLX computes them (cuBLASLt).

MLX multiplies more rows than our kernels do by the same library, with the algorithm that it
proposes first, so that both have the same results. The functions are those of
https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from modelpack_engine.platform.driver import DriverError, Functions

Type = Literal["float16", "bfloat16"]

_TYPES: Mapping[Type, int] = {"float16": 2, "bfloat16": 14}  # CUDA_R_16F, CUDA_R_16BF
_FLOAT32, _COMPUTE_FLOAT32 = 0, 68  # CUDA_R_32F, CUBLAS_COMPUTE_32F
_TRANSPOSED = 1  # CUBLAS_OP_T
#: CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_MATMUL_DESC_BIAS_POINTER
_OF_A, _THEN, _BIAS_AT = 3, 7, 8
_ADD_BIAS = 4  # CUBLASLT_EPILOGUE_BIAS
#: An aligned address, as a bias has it, while cuBLAS chooses an algorithm.
_SOMEWHERE = 256
_MOST_WORKSPACE = 1  # CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES
#: What the documentation of `cublasSetWorkspace` recommends for Hopper and later GPUs.
WORKSPACE_BYTES = 32 << 20
_LIBRARIES = ("libcublasLt.so.13", "libcublasLt.so.12")

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (_POINTER,),
    "cublasLtMatmulPreferenceCreate": (_POINTER,),
    "cublasLtMatmulPreferenceSetAttribute": (_POINTER, _INT, _POINTER, _SIZE),
    "cublasLtMatmulDescCreate": (_POINTER, _INT, _INT),
    "cublasLtMatmulDescSetAttribute": (_POINTER, _INT, _POINTER, _SIZE),
    "cublasLtMatrixLayoutCreate": (
        _POINTER, _INT, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64,
    ),
    "cublasLtMatmulAlgoGetHeuristic": (*(_POINTER,) * 7, _INT, _POINTER, _POINTER),
    "cublasLtMatmul": (*(_POINTER,) * 14, _SIZE, _POINTER),
}  # fmt: skip


class _Choice(ctypes.Structure):
    """A `cublasLtMatmulHeuristicResult_t`."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8), ("workspace_bytes", _SIZE), ("state", _INT),
        ("waves", ctypes.c_float), ("reserved", _INT * 4),
    )  # fmt: skip


class CublasError(DriverError):
    """cuBLAS is missing, or refuses a call."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a matmul: [rows, inputs] times [outputs, inputs], transposed, in one type.

    With a `bias`, numbers [outputs] are added to each row.
    """

    rows: int
    outputs: int
    inputs: int
    type: Type
    bias: bool = False


@dataclass(frozen=True, slots=True)
class _Plan:
    matmul: int
    weight: int
    x: int
    out: int
    choice: _Choice


class Cublas:
    """The library, for the context that is current. All methods raise `CublasError`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        functions = Functions(library, _FUNCTIONS, "cuBLAS", "cuBLAS status", CublasError)
        self._call, self._made = functions.call, functions.make
        self._handle = self._made("cublasLtCreate")
        self._preference = self._made("cublasLtMatmulPreferenceCreate")
        most = ctypes.c_uint64(WORKSPACE_BYTES)
        self._call(
            "cublasLtMatmulPreferenceSetAttribute", self._preference, _MOST_WORKSPACE,
            ctypes.byref(most), ctypes.sizeof(most),
        )  # fmt: skip
        self._plans: dict[Shape, _Plan] = {}

    def prepare(self, shape: Shape) -> None:
        """Choose how to multiply."""
        if shape not in self._plans:
            self._plans[shape] = self._planned(shape)

    def multiply(
        self,
        shape: Shape,
        x: int,
        weight: int,
        bias: int | None,
        out: int,
        workspace: int,
        stream: int,
    ) -> None:
        """Multiply the arrays at these addresses, in the order of a stream that may be captured.

        The shape is prepared. `workspace` has `WORKSPACE_BYTES` that nothing else uses meanwhile.
        """
        plan, one, zero = self._plans[shape], ctypes.c_float(1), ctypes.c_float(0)
        if bias is not None:
            self._set(plan.matmul, _BIAS_AT, ctypes.c_void_p(bias))
        self._call(
            "cublasLtMatmul", self._handle, plan.matmul, ctypes.byref(one),
            weight, plan.weight, x, plan.x, ctypes.byref(zero), out, plan.out, out, plan.out,
            ctypes.byref(plan.choice), workspace, plan.choice.workspace_bytes, stream,
        )  # fmt: skip

    def _planned(self, shape: Shape) -> _Plan:
        # In columns, as cuBLAS reads them, the result is the weights times x.
        matmul = self._made("cublasLtMatmulDescCreate", _COMPUTE_FLOAT32, _FLOAT32)
        self._set(matmul, _OF_A, ctypes.c_int32(_TRANSPOSED))
        if shape.bias:
            self._set(matmul, _THEN, ctypes.c_int32(_ADD_BIAS))
            self._set(matmul, _BIAS_AT, ctypes.c_void_p(_SOMEWHERE))
        of_type, made = _TYPES[shape.type], "cublasLtMatrixLayoutCreate"
        weight = self._made(made, of_type, shape.inputs, shape.outputs, shape.inputs)
        x = self._made(made, of_type, shape.inputs, shape.rows, shape.inputs)
        out = self._made(made, of_type, shape.outputs, shape.rows, shape.outputs)
        choice, count = _Choice(), ctypes.c_int()
        self._call(
            "cublasLtMatmulAlgoGetHeuristic", self._handle, matmul, weight, x, out, out,
            self._preference, 1, ctypes.byref(choice), ctypes.byref(count),
        )  # fmt: skip
        if not count.value or choice.state:
            raise CublasError(f"cuBLAS cannot multiply {shape}")
        return _Plan(matmul, weight, x, out, choice)

    def _set(self, matmul: int, attribute: int, value: ctypes.c_int32 | ctypes.c_void_p) -> None:
        self._call(
            "cublasLtMatmulDescSetAttribute", matmul, attribute,
            ctypes.byref(value), ctypes.sizeof(value),
        )  # fmt: skip


@cache
def find_cublas() -> Cublas:
    """Return the library that MLX has loaded, or else one that is there. Raises `CublasError`."""
    problem: OSError | None = None
    for mode in (os.RTLD_NOLOAD, ctypes.DEFAULT_MODE):
        for name in _LIBRARIES:
            try:
                return Cublas(ctypes.CDLL(name, mode=mode))
            except OSError as error:
                problem = error
    raise CublasError(f"cuBLAS is not found: {problem}")
