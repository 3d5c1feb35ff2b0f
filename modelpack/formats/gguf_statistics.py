"""The quantization of a GGUF model: the name of its file type, or a guess from its tensors."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelpack.artifacts.json_document import sorted_map
from modelpack.errors import WeightFormatError
from modelpack.formats.config_json import MAX_CONTEXT_SIZE
from modelpack.formats.gguf import (
    DEFAULT_ALIGNMENT,
    GGUFHeader,
    MetadataArray,
    MetadataValue,
    ValueType,
    read_gguf_header,
)
from modelpack.formats.shards import check_complete, shard_set
from modelpack.formats.tensors import (
    FILE_TYPES,
    GUESSED_FILE_TYPE,
    NEWER_THAN_REFERENCE,
    REFERENCE_FILE_TYPES,
    ModelStatistics,
    TensorInfo,
)
from modelpack.formats.units import boolean, fixed, format_gguf_size, format_parameters, trim

#: Types that never become the name of a file type.
_UNNAMED = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"} | {
    f"IQ4_NL_{rows}" for rows in ("4_4", "4_8", "8_8")
}


def quantization(
    file_type: int | None, architecture: str, tensors: Iterable[TensorInfo], *, exact: bool
) -> str:
    """Return the quantization of a model with this `general.file_type`, as `MOSTLY_Q4_K_M`.

    `exact` knows the file types of the reference implementation only.
    """
    known = REFERENCE_FILE_TYPES if exact else len(FILE_TYPES)
    if file_type is not None and not exact and file_type & GUESSED_FILE_TYPE:
        file_type = None  # llama.cpp says that nobody had written it down
    if file_type is None or (exact and file_type == REFERENCE_FILE_TYPES):
        name = _guess(architecture, tensors)
        return f"MOSTLY_{name}" if name else "Unknown"
    return f"MOSTLY_{FILE_TYPES[file_type]}" if file_type < known else f"GGUFFileType({file_type})"


def _guess(architecture: str, tensors: Iterable[TensorInfo]) -> str | None:
    diffusion = architecture == "diffusion"
    counts = Counter(tensor.dtype for tensor in tensors if _counts(trim(tensor.name), diffusion))
    if not counts:
        return None
    ranked = [dtype for dtype, _ in counts.most_common()]
    main = ranked[1] if ranked[0] == "F32" and len(ranked) > 1 else ranked[0]
    match main:
        case "Q2_K":
            return "Q2_K_S" if ranked[-1] == "Q5_K" else "Q2_K"
        case "Q3_K" if counts["Q8_0"] or (counts["Q5_K"] > 1 and not counts["Q4_K"]):
            return "Q3_K_L"
        case "Q3_K":
            return "Q3_K_M" if counts["Q4_K"] > 1 else "Q3_K_S"
        case "Q4_K" if counts["Q6_K"] > 1:
            return "Q4_K_M"
        case "Q4_K":
            return "Q3_K_M" if counts["Q3_K"] > 1 else "Q4_K_S"
        case "Q5_K":
            return "Q5_K_M" if counts["Q6_K"] > 1 else "Q5_K_S"
        case "IQ2_XS":
            return "IQ2_S" if counts["IQ4_XS"] > 1 else "IQ2_XS"
        case "IQ2_S":
            return "IQ2_M"
        case "IQ3_S":
            return "IQ3_XS" if counts["IQ3_XXS"] > 1 else "IQ3_S"
        case _:
            return None if main in _UNNAMED else main


def _counts(name: str, diffusion: bool) -> bool:
    """Return whether a tensor of this name says how the model is quantized."""
    if name.endswith(".weight"):
        return True
    return not diffusion and (name.startswith(("token_embd", "blk.")) or "_norm" in name)


#: Longer arrays are not in configs.
MAX_ARRAY = 50
#: Longer texts are left out of configs, but for exact ones.
MAX_TEXT = 65_536

_DIFFUSION_ARCHITECTURES = frozenset({"flux", "sd", "sd2.5", "sd3", "stable-diffusion"})
_DIFFUSION_TENSORS = (
    "model.diffusion_model.",
    "double_blocks.",
    "joint_blocks.",
    "decoder.",
    "encoder.",
    "text_model.",
)
_NUMBERS = frozenset(ValueType) - {ValueType.BOOL, ValueType.STRING, ValueType.ARRAY}


def gguf_statistics(
    files: Sequence[str | os.PathLike[str] | GGUFHeader], *, exact: bool = False
) -> ModelStatistics:
    """Return the statistics of the model in `files`: paths, or headers read already.

    The model is the first file with its shards; by default, a projector or adapter is passed
    over for the first model beside it. With `exact`, everything is as Docker Model Runner
    computes it. Every header is checked either way: raises `WeightFormatError`, or
    `PackagingError` naming shards that are missing.
    """
    if not files:
        return ModelStatistics(format="gguf")
    check_complete(file.path if isinstance(file, GGUFHeader) else file for file in files)
    headers = [file if isinstance(file, GGUFHeader) else read_gguf_header(file) for file in files]
    first = headers[0]
    if not exact:
        first = next((header for header in headers if not _is_part(header)), first)
    model = _Model(_shards(first, headers))
    if exact and not model.readable_by_reference():
        note = f"Docker Model Runner cannot read {first.path}: the config holds the format only"
        return ModelStatistics(format="gguf", notes=(note,))
    return model.statistics(exact=exact)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A metadata value and the file it is from."""

    path: str
    value: MetadataValue


