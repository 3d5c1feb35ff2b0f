"""The format of a weight file, and the statistics of a model that its config records.

`detect_format` names the format by the first bytes and the file name; `read_statistics` returns
the `ModelStatistics` of a model in GGUF, safetensors or DDUF files. Each parser checks the whole
header; no tensor data is read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from modelpack.artifacts.config import MAX_CONTEXT_SIZE
from modelpack.artifacts.json_document import sorted_map
from modelpack.errors import NotFoundError, PackagingError, WeightFormatError
from modelpack.formats.config_json import (
    CONFIG_JSON,
    MLXQuantization,
    architecture_name,
    context_size,
    first_config_json,
    read_config_json,
)
from modelpack.formats.dduf import DDUFHeader, read_dduf_header
from modelpack.formats.gguf import (
    DEFAULT_ALIGNMENT,
    GGUFHeader,
    MetadataArray,
    MetadataValue,
    ValueType,
    read_gguf_header,
)
from modelpack.formats.reader import WeightSource, opened
from modelpack.formats.safetensors import (
    SafetensorsHeader,
    looks_like_safetensors,
    read_safetensors_header,
)
from modelpack.formats.shards import check_complete, indexed_files, shard_set
from modelpack.formats.tensors import (
    FILE_TYPES,
    GUESSED_FILE_TYPE,
    NEWER_THAN_REFERENCE,
    REFERENCE_FILE_TYPES,
    TensorInfo,
)
from modelpack.formats.units import (
    fixed,
    format_decimal_parameters,
    format_decimal_size,
    format_gguf_size,
    format_parameters,
    trim,
)


class WeightFormat(StrEnum):
    """A format of weight files, by its name in configs."""

    GGUF = "gguf"
    SAFETENSORS = "safetensors"
    DDUF = "dduf"


_EXPECTED = {
    WeightFormat.GGUF: "a GGUF file",
    WeightFormat.SAFETENSORS: "a safetensors file",
    WeightFormat.DDUF: "a DDUF archive",
}


def format_of_name(name: str) -> WeightFormat | None:
    """Return the format that the extension of a file name means, in either case, or None."""
    ending = os.path.splitext(name)[1].lower().removeprefix(".")
    return next((known for known in WeightFormat if known == ending), None)


def detect_format(source: WeightSource) -> WeightFormat:
    """Return the format of the file `source` without parsing its header.

    Raises `WeightFormatError` if it is not a weight file, or not of the format in its name; the
    message has the kind that the file appears to be.
    """
    with opened(source) as file:
        named = format_of_name(os.path.basename(file.path))
        found = _format_of_start(file.head(), file.size, named)
        if found is None:
            if named is WeightFormat.SAFETENSORS:
                return named  # the safetensors parser gives a more specific error
            raise file.foreign(_EXPECTED[named] if named else "a weight file")
        if named and found is not named:
            raise WeightFormatError(
                f"is {_EXPECTED[found]}, but its name ends in .{named}",
                path=file.path,
                offset=0,
                hint=f"rename it to end in .{found}",
            )
        return found


def _format_of_start(head: bytes, size: int, named: WeightFormat | None) -> WeightFormat | None:
    if head[:4] in (b"GGUF", b"FUGG"):
        return WeightFormat.GGUF
    # Every ZIP archive starts like this, so another extension means another kind of archive.
    if head[:4] == b"PK\x03\x04" and named in (WeightFormat.DDUF, None):
        return WeightFormat.DDUF
    if looks_like_safetensors(head, size):
        return WeightFormat.SAFETENSORS
    return None


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """The fields of a config that come from the weights; unknown texts are empty.

    `parameters` and `size` are texts in the number formats of `units`. The maps are sorted by key,
    as in a config; `context_size` is in tokens. `notes` tell users which values the config leaves
    out, and why.
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


def read_statistics(
    paths: Sequence[str | os.PathLike[str]], *, exact: bool = False
) -> ModelStatistics:
    """Return the statistics of the model in the weight files `paths`, all of one format.

    With `exact`, compute every field as Docker Model Runner does. Raises `WeightFormatError` for
    a file that does not parse, `PackagingError` for mixed formats or missing shards.
    """
    if not paths:
        raise PackagingError("statistics need at least one weight file")
    formats = [detect_format(path) for path in paths]
    for path, found in zip(paths, formats, strict=True):
        if found is not formats[0]:
            raise PackagingError(
                f"{os.fspath(path)} is {found}, but {os.fspath(paths[0])} is {formats[0]}:"
                " all weights of a model must have one format",
            )
    if formats[0] is WeightFormat.GGUF:
        return gguf_statistics(paths, exact=exact)
    if formats[0] is WeightFormat.SAFETENSORS:
        return safetensors_statistics(paths, exact=exact)
    return dduf_statistics(paths, exact=exact)


