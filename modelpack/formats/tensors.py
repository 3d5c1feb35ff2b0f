"""The tensor types of ggml and the file types of GGUF, with the numbers that files hold.

Source: `enum ggml_type` and the type traits in ggml, `enum llama_ftype` in llama.cpp. Types 4 and
5 were removed before GGUF existed; 31 to 33 and 36 to 38 are no longer written but still found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class TensorType:
    """A ggml type: `block` elements are stored together in `size` bytes."""

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

#: The types that the reference implementation does not know yet: it gives up on the whole file.
NEWER_THAN_REFERENCE = frozenset({"NVFP4", "Q1_0"})

#: Names of `general.file_type`, by number; the last two are newer than the reference.
FILE_TYPES: tuple[str, ...] = (
    *("F32", "F16", "Q4_0", "Q4_1", "Q4_1_SOME_F16", "Q4_2", "Q4_3", "Q8_0", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
    *("IQ2_XXS", "IQ2_XS", "Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ3_M"),
    *("IQ2_S", "IQ2_M", "IQ4_XS", "IQ1_M", "BF16", "Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0"),
)

#: File type 39 means "unknown" to the reference implementation, and it has no later ones.
REFERENCE_FILE_TYPES = 39

#: llama.cpp's flag for a file type that nobody wrote down but that was guessed.
GUESSED_FILE_TYPE = 1024


#: More tensors than this in one file are refused. The largest mixture-of-experts models, with
#: every expert apart, have about as many in all their shards together; a parsed file of this many
#: takes 40 MB.
MAX_TENSORS = 100_000

#: Dimensions of one tensor. ggml has 4, and files for image models have been seen with 5.
MAX_DIMENSIONS = 8

#: Elements, and bytes, of anything: the largest number that a signed 64-bit integer holds.
MAX_COUNT = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `offset` and `size` are bytes in the file's data section.

    `shape` is in the file's own order: GGUF puts the fastest-moving dimension first, safetensors
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
    """Gives equal shapes one object: most tensors of a model share a few."""

    _MAX = 4096

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}

    def shared(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return `shape` or an equal tuple seen before."""
        if len(self._known) < self._MAX:
            return self._known.setdefault(shape, shape)
        return self._known.get(shape, shape)


def repeated_name(tensors: Sequence[TensorInfo]) -> int | None:
    """Return the index of a tensor whose name another one has too, or None.

    Sorting takes far less memory than a set of all names.
    """
    names = [tensor.name for tensor in tensors]
    order = sorted(range(len(names)), key=names.__getitem__)
    return next((b for a, b in pairwise(order) if names[a] == names[b]), None)


def in_data_order(tensors: Sequence[TensorInfo]) -> Sequence[int]:
    """Return the indices of `tensors`, sorted by where their data starts, empty ones first."""
    if all(_starts_before(a, b) for a, b in pairwise(tensors)):  # as writers leave them
        return range(len(tensors))
    order = sorted(range(len(tensors)), key=lambda at: tensors[at].size)
    order.sort(key=lambda at: tensors[at].offset)
    return order


def _starts_before(a: TensorInfo, b: TensorInfo) -> bool:
    return a.offset < b.offset or (a.offset == b.offset and a.size <= b.size)


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """The fields of a config that come from the weights; texts are empty where nothing is known.

    `parameters` and `size` are texts for people, in the number formats of `units`. The maps are
    sorted by key, as a config has them; `context_size` is in tokens. `notes` are for people: what
    was left out and why.
    """

    format: str = ""
    quantization: str = ""
    parameters: str = ""
    architecture: str = ""
    size: str = ""
    gguf: Mapping[str, str] | None = field(default=None, hash=False)
    safetensors: Mapping[str, str] | None = field(default=None, hash=False)
    diffusers: Mapping[str, str] | None = field(default=None, hash=False)
    context_size: int | None = None
    notes: tuple[str, ...] = ()