class _Model:
    """The shards of one model, seen as one file."""

    def __init__(self, headers: Sequence[GGUFHeader]) -> None:
        self._headers = headers
        self._tensors = [tensor for header in headers for tensor in header.tensors]
        self._entries = [
            (trim(key), _Entry(header.path, value))
            for header in headers
            for key, value in header.metadata.items()
            if trim(key) != "split.no"
        ]
        # A key that several shards have is the last one's, except for the file type.
        self._last = dict(self._entries)
        self._first = dict(reversed(self._entries))

    def statistics(self, *, exact: bool) -> ModelStatistics:
        architecture = self._architecture()
        texts = {
            key: text for key, entry in self._entries if (text := _text(entry.value)) is not None
        }
        notes = []
        if not exact:
            _check_split(self._headers)
            for key in [key for key, text in texts.items() if len(text) > MAX_TEXT]:
                notes.append(f"{key} of {len(texts[key])} characters is left out of the config")
                del texts[key]
        return ModelStatistics(
            format="gguf",
            quantization=quantization(self._file_type(), architecture, self._tensors, exact=exact),
            parameters=format_parameters(self._parameters(exact=exact)),
            architecture=architecture,
            size=format_gguf_size(self._size_of_reference() if exact else self._size()),
            gguf=sorted_map(texts) or None,
            context_size=self._context_size(),
            notes=tuple(notes),
        )

    def readable_by_reference(self) -> bool:
        """Return whether the reference implementation can parse these files."""
        for header in self._headers:
            # It looks for big-endian files by a magic that no writer uses any more.
            if header.big_endian and not header.swapped_magic:
                return False
            # It reads 32 KiB for an empty string, and then makes no sense of the rest.
            if header.empty_string:
                return False
            if any(tensor.dtype in NEWER_THAN_REFERENCE for tensor in header.tensors):
                return False
            # It takes every pair for at least 20 bytes (12 in version 1), and they can be less.
            word, pair = (4, 12) if header.version == 1 else (8, 20)
            if len(header.metadata) > (header.file_size - 8 - 2 * word) // pair:
                return False
        return True

    def _architecture(self) -> str:
        hint = self._string("controlvector.model_hint")
        if hint is not None:
            return hint
        architecture = self._string("general.architecture")
        if architecture is not None and architecture not in _DIFFUSION_ARCHITECTURES:
            return architecture
        if self._string("general.type") == "imatrix":
            return "imatrix"
        return "diffusion" if self._has_diffusion_tensors() else "llama"

    def _context_size(self) -> int | None:
        architecture = self._string("general.architecture")
        kind = self._string("general.type")
        if (
            self._has_diffusion_tensors()
            or architecture in ("clip", "controlvector")
            or kind in ("adapter", "imatrix")
        ):
            return None
        name = "llama" if architecture is None else architecture
        size = self._number(self._last, f"{name}.context_length", bits=64)
        return size if size is not None and 1 <= size <= MAX_CONTEXT_SIZE else None

    def _file_type(self) -> int | None:
        return self._number(self._first, "general.file_type", bits=32)

    def _has_diffusion_tensors(self) -> bool:
        return any(trim(tensor.name).startswith(_DIFFUSION_TENSORS) for tensor in self._tensors)

    def _parameters(self, *, exact: bool) -> int:
        # To the reference, a tensor without dimensions has no element; to ggml, one.
        return sum(tensor.elements for tensor in self._tensors if tensor.shape or not exact)

    def _size(self) -> int:
        return sum(tensor.size for tensor in self._tensors)

    def _size_of_reference(self) -> int:
        """Return what the reference implementation takes for the bytes of tensor data.

        Everything behind the header and its padding, which is a whole `alignment` too much where
        the header ends on a boundary. The difference wraps as an unsigned 64-bit number.
        """
        total, alignment = 0, None
        for header in self._headers:
            if alignment is None and "general.alignment" in header.metadata:
                alignment = header.alignment
            unit = alignment or DEFAULT_ALIGNMENT
            padding = unit - header.infos_end % unit
            total += header.file_size - header.infos_end - padding
        return total % 2**64

    def _string(self, key: str) -> str | None:
        entry = self._last.get(key)
        if entry is None:
            return None
        if not isinstance(entry.value.value, str):
            raise _wrong_type(key, entry, "a string")
        return trim(entry.value.value)

    def _number(self, entries: Mapping[str, _Entry], key: str, *, bits: int) -> int | None:
        """Return a number of any type, as an unsigned one of `bits`."""
        entry = entries.get(key)
        if entry is None:
            return None
        value = entry.value.value
        if entry.value.type not in _NUMBERS or not isinstance(value, int | float):
            raise _wrong_type(key, entry, "a number")
        if isinstance(value, float):
            value = int(value) if abs(value) < 2**63 else 0  # NaN is not less, either
        return value % (1 << bits)