#: Tensor types after which no file type is named.
_UNNAMED = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"} | {
    f"IQ4_NL_{rows}" for rows in ("4_4", "4_8", "8_8")
}


def _gguf_quantization(
    file_type: int | None, architecture: str, tensors: Iterable[TensorInfo], *, exact: bool
) -> str:
    """Return the quantization of a model with this `general.file_type`, such as `MOSTLY_Q4_K_M`.

    With `exact`, use only the file types of the reference implementation.
    """
    known = REFERENCE_FILE_TYPES if exact else len(FILE_TYPES)
    if file_type is not None and not exact and file_type & GUESSED_FILE_TYPE:
        file_type = None  # llama.cpp guessed it, too
    if file_type is None or (exact and file_type == REFERENCE_FILE_TYPES):
        name = _guess(architecture, tensors)
        return f"MOSTLY_{name}" if name else "Unknown"
    return f"MOSTLY_{FILE_TYPES[file_type]}" if file_type < known else f"GGUFFileType({file_type})"


def _guess(architecture: str, tensors: Iterable[TensorInfo]) -> str | None:
    """Return the file type that the counts of tensor types suggest, or None."""
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
    """Return whether a tensor of this name counts for the quantization of the model."""
    if name.endswith(".weight"):
        return True
    return not diffusion and (name.startswith(("token_embd", "blk.")) or "_norm" in name)


#: Longer arrays are left out of configs.
MAX_ARRAY = 50
#: Longer metadata texts are left out of configs, except for exact ones.
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
    """Return the statistics of the model in `files`: paths or parsed headers.

    The model is the first file with its shards; by default, files of projectors and adapters are
    skipped. With `exact`, compute every field as Docker Model Runner does. Raises
    `WeightFormatError` for a broken header, and `PackagingError` with the names of missing shards.
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


#: A metadata value and the path of its file.
_Entry = tuple[str, MetadataValue]


class _Model:
    """The metadata and tensors of all shards of one GGUF model."""

    def __init__(self, headers: Sequence[GGUFHeader]) -> None:
        self._headers = headers
        self._tensors = [tensor for header in headers for tensor in header.tensors]
        self._entries = [
            (trim(key), (header.path, value))
            for header in headers
            for key, value in header.metadata.items()
            if trim(key) != "split.no"
        ]
        # If several shards have a key, the last one counts, except for the file type.
        self._last = dict(self._entries)
        self._first = dict(reversed(self._entries))

    def statistics(self, *, exact: bool) -> ModelStatistics:
        architecture = self._architecture()
        texts = {
            key: text for key, (_, value) in self._entries if (text := _text(value)) is not None
        }
        # The reference counts no element for a tensor without dimensions, ggml counts one.
        parameters = sum(tensor.elements for tensor in self._tensors if tensor.shape or not exact)
        size = self._size_of_reference() if exact else sum(t.size for t in self._tensors)
        notes: list[str] = []
        if not exact:
            _check_split(self._headers)
            notes = _without_long(texts)
        file_type = self._number(self._first, "general.file_type", bits=32)
        return ModelStatistics(
            format="gguf",
            quantization=_gguf_quantization(file_type, architecture, self._tensors, exact=exact),
            parameters=format_parameters(parameters),
            architecture=architecture,
            size=format_gguf_size(size),
            gguf=sorted_map(texts) or None,
            context_size=self._context_size(),
            notes=tuple(notes),
        )

    def readable_by_reference(self) -> bool:
        """Return whether the reference implementation can parse these files."""
        for header in self._headers:
            # It recognises big-endian files only by the swapped magic, which is no longer written.
            if header.big_endian and not header.swapped_magic:
                return False
            # It reads 32 KiB for an empty string, so that all later fields are wrong.
            if header.empty_string:
                return False
            if any(tensor.dtype in NEWER_THAN_REFERENCE for tensor in header.tensors):
                return False
            # It assumes at least 20 bytes a pair (12 in version 1), but a pair can be shorter.
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

    def _has_diffusion_tensors(self) -> bool:
        return any(trim(tensor.name).startswith(_DIFFUSION_TENSORS) for tensor in self._tensors)

    def _size_of_reference(self) -> int:
        """Return the bytes of tensor data as the reference implementation counts them.

        It subtracts the header and its padding from the file size, and takes the padding for a
        whole `alignment` if the header ends on a boundary. The result wraps as an unsigned 64-bit
        number.
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
        text = entry[1].value
        if not isinstance(text, str):
            raise _wrong_type(key, entry, "a string")
        return trim(text)

    def _number(self, entries: Mapping[str, _Entry], key: str, *, bits: int) -> int | None:
        """Return the number under `key`, converted to an unsigned integer of `bits`, or None."""
        entry = entries.get(key)
        if entry is None:
            return None
        value = entry[1].value
        if entry[1].type not in _NUMBERS or not isinstance(value, int | float):
            raise _wrong_type(key, entry, "a number")
        if isinstance(value, float):
            value = int(value) if abs(value) < 2**63 else 0  # the comparison is false for NaN
        return value % (1 << bits)


