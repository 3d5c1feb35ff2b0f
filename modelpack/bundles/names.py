"""The paths of a model's files in a bundle, by the rules of Docker Model Runner.

The weights, projector and chat template of a Docker v0.1 model are renamed, since runtimes look for
them by name; the files of Docker v0.2 and CNCF models keep their paths. Where the reference
implementation drops a file or fails, we continue and add a note to `Arrangement.notes`.
Source: docker/model-runner, pkg/distribution/internal/bundle/unpack.go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.model import CHAT_TEMPLATE, Model, ModelFile, Role, preferred_template
from modelpack.artifacts.paths import folded
from modelpack.errors import UnsafePathError, UnsupportedError

_SHARD = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.[^./]+\Z")


@dataclass(frozen=True, slots=True)
class PlacedFile:
    """A file of the model and its path in the bundle, below `model/`."""

    path: str
    file: ModelFile


@dataclass(frozen=True, slots=True)
class Arrangement:
    """The plan of a bundle: its files, the archives to unpack, and notes for the user.

    `tensors` are the layers of Ollama's MLX models, which become one file.
    """

    files: tuple[PlacedFile, ...]
    archives: tuple[ModelFile, ...]
    notes: tuple[str, ...]
    tensors: tuple[ModelFile, ...] = ()


def arrange(model: Model) -> Arrangement:
    """Return the paths of the files of `model`, in layer order.

    Raises `UnsafePathError` if a path is unsafe or two different files have the same path, and
    `UnsupportedError` for weights with an adapter in a layer of its own, which no runtime would
    apply. Licenses with the same path are renamed instead: no runtime looks for them by name.
    """
    name = str(model.reference or model.digest)
    if model.has_adapter:
        raise UnsupportedError(
            "has a LoRA adapter in a layer of its own, which is not supported in other runtimes",
            path=name,
            hint="serve it with modelpack serve, or merge the adapter into the weights",
        )
    cncf = model.manifest.is_cncf
    renames = model.config.media_type == media_types.DOCKER_CONFIG_V01 and not cncf
    files = model.files()
    plain = [file for file in files if not file.is_packed]
    notes: list[str] = []
    wanted = _wanted_paths(plain, renames, notes)
    paths = _distinct_paths(plain, wanted, notes)
    placed = [PlacedFile(path, file) for path, file in zip(paths, plain, strict=True) if path]
    archives = tuple(file for file in files if file.archive)
    tensors = tuple(file for file in files if file.is_tensor)
    return Arrangement(tuple(placed), archives, tuple(notes), tensors)


def with_chat_template(arrangement: Arrangement) -> Arrangement:
    """Return the arrangement with the preferred chat template also at `chat_template.jinja`.

    Only for safetensors, whose runtimes look for that name; it replaces a template of that name.
    """
    files = arrangement.files
    at = preferred_template([(placed.file.role, placed.path) for placed in files])
    is_safetensors = any(placed.file.format == "safetensors" for placed in files)
    # An archive may contain a file of this name, but it is not unpacked yet.
    if at is None or not is_safetensors or arrangement.archives:
        return arrangement
    if files[at].path == CHAT_TEMPLATE or "/" in files[at].path:
        return arrangement
    chosen, notes = files[at], list(arrangement.notes)
    kept = [placed for placed in files if folded(placed.path) != folded(CHAT_TEMPLATE)]
    if len(kept) < len(files):
        notes.append(f"{CHAT_TEMPLATE} is replaced by {chosen.path}, the preferred chat template")
    kept.append(PlacedFile(CHAT_TEMPLATE, chosen.file))
    return replace(arrangement, files=tuple(kept), notes=tuple(notes))


def _wanted_paths(files: Sequence[ModelFile], renames: bool, notes: list[str]) -> list[str | None]:
    """Return the path of each file regardless of the others; None leaves the file out."""
    paths: list[str | None] = [None if renames and _renamed(f) else f.filepath for f in files]
    for kind in ("gguf", "safetensors"):
        places = [i for i, f in enumerate(files) if f.role is Role.WEIGHT and f.format == kind]
        if kind == "gguf" and renames:
            places = _in_shard_order(places, files)
        for number, i in enumerate(places, start=1):
            part = f"-{number:05d}-of-{len(places):05d}" if len(places) > 1 else ""
            paths[i] = paths[i] or f"model{part}.{kind}"
    for i, file in enumerate(files):
        if paths[i] is None and file.role is Role.WEIGHT and file.format == "dduf":
            paths[i] = f"{file.descriptor.digest.encoded}.dduf"
    for role, name in ((Role.PROJECTOR, "model.mmproj"), (Role.CHAT_TEMPLATE, "template.jinja")):
        unnamed = [i for i, f in enumerate(files) if f.role is role and paths[i] is None]
        if unnamed:
            paths[unnamed[0]] = name
        for i in unnamed[1:]:
            kind = role.replace("_", " ")
            notes.append(f"{_shown(files[i])} is left out: a runtime uses one {kind}")
    notes += [
        f"{_shown(file)} is left out: it has no file name"
        for file, path in zip(files, paths, strict=True)
        if path is None and file.role not in (Role.PROJECTOR, Role.CHAT_TEMPLATE)
    ]
    return paths


def _renamed(file: ModelFile) -> bool:
    weight = file.role is Role.WEIGHT and file.format in ("gguf", "dduf")
    return weight or file.role in (Role.PROJECTOR, Role.CHAT_TEMPLATE)


def _in_shard_order(places: list[int], files: Sequence[ModelFile]) -> list[int]:
    """Return the indices sorted by shard number if they are one complete set, else unchanged."""
    matches = [_SHARD.match(files[i].filepath or "") for i in places]
    numbers = [int(match[2]) for match in matches if match and int(match[3]) == len(places)]
    if sorted(numbers) != list(range(1, len(places) + 1)):
        return places
    return [place for _, place in sorted(zip(numbers, places, strict=True))]


def _distinct_paths(
    files: Sequence[ModelFile], wanted: Sequence[str | None], notes: list[str]
) -> list[str | None]:
    """Return distinct paths; None for a file that has the path and digest of another."""
    paths = list(wanted)
    taken: dict[str, tuple[str, Digest]] = {}
    # Licenses come last: they are renamed if their path is taken.
    for i in sorted(range(len(files)), key=lambda i: files[i].role is Role.LICENSE):
        path, digest = paths[i], files[i].descriptor.digest
        if path is None:
            continue
        there = taken.get(folded(path))
        if there == (path, digest):
            paths[i] = None
            continue
        if there and files[i].role is Role.LICENSE:
            path = paths[i] = _free_name(path, taken)
            notes.append(f"{_shown(files[i])} is placed at {path}: another file is at {there[0]}")
        elif there:
            raise UnsafePathError(
                f"two files of the model have the path {path!r} (or {there[0]!r}): "
                f"{there[1]} and {digest}",
                expected="different paths",
                got=path,
            )
        taken[folded(path)] = (path, digest)
    return paths


def _free_name(path: str, taken: Mapping[str, object]) -> str:
    """Return `path` with a number: LICENSE-2.txt."""
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.rpartition(".") if "." in name[1:] else (name, "", "")
    numbered = (f"{folder}{slash}{stem}-{n}{dot}{extension}" for n in count(2))
    return next(candidate for candidate in numbered if folded(candidate) not in taken)


def _shown(file: ModelFile) -> str:
    return file.filepath or f"layer {file.descriptor.digest.short} ({file.media_type})"
