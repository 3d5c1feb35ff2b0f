"""Selection of files on the hub: the quantisation in a GGUF file's name, and the files to pull.

Names follow conventions: `Model-Q4_K_M.gguf`, `model.q8_0.gguf`,
`BF16/model-00001-of-00003.gguf`, `Model-UD-Q4_K_XL-00001-of-00002.gguf`. A label matches as a
whole: `Q4_K` does not match `Q4_K_M`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from modelpack.builder.classify import (
    FileKind,
    classify,
    is_pickle,
    is_projector_name,
    lowered_name,
)
from modelpack.errors import AmbiguousError, NotFoundError, PackagingError
from modelpack.formats.shards import shard_set
from modelpack.hub.repository import HubFile

_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}\Z", re.A)
# llama.cpp's names of file types (llama-quantize), Unsloth's `UD-` and MXFP4.
_LABEL: Final = re.compile(
    r"(?:(?<=[-._])|\A)"
    r"((?:UD-)?(?:I?Q[1-9]\d?(?:_[0-9A-Z]+)*|TQ\d_\d|(?:MX|NV)FP4(?:_MOE)?|BF16|F16|FP16|F32|FP32))"
    r"(?=[-.]|\Z)",
    re.I | re.A,
)


class Named(Protocol):
    """The name of a model among several; `example` shows how to name one of them."""

    @property
    def quantization(self) -> str | None: ...

    @property
    def example(self) -> str: ...


def stem(path: str) -> str:
    """Return the name of a weight file without its directory, its shard number and its ending."""
    name = path.rpartition("/")[2]
    return _SHARD.sub("", name[: name.rfind(".")] if "." in name else name)


def quantization_of(path: str) -> str | None:
    """Return the quantisation label in the file's name, else in a directory's, in upper case."""
    for text in (stem(path), *reversed(path.split("/")[:-1])):
        found = _LABEL.findall(text)
        if found:
            return str(found[-1]).upper()
    return None


def is_quantization(path: str, wanted: str) -> bool:
    """Return whether the file has the quantisation `wanted`: as its label, or as its whole name.

    If `wanted` is not a label (`8bit`, `imat`), it must be words of the name, which `-` and `.`
    separate.
    """
    name = stem(path)
    if wanted.lower() in (name.lower(), path.rpartition("/")[2].lower()):
        return True
    if _LABEL.fullmatch(wanted):
        return quantization_of(path) == wanted.upper()
    words, asked = (re.split(r"[-.]", text.lower()) for text in (name, wanted))
    places = range(len(words) - len(asked) + 1)
    return any(words[at : at + len(asked)] == asked for at in places)


#: The quantisation to pull if the user names none, as in Docker Model Runner.
DEFAULT_QUANTIZATION: Final = "Q4_K_M"

# Files for other runtimes, from the training, or for the model's page.
_FOREIGN_SUFFIXES: Final = (
    *(".onnx", ".onnx_data", ".h5", ".msgpack", ".tflite", ".ot", ".mlmodel", ".pb", ".npz"),
    *(".nemo", ".engine", ".llamafile", ".tar", ".tar.gz", ".tgz", ".zip", ".7z", ".parquet"),
    *(".arrow", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".pdf", ".mp4", ".mp3", ".wav"),
    *(".ipynb", ".log", ".imatrix", ".dat"),
)
_FOREIGN_DIRECTORIES: Final = re.compile(
    r"(?:original|onnx|openvino|coreml|metal|flax|tf|tensorrt|runs|logs|assets|images|figures|"
    r"checkpoints?(?:-\d+)?|global_step\d+|last-checkpoint)\Z",
    re.I,
)
# Copies of weights in another precision, whose names have this word added.
_VARIANT: Final = re.compile(r"\.(?:fp16|bf16|fp32|non_ema|ema)(?=[.-])", re.I)
_MISTRAL: Final = re.compile(r"consolidated(?:[.-].*)?\.safetensors(?:\.index\.json)?\Z")
_SHOWN: Final = 12


@dataclass(frozen=True, slots=True)
class Choice:
    """The files of a model, in the order of layers; `weights` are among them.

    `projectors` are multimodal projectors among them. `notes` are messages for the user.
    """

    kind: FileKind
    files: tuple[HubFile, ...]
    weights: tuple[HubFile, ...]
    projectors: tuple[HubFile, ...] = ()
    notes: tuple[str, ...] = ()


def choose(files: Sequence[HubFile], reference: Named) -> Choice:
    """Return the files of the model that `reference` names.

    Raises `NotFoundError` for a quantisation that does not exist, `AmbiguousError` if several
    models have it, `PackagingError` for a repository without weights, or with pickles only.
    """
    usable = [file for file in _in_order(files) if _is_usable(file.path)]
    by_kind = {
        kind: [file for file in usable if classify(file.path) is kind]
        for kind in (FileKind.GGUF, FileKind.SAFETENSORS, FileKind.DDUF)
    }
    ggufs = by_kind[FileKind.GGUF]
    if reference.quantization is not None:
        if not any(not is_projector_name(file.path) for file in ggufs):
            raise _no_quantizations(reference, by_kind)
        return _gguf(usable, ggufs, reference)
    if by_kind[FileKind.SAFETENSORS]:
        chosen = _safetensors(usable, by_kind[FileKind.SAFETENSORS])
        notes = (f"the repository also has GGUF: {_labels(ggufs)}",) if ggufs else ()
        return Choice(FileKind.SAFETENSORS, *chosen, notes=notes)
    if ggufs:
        return _gguf(usable, ggufs, reference)
    if by_kind[FileKind.DDUF]:
        return _dduf(usable, by_kind[FileKind.DDUF], reference)
    raise _no_weights(files, reference)


def _gguf(usable: Sequence[HubFile], ggufs: Sequence[HubFile], reference: Named) -> Choice:
    models = _models(file for file in ggufs if not is_projector_name(file.path))
    if not models:
        raise PackagingError(f"{reference}: its only GGUF files are projectors")
    wanted = reference.quantization
    if wanted is None and len(models) > 1:
        wanted = DEFAULT_QUANTIZATION
    found = [files for files in models if wanted is None or is_quantization(files[0].path, wanted)]
    if not found:
        what = "" if reference.quantization else " (the default)"
        raise NotFoundError(
            f"{reference}: no GGUF has the quantisation {wanted}{what}; "
            f"there are: {_labels(ggufs)}",
            hint=f"write {reference.example}",
        )
    if len(found) > 1:
        names = ", ".join(stem(files[0].path) for files in found[:_SHOWN])
        raise AmbiguousError(
            f"{reference}: several models have the quantisation {wanted}: {names}",
            hint=f"write {reference.example}",
        )
    weights = _whole(found[0], reference)
    projectors = _projector(ggufs)
    papers = [file for file in usable if _goes_with_gguf(file.path)]
    chosen = _in_order([*weights, *projectors, *papers])
    return Choice(FileKind.GGUF, chosen, weights, projectors)


def _safetensors(
    usable: Sequence[HubFile], weights: Sequence[HubFile]
) -> tuple[tuple[HubFile, ...], tuple[HubFile, ...]]:
    paths = {file.path for file in weights}
    left_out = {p for p in paths if _VARIANT.search(p) and _VARIANT.sub("", p) in paths}
    if any(not _MISTRAL.match(path) and "/" not in path for path in paths):
        # The same weights again, in Mistral's own layout.
        left_out |= {file.path for file in usable if _MISTRAL.match(file.path)}
    kept = tuple(file for file in weights if file.path not in left_out)
    others = (FileKind.GGUF, FileKind.DDUF)
    chosen = tuple(
        file for file in usable if file.path not in left_out and classify(file.path) not in others
    )
    return chosen, kept


def _dduf(usable: Sequence[HubFile], ddufs: Sequence[HubFile], reference: Named) -> Choice:
    if len(ddufs) > 1:
        names = ", ".join(file.path for file in ddufs[:_SHOWN])
        raise AmbiguousError(
            f"{reference}: has several DDUF files: {names}",
            hint="download one of them and package it",
        )
    papers = [file for file in usable if _goes_with_gguf(file.path)]
    return Choice(FileKind.DDUF, _in_order([*ddufs, *papers]), tuple(ddufs))


def _models(ggufs: Iterable[HubFile]) -> list[list[HubFile]]:
    """Return the files of each model: one file, or its shards."""
    models: dict[object, list[HubFile]] = {}
    for file in ggufs:
        models.setdefault(shard_set(file.path) or file.path, []).append(file)
    return list(models.values())


def _whole(files: Sequence[HubFile], reference: Named) -> tuple[HubFile, ...]:
    there = {file.path for file in files}
    shards = shard_set(files[0].path)
    missing = [path.name for path in shards.paths() if str(path) not in there] if shards else []
    if missing:
        raise PackagingError(f"{reference}: shards are missing: {', '.join(missing[:_SHOWN])}")
    return tuple(files)


def _projector(ggufs: Sequence[HubFile]) -> tuple[HubFile, ...]:
    """Return the projector of the most usual precision, or nothing if there is none."""
    found = [file for file in ggufs if is_projector_name(file.path)]
    order = ("F16", "FP16", "BF16", "F32", "FP32")

    def rank(file: HubFile) -> int:
        label = quantization_of(file.path)
        return order.index(label) if label in order else len(order)

    return (min(found, key=rank),) if found else ()


def _goes_with_gguf(path: str) -> bool:
    """Return whether a file at the top is a licence, a model card or a chat template."""
    kind = classify(path)
    is_template = kind is FileKind.CHAT_TEMPLATE and path.endswith(".jinja")
    is_paper = kind is FileKind.LICENSE or is_template or lowered_name(path) == "readme.md"
    return is_paper and "/" not in path


def _is_usable(path: str) -> bool:
    *directories, name = path.lower().split("/")
    return not (
        any(part.startswith(".") or part == "__pycache__" for part in (*directories, name))
        or any(_FOREIGN_DIRECTORIES.match(part) for part in directories)
        or is_pickle(path)
        or name.endswith(_FOREIGN_SUFFIXES)
        or "tfevents" in name
    )


def _in_order(files: Iterable[HubFile]) -> tuple[HubFile, ...]:
    """Return the files, each once, in the order of a walk through their directory."""
    unique = {file.path: file for file in files}.values()
    return tuple(sorted(unique, key=lambda file: [part.encode() for part in file.path.split("/")]))


def _labels(ggufs: Iterable[HubFile]) -> str:
    models = _models(file for file in ggufs if not is_projector_name(file.path))
    labels = sorted({quantization_of(files[0].path) or stem(files[0].path) for files in models})
    more = len(labels) - _SHOWN
    return ", ".join(labels[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _no_quantizations(reference: Named, by_kind: dict[FileKind, list[HubFile]]) -> NotFoundError:
    there = [str(kind) for kind, files in by_kind.items() if files and kind is not FileKind.GGUF]
    return NotFoundError(
        f"{reference}: has no GGUF, so no quantisation {reference.quantization}; "
        f"it has: {', '.join(there) or 'no known weights'}",
        hint="leave out the quantisation; a revision follows an @",
    )


def _no_weights(files: Sequence[HubFile], reference: Named) -> PackagingError:
    pickles = [file.path for file in files if is_pickle(file.path)]
    if pickles:
        more = f" and {len(pickles) - 3} more" if len(pickles) > 3 else ""
        return PackagingError(
            f"{reference}: its weights are Python pickles only, which can run code when they are "
            f"loaded: {', '.join(pickles[:3])}{more}",
            hint="convert them on the hub: https://huggingface.co/spaces/safetensors/convert",
        )
    return PackagingError(f"{reference}: has no weights (.safetensors, .gguf, .dduf)")
