"""The C++ library (native/): its functions, structures and threads, by ctypes."""

from __future__ import annotations

import ctypes
import weakref
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_size_t, c_void_p
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelpack_engine.errors import OutOfMemoryError
from modelpack_engine.platform.device import usable_cores

#: Rows of a matrix in a tile; columns in a group of codes.
TILE, GROUP = 16, 32
#: The sizes of MLX's affine codes.
AFFINE_BITS = (2, 3, 4, 5, 6, 8)


class Source(IntEnum):
    """The layouts of weights in files."""

    F32 = 0
    F16 = 1
    BF16 = 2
    Q4_0 = 3
    Q4_1 = 4
    Q5_0 = 5
    Q8_0 = 6
    Q4_K = 7
    Q6_K = 8
    F32_AS_INT8 = 9


class Code(IntEnum):
    """The operations of a program."""

    EMBED = 0
    MULTIPLY = 1
    ROTATE = 2
    ATTEND = 3
    NORM = 4
    ADD = 5
    SELECT = 6
    SOFTCAP = 7


class Ending(IntEnum):
    """What a multiplication does with its products."""

    STORE = 0
    ADD = 1
    GATED = 2


class CacheType(IntEnum):
    """The type of keys and values."""

    F32 = 0
    F16 = 1
    BF16 = 2


class Operation(Structure):
    """One operation; native/program.cpp says which fields each uses."""

    _fields_ = (
        ("code", c_int32), ("input", c_int32), ("output", c_int32), ("ending", c_int32),
        ("activation", c_int32), ("rope", c_int32), ("pool", c_int32), ("cache", c_int32),
        ("heads", c_int32), ("kv_heads", c_int32), ("dim", c_int32), ("window", c_int32),
        ("scale", c_float), ("eps", c_float), ("softcap", c_float), ("unused", c_float),
        ("matrix", c_void_p * 3), ("bias", c_void_p * 3),
        ("norm", c_void_p), ("second_norm", c_void_p), ("sinks", c_void_p),
    )  # fmt: skip


class Rope(Structure):
    """A rotation: angle = position * frequencies[i], then cosine and sine times `scale`."""

    _fields_ = (
        ("dims", c_int32), ("traditional", c_int32), ("scale", c_float), ("unused", c_float),
        ("frequencies", c_void_p),
    )  # fmt: skip


class Span(Structure):
    """`length` rows from `row` on, of a sequence with this block table."""

    _fields_ = (("row", c_int32), ("length", c_int32), ("table", c_void_p))


class Step(Structure):
    """The inputs of a step, int32; its logits go to `logits`, float32 [sampled, vocabulary]."""

    _fields_ = (
        ("rows", c_int32), ("spans", c_int32), ("sampled", c_int32), ("block_size", c_int32),
        ("tokens", c_void_p), ("positions", c_void_p), ("slots", c_void_p),
        ("sample_rows", c_void_p), ("span", POINTER(Span)), ("pools", POINTER(c_void_p)),
        ("logits", c_void_p),
    )  # fmt: skip


PATH = Path(__file__).parent / "libmodelpack_cpu.so"


@cache
def library() -> Any:
    """Return the library, with its threads started; None if it was not built."""
    try:
        found = ctypes.CDLL(str(PATH))
    except OSError:
        return None
    found.mp_start.argtypes = (c_int,)
    found.mp_kernels.restype = c_char_p
    found.mp_use_kernels.argtypes = (c_char_p,)
    found.mp_matrix_new.argtypes = (c_int, c_int, c_int, c_void_p, c_size_t)
    found.mp_matrix_new.restype = c_void_p
    found.mp_matrix_new_affine.argtypes = (
        c_int, c_int, c_int, c_int, c_int, c_void_p, c_size_t, c_void_p, c_void_p, c_size_t,
    )  # fmt: skip
    found.mp_matrix_new_affine.restype = c_void_p
    found.mp_matrix_bytes.argtypes = (c_void_p,)
    found.mp_matrix_bytes.restype = c_size_t
    found.mp_matrix_row.argtypes = (c_void_p, c_int, c_void_p)
    found.mp_matrix_free.argtypes = (c_void_p,)
    found.mp_program_new.argtypes = (
        c_void_p, c_int, c_void_p, c_int, c_void_p, c_int, c_int, c_int,
    )  # fmt: skip
    found.mp_program_new.restype = c_void_p
    found.mp_program_free.argtypes = (c_void_p,)
    found.mp_program_run.argtypes = (c_void_p, c_void_p)
    found.mp_start(usable_cores())
    return found


class Matrix:
    """Weights [rows, columns], copied into the layout that the processor's kernels read."""

    def __init__(self, source: Source, rows: int, columns: int, data: NDArray[Any]) -> None:
        """`data` has the bytes of the rows, one after the other, in the layout `source`."""
        assert data.flags.c_contiguous
        pointer = library().mp_matrix_new(source, rows, columns, data.ctypes.data, data.nbytes)
        self._own(pointer, rows, columns, source.name)

    @classmethod
    def affine(
        cls, rows: int, columns: int, codes: NDArray[Any], scales: NDArray[Any],
        biases: NDArray[Any], *, bits: int, group_size: int, source: Source,
    ) -> Matrix:  # fmt: skip
        """Pack MLX's affine codes; scales and biases have the layout `source`, a float."""
        assert all(part.flags.c_contiguous for part in (codes, scales, biases))
        assert scales.nbytes == biases.nbytes
        pointer = library().mp_matrix_new_affine(
            bits, group_size, source, rows, columns, codes.ctypes.data, codes.nbytes,
            scales.ctypes.data, biases.ctypes.data, scales.nbytes,
        )  # fmt: skip
        matrix = cls.__new__(cls)
        matrix._own(pointer, rows, columns, f"{bits} bits in groups of {group_size}")
        return matrix

    def _own(self, pointer: int | None, rows: int, columns: int, layout: str) -> None:
        self.rows, self.columns = rows, columns
        self.pointer = pointer
        if not pointer:
            raise OutOfMemoryError(
                f"weights of {rows} rows and {columns} columns ({layout}) cannot be packed"
            )
        lib = library()
        # Not at exit: a thread may still run it.
        weakref.finalize(self, lib.mp_matrix_free, pointer).atexit = False
        self.nbytes = int(lib.mp_matrix_bytes(pointer))

    def row(self, index: int) -> NDArray[np.float32]:
        """Return the values of a row, float32 [columns]."""
        out = np.empty(self.columns, np.float32)
        library().mp_matrix_row(self.pointer, index, out.ctypes.data)
        return out