def _wrong_type(key: str, entry: _Entry, expected: str) -> WeightFormatError:
    path, value = entry
    message = f"{key} is of type {value.type.name}, expected {expected}"
    return WeightFormatError(message, path=path, offset=value.offset)


def _shards(first: GGUFHeader, headers: Sequence[GGUFHeader]) -> list[GGUFHeader]:
    """Return the headers of all shards of `first`, in the order of their numbers."""
    shards = shard_set(first.path)
    if shards is None:
        return [first]
    by_path = {Path(header.path): header for header in headers}
    return [by_path[path] for path in shards.paths()]


def _is_part(header: GGUFHeader) -> bool:
    """Return whether `header` belongs to a projector or an adapter instead of a model."""
    texts = (header.metadata.get(key) for key in ("general.architecture", "general.type"))
    return any(text is not None and text.value in ("clip", "mmproj", "adapter") for text in texts)


def _check_split(headers: Sequence[GGUFHeader]) -> None:
    """Check that the files are the shards 0 to `split.count` - 1 of one model, each once."""
    counts = [_split(header, "split.count") for header in headers]
    if all(count is None or count.value <= 1 for count in counts):
        return
    numbers: dict[int, str] = {}
    for header, count in zip(headers, counts, strict=True):
        if count is None or count.value != len(headers):
            found = f"expects {count.value} shards, found {len(headers)}" if count else "is missing"
            raise WeightFormatError(
                f"split.count {found}",
                path=header.path,
                offset=0 if count is None else count.offset,
                hint="keep the names of shards: <name>-00001-of-00003.gguf and so on",
            )
        number = _split(header, "split.no")
        if number is None:
            continue
        other = numbers.setdefault(number.value, header.path)
        if other != header.path or not 0 <= number.value < len(headers):
            why = f", as in {other}" if other != header.path else f" of {len(headers)} shards"
            raise WeightFormatError(
                f"split.no is {number.value}{why}",
                path=header.path,
                offset=number.offset,
                hint="get the shard again: another one is in its place",
            )


class _Number(NamedTuple):
    value: int
    offset: int


def _split(header: GGUFHeader, key: str) -> _Number | None:
    """Return a number of the metadata and its byte; None if there is none."""
    entry = header.metadata.get(key)
    if entry is None or not isinstance(entry.value, int):
        return None
    return _Number(entry.value, entry.offset)


def _without_long(texts: dict[str, str]) -> list[str]:
    """Delete the texts that are too long for a config; return a note for each."""
    long = {key: texts.pop(key) for key in list(texts) if len(texts[key]) > MAX_TEXT}
    return [f"{key} of {len(long[key])} characters is left out of the config" for key in long]


def _text(entry: MetadataValue) -> str | None:
    """Return the text of a metadata value in configs, or None for arrays too long for them."""
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
        return str(value).lower()
    return fixed(value) if isinstance(value, float) else str(value)


