"""Tensor descriptions for all weight formats, and the type numbers of ggml and GGUF.

Source: `enum ggml_type` and the type traits in ggml, `enum llama_ftype` in llama.cpp. Types 4 and
5 were removed before GGUF existed; writers no longer use 31 to 33 and 36 to 38, but older files do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class TensorType:
    """A ggml type: a block of `block` elements takes `size` bytes."""

    name: str
    block: int
    size: int


TENSOR_TYPES: Mapping[int, TensorType] = MappingProxyType(
    {
        0: TensorType("F32", 1, 4),
        1: TensorType("F16", 1, 2),
        2: TensorType("Q4_0", 32, 18),
        3: TensorType("Q4_1", 32, 20),
        6: TensorType("Q5_0", 32, 22),
        7: TensorType("Q5_1", 32, 24),
        8: TensorType("Q8_0", 32, 34),
        9: TensorType("Q8_1", 32, 36),
        10: TensorType("Q2_K", 256, 84),
        11: TensorType("Q3_K", 256, 110),
        12: TensorType("Q4_K", 256, 144),
        13: TensorType("Q5_K", 256, 176),
        14: TensorType("Q6_K", 256, 210),
        15: TensorType("Q8_K", 256, 292),
        16: TensorType("IQ2_XXS", 256, 66),
        17: TensorType("IQ2_XS", 256, 74),
        18: TensorType("IQ3_XXS", 256, 98),
        19: TensorType("IQ1_S", 256, 50),
        20: TensorType("IQ4_NL", 32, 18),
        21: TensorType("IQ3_S", 256, 110),
        22: TensorType("IQ2_S", 256, 82),
        23: TensorType("IQ4_XS", 256, 136),
        24: TensorType("I8", 1, 1),
        25: TensorType("I16", 1, 2),
        26: TensorType("I32", 1, 4),
        27: TensorType("I64", 1, 8),
        28: TensorType("F64", 1, 8),
        29: TensorType("IQ1_M", 256, 56),
        30: TensorType("BF16", 1, 2),
        31: TensorType("Q4_0_4_4", 32, 18),
        32: TensorType("Q4_0_4_8", 32, 18),
        33: TensorType("Q4_0_8_8", 32, 18),
        34: TensorType("TQ1_0", 256, 54),
        35: TensorType("TQ2_0", 256, 66),
        36: TensorType("IQ4_NL_4_4", 32, 18),
        37: TensorType("IQ4_NL_4_8", 32, 18),
        38: TensorType("IQ4_NL_8_8", 32, 18),
        39: TensorType("MXFP4", 32, 17),
        40: TensorType("NVFP4", 64, 36),
        41: TensorType("Q1_0", 128, 18),
    }
)

#: The types that the reference implementation does not know yet; it rejects files with them.
NEWER_THAN_REFERENCE = frozenset({"NVFP4", "Q1_0"})

#: The names of `general.file_type`, by number; the reference does not know the last two.
FILE_TYPES: tuple[str, ...] = (
    *("F32", "F16", "Q4_0", "Q4_1", "Q4_1_SOME_F16", "Q4_2", "Q4_3", "Q8_0", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
    *("IQ2_XXS", "IQ2_XS", "Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ3_M"),
    *("IQ2_S", "IQ2_M", "IQ4_XS", "IQ1_M", "BF16", "Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0"),
)

#: The number of file types in the reference implementation, which reads 39 as "unknown".
REFERENCE_FILE_TYPES = 39

#: llama.cpp sets this bit if it guessed the file type, since the file had none.
GUESSED_FILE_TYPE = 1024


#: Tensors in one file. The largest mixture-of-experts models, with one tensor for each expert,
#: have about as many in all their shards together. A parsed file of this many takes 40 MB.
MAX_TENSORS = 100_000

#: Dimensions of one tensor. ggml allows 4; some image models have 5.
MAX_DIMENSIONS = 8

#: The limit of elements and of bytes: the largest signed 64-bit integer.
MAX_COUNT = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `size` bytes at the byte `offset` of the file's data section.

    `shape` is in the order of the file: GGUF puts the fastest-moving dimension first, safetensors
    last. `dtype` is the format's name for the type, such as `Q4_1` or `BF16`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


class Shapes:
    """Shares one tuple among equal shapes, to save memory: most tensors have one of a few."""

    _MAX = 4096

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}

    def shared(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return an equal tuple from an earlier call, or `shape`."""
        if len(self._known) < self._MAX:
            return self._known.setdefault(shape, shape)
        return self._known.get(shape, shape)


def repeated_name(tensors: Sequence[TensorInfo]) -> int | None:
    """Return the index of a tensor whose name occurs twice, or None.

    Sorting takes far less memory than a set of all names.
    """
    names = [tensor.name for tensor in tensors]
    order = sorted(range(len(names)), key=names.__getitem__)
    return next((b for a, b in pairwise(order) if names[a] == names[b]), None)


def in_data_order(tensors: Sequence[TensorInfo]) -> Sequence[int]:
    """Return the indices of `tensors` in the order of their data offsets, then of their sizes."""
    # The usual order of writers; comparing needs no memory, as sorting does.
    if all((a.offset, a.size) <= (b.offset, b.size) for a, b in pairwise(tensors)):
        return range(len(tensors))
    order = sorted(range(len(tensors)), key=lambda at: tensors[at].size)
    order.sort(key=lambda at: tensors[at].offset)
    return order