def _wrong_type(key: str, entry: _Entry, expected: str) -> WeightFormatError:
    return WeightFormatError(
        f"{key} is of type {entry.value.type.name}, expected {expected}",
        path=entry.path,
        offset=entry.value.offset,
    )


def _shards(first: GGUFHeader, headers: Sequence[GGUFHeader]) -> list[GGUFHeader]:
    """Return `first` and its shards among `headers`, in the order of their numbers."""
    shards = shard_set(first.path)
    if shards is None:
        return [first]
    by_path = {Path(header.path): header for header in headers}
    return [by_path[path] for path in shards.paths()]


def _is_part(header: GGUFHeader) -> bool:
    """Return whether `header` is of something that goes with a model: a projector, an adapter."""
    texts = (header.metadata.get(key) for key in ("general.architecture", "general.type"))
    return any(text is not None and text.value in ("clip", "mmproj", "adapter") for text in texts)


def _check_split(headers: Sequence[GGUFHeader]) -> None:
    """Check that a file which calls itself a shard did not come alone, under another name."""
    for header in headers:
        entry = header.metadata.get("split.count")
        if entry is None or not isinstance(entry.value, int) or entry.value <= 1:
            continue
        if entry.value != len(headers):
            raise WeightFormatError(
                f"split.count says that this is one of {entry.value} shards, found {len(headers)}",
                path=header.path,
                offset=entry.offset,
                hint="keep the names of shards: <name>-00001-of-00003.gguf and so on",
            )


def _text(entry: MetadataValue) -> str | None:
    """Return a metadata value as configs have it; None for arrays that they leave out."""
    value = entry.value
    if not isinstance(value, MetadataArray):
        return _scalar_text(value)
    if value.length > MAX_ARRAY:
        return None
    return ", ".join(_scalar_text(item) for item in value.items or ())


def _scalar_text(value: int | float | bool | str) -> str:
    if isinstance(value, str):
        return trim(value)
    if isinstance(value, bool):
        return boolean(value)
    return fixed(value) if isinstance(value, float) else str(value)