def safetensors_statistics(
    files: Sequence[str | os.PathLike[str] | SafetensorsHeader],
    *,
    exact: bool = False,
    config_json: str | os.PathLike[str] | None = None,
) -> ModelStatistics:
    """Return the statistics of the model in the weight `files`: paths or parsed headers.

    `config_json` is the path of the model's configuration, by default in the directory of the
    weights. With `exact`, compute every field as Docker Model Runner does, from the first file
    only. Raises `WeightFormatError` for a broken header, and `PackagingError` with the names of
    missing shards.
    """
    if not files:
        return ModelStatistics(format="safetensors")
    check_complete(file.path if isinstance(file, SafetensorsHeader) else file for file in files)
    headers = [
        file if isinstance(file, SafetensorsHeader) else read_safetensors_header(file)
        for file in files
    ]
    size = format_decimal_size(sum(header.file_size for header in headers))
    if exact:
        return _exact_safetensors(headers, size)
    notes: list[str] = []
    tensors = _counted(headers)
    config = _read_config(headers, config_json, notes)
    metadata: dict[str, str] = {}
    for header in headers:
        for key, value in header.metadata.items():
            metadata.setdefault(key, value)
    architecture = trim(metadata.get("architecture", "")) or architecture_name(config)
    notes += _without_long(metadata)
    quantized = MLXQuantization.of(config)
    if quantized is None:
        quantization = _safetensors_quantization(tensors)
        parameters = sum(tensor.elements for tensor in tensors)
    else:
        quantization = quantized.label
        parameters = quantized.parameters(tensors)
        metadata |= quantized.facts()
    return ModelStatistics(
        format="safetensors",
        quantization=quantization,
        parameters=format_decimal_parameters(parameters),
        architecture=architecture,
        size=size,
        safetensors=sorted_map({**metadata, "tensor_count": str(len(tensors))}),
        context_size=context_size(config, nested=True),
        notes=tuple(notes),
    )


def _exact_safetensors(headers: Sequence[SafetensorsHeader], size: str) -> ModelStatistics:
    first = headers[0]
    config: Mapping[str, Any] = {}
    path = first_config_json(Path(header.path).parent for header in headers)
    if path is not None:
        with suppress(ValueError, NotFoundError):
            config = read_config_json(path, strict=True)
    return ModelStatistics(
        format="safetensors",
        quantization=_safetensors_quantization(first.tensors),
        parameters=format_decimal_parameters(sum(tensor.elements for tensor in first.tensors)),
        architecture=first.metadata.get("architecture", ""),
        size=size,
        safetensors=sorted_map({**first.metadata, "tensor_count": str(len(first.tensors))}),
        context_size=context_size(config, nested=False),
    )


def _counted(headers: Sequence[SafetensorsHeader]) -> list[TensorInfo]:
    """Return the tensors of the model, each once.

    If a directory has an index, only the files in it count. Otherwise, a tensor that is in several
    files (variants such as `model.fp16.safetensors`) is taken from the first.
    """
    directories: dict[Path, list[SafetensorsHeader]] = {}
    for header in headers:
        directories.setdefault(Path(header.path).parent, []).append(header)
    tensors: list[TensorInfo] = []
    for directory, files in directories.items():
        names = [Path(header.path).name for header in files]
        indexed = indexed_files(directory, names)
        counted: dict[str, TensorInfo] = {}
        for name, header in zip(names, files, strict=True):
            if indexed is None or name in indexed:
                for tensor in header.tensors:
                    counted.setdefault(tensor.name, tensor)
        tensors += counted.values()
    return tensors


def _safetensors_quantization(tensors: Sequence[TensorInfo]) -> str:
    dtypes = {tensor.dtype for tensor in tensors} or {"unknown"}
    return dtypes.pop() if len(dtypes) == 1 else "mixed"


def _read_config(
    headers: Sequence[SafetensorsHeader],
    given: str | os.PathLike[str] | None,
    notes: list[str],
) -> Mapping[str, Any]:
    """Return the model's config.json, or an empty object.

    By default it is the one in the common directory of all weights: a config.json in a
    subdirectory describes a part of the model.
    """
    if given is None:
        directories = [os.path.dirname(os.path.abspath(header.path)) for header in headers]
        path = Path(os.path.commonpath(directories)) / CONFIG_JSON
    else:
        path = Path(given)
    try:
        return read_config_json(path, strict=False)
    except NotFoundError:
        return {}
    except ValueError as error:
        notes.append(f"{path} does not parse ({error}): it cannot complete the config")
        return {}


def dduf_statistics(
    files: Sequence[str | os.PathLike[str] | DDUFHeader], *, exact: bool = False
) -> ModelStatistics:
    """Return the statistics of the model in the DDUF archives `files`, usually one.

    They equal those of Docker Model Runner with and without `exact`. Raises `WeightFormatError`
    for a broken archive.
    """
    if not files:
        return ModelStatistics(format="dduf")
    headers = [file if isinstance(file, DDUFHeader) else read_dduf_header(file) for file in files]
    size = sum(header.file_size for header in headers)
    return ModelStatistics(
        format="dduf",
        architecture="diffusers",
        size=format_decimal_size(size),
        diffusers=sorted_map({"dduf_file": Path(headers[0].path).name, "layout": "dduf"}),
    )
