"""Where each file of a model goes in a bundle, by the rules of Docker Model Runner.

Docker v0.1 models have their weights, projector and chat template renamed, since runtimes look for
them by name; in Docker v0.2 and CNCF models every file keeps its path. Where the reference drops a
file or stops, we go on and say so: `Arrangement.notes`.
Source: docker/model-runner, pkg/distribution/internal/bundle/unpack.go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.foreign import check_usable
from modelpack.artifacts.model import CHAT_TEMPLATE, Model, ModelFile, Role, preferred_template
from modelpack.bundles.directory import folded
from modelpack.errors import UnsafePathError

_SHARD = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.[^./]+\Z")


@dataclass(frozen=True, slots=True)
class PlacedFile:
    """A file of the model and its path in the bundle, below `model/`."""

    path: str
    file: ModelFile


@dataclass(frozen=True, slots=True)
class Arrangement:
    """The plan of a bundle: files, archives to unpack beside them, and what to tell the user."""

    files: tuple[PlacedFile, ...]
    archives: tuple[ModelFile, ...]
    notes: tuple[str, ...]


def arrange(model: Model) -> Arrangement:
    """Return where the files of `model` go, in layer order.

    Raises `UnsafePathError` if a path is not safe, or if two different files have the same one,
    and `UnsupportedError` for what Ollama keeps apart from the weights that it belongs to.
    Licenses alone are renamed instead: nothing looks for them by name.
    """
    check_usable(model.manifest.layers, str(model.reference or model.digest))
    cncf = model.manifest.is_cncf
    renames = model.config.media_type == media_types.DOCKER_CONFIG_V01 and not cncf
    files = model.files()
    plain = [file for file in files if file.archive is None]
    notes: list[str] = []
    wanted = _wanted_paths(plain, renames, notes)
    paths = _distinct_paths(plain, wanted, notes)
    placed = [PlacedFile(path, file) for path, file in zip(paths, plain, strict=True) if path]
    archives = tuple(file for file in files if file.archive)
    return Arrangement(tuple(placed), archives, tuple(notes))


def with_chat_template(arrangement: Arrangement) -> Arrangement:
    """Return the arrangement with the preferred chat template at `chat_template.jinja`, too.

    Only for safetensors, whose runtimes look for that name; a template that had it gives way.
    """
    files = arrangement.files
    at = preferred_template([(placed.file.role, placed.path) for placed in files])
    is_safetensors = any(placed.file.format == "safetensors" for placed in files)
    # An archive may hold the name, and what is inside it is not known yet.
    if at is None or not is_safetensors or arrangement.archives:
        return arrangement
    if files[at].path == CHAT_TEMPLATE or "/" in files[at].path:
        return arrangement
    chosen, notes = files[at], list(arrangement.notes)
    kept = [placed for placed in files if folded(placed.path) != folded(CHAT_TEMPLATE)]
    if len(kept) < len(files):
        notes.append(f"{CHAT_TEMPLATE} is {chosen.path}, in place of the directory's own")
    kept.append(PlacedFile(CHAT_TEMPLATE, chosen.file))
    return replace(arrangement, files=tuple(kept), notes=tuple(notes))


def _wanted_paths(files: Sequence[ModelFile], renames: bool, notes: list[str]) -> list[str | None]:
    """Return the path that each file would have if it were alone; None leaves it out."""
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
            notes.append(f"{_shown(files[i])} is left out: a runtime takes one {_words(role)}")
    notes += [
        f"{_shown(file)} is left out: it names no file"
        for file, path in zip(files, paths, strict=True)
        if path is None and file.role not in (Role.PROJECTOR, Role.CHAT_TEMPLATE)
    ]
    return paths


def _renamed(file: ModelFile) -> bool:
    weight = file.role is Role.WEIGHT and file.format in ("gguf", "dduf")
    return weight or file.role in (Role.PROJECTOR, Role.CHAT_TEMPLATE)


def _in_shard_order(places: list[int], files: Sequence[ModelFile]) -> list[int]:
    """Return the places by shard number if they are one whole set, else as they are."""
    matches = [_SHARD.match(files[i].filepath or "") for i in places]
    numbers = [int(match[2]) for match in matches if match and int(match[3]) == len(places)]
    if sorted(numbers) != list(range(1, len(places) + 1)):
        return places
    return [place for _, place in sorted(zip(numbers, places, strict=True))]


def _distinct_paths(
    files: Sequence[ModelFile], wanted: Sequence[str | None], notes: list[str]
) -> list[str | None]:
    """Return the paths, such that no two are the same; a file that comes twice is made once."""
    paths = list(wanted)
    taken: dict[str, tuple[str, Digest]] = {}
    # Licenses come last, so that they give way.
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
            notes.append(f"{_shown(files[i])} is laid out as {path}: there is another {there[0]}")
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


def _words(role: Role) -> str:
    return role.replace("_", " ")


def _shown(file: ModelFile) -> str:
    return file.filepath or f"layer {file.descriptor.digest.short} ({file.media_type})"
