"""Files that a model would hold twice: in the directory and named by a flag, or by two flags."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from modelpack.artifacts import media_types
from modelpack.artifacts.model import role_of
from modelpack.builder.build import Plan, rehearse
from modelpack.builder.classify import (
    MEDIA_TYPES,
    PICKLE_HEAD_BYTES,
    WEIGHT_KINDS,
    WEIGHT_TYPES,
    FileKind,
    classify,
    holds_pickle,
    is_pickle,
    is_projector_name,
)
from modelpack.builder.files import (
    Found,
    LayerFile,
    LayerFiles,
    Skipped,
    expanded,
    head_of,
    kind_of_file,
    shown,
    status_of,
    unreadable,
    walk,
)
from modelpack.builder.request import (
    PackageRequest,
    check_context_size_fits,
    check_template_wins,
)
from modelpack.builder.times import created_time
from modelpack.errors import PackagingError, UsageError
from modelpack.formats.gguf import read_gguf_header
from modelpack.formats.safetensors import read_safetensors_header
from modelpack.formats.shards import find_shards, shard_set
from modelpack.formats.statistics import (
    ModelStatistics,
    dduf_statistics,
    gguf_statistics,
    safetensors_statistics,
)

_CHUNK_BYTES: Final = 1024 * 1024


def without_duplicates(
    files: Iterable[LayerFile], named: Iterable[LayerFile]
) -> tuple[tuple[LayerFile, ...], tuple[str, ...]]:
    """Return `files`, then those `named` by flags that are not among them, and notes on the rest.

    A file named by a flag that is there already, by path and content, is not added; what the flag
    says it is counts for more than its name (`--license TERMS.txt`). Raises `PackagingError` for
    two different files of one path: only one of them could be unpacked.
    """
    kept = list(files)
    places = {file.filepath: i for i, file in enumerate(kept)}
    notes = []
    for file in named:
        place = places.setdefault(file.filepath, len(kept))
        if place == len(kept):
            kept.append(file)
            continue
        other = kept[place]
        if not _same_content(file, other):
            raise PackagingError(
                f"{shown(other.path)} and {shown(file.path)} would both be "
                f"{shown(file.filepath)!r} in the model",
                hint="rename one of them",
            )
        notes.append(f"{shown(file.path)} is in the model already as {shown(file.filepath)!r}")
        kept[place] = other.with_type(file.media_type)
    return tuple(kept), tuple(notes)


def _same_content(one: LayerFile, other: LayerFile) -> bool:
    if (one.device, one.inode) == (other.device, other.inode):
        return True
    if one.size != other.size:
        return False
    try:
        with open(one.path, "rb") as first, open(other.path, "rb") as second:
            while chunk := first.read(_CHUNK_BYTES):
                if chunk != second.read(_CHUNK_BYTES):
                    return False
            return True
    except OSError as error:
        raise unreadable(one.path, error) from None


def discovered_shards(path: Path, kind: FileKind) -> tuple[Path, ...]:
    """Return all shards of the model that the weight file `path` is one of, in order.

    Raises `PackagingError` naming the shards that are missing.
    """
    return (path,) if kind is FileKind.DDUF else find_shards(path)


def check_projector(path: Path) -> None:
    """Raise `WeightFormatError` if a projector is named like weights but does not parse."""
    kind = classify(path.name)
    if kind is FileKind.GGUF:
        read_gguf_header(path)
    elif kind is FileKind.SAFETENSORS:
        read_safetensors_header(path)


def weight_statistics(
    files: Sequence[LayerFile], *, config_json: Path | None = None, exact: bool
) -> tuple[ModelStatistics, tuple[str, ...]]:
    """Return what the weights among `files` say about the model, and notes for people.

    Every header is read, so every weight that does not parse is an error. `config_json` is the
    configuration beside safetensors, looked for next to them by default. With `exact` the
    statistics are those of Docker Model Runner.
    """
    weights = [file for file in files if file.media_type in WEIGHT_TYPES]
    if not weights:
        raise PackagingError(
            "no weights are left: a flag says of every one of them that it is no weight"
        )
    kind = next(k for k, media_type in MEDIA_TYPES.items() if media_type == weights[0].media_type)
    paths = [file.path for file in weights]
    if kind is FileKind.GGUF:
        statistics = gguf_statistics(paths, exact=exact)
    elif kind is FileKind.SAFETENSORS:
        statistics = safetensors_statistics(paths, exact=exact, config_json=config_json)
    else:
        statistics = dduf_statistics(paths)
    return statistics, (*_several_models(weights, kind), *statistics.notes)


def _several_models(weights: Sequence[LayerFile], kind: FileKind) -> tuple[str, ...]:
    """Return a note if a directory holds several GGUFs: then they are models, not parts of one."""
    if kind is not FileKind.GGUF:
        return ()
    models = {
        shard_set(file.path) or file.path: file.filepath
        for file in reversed(weights)
        if not is_projector_name(file.filepath)
    }
    if len(models) < 2:
        return ()
    names = ", ".join(sorted(shown(name) for name in models.values()))
    return (f"several models in one directory ({names}): the config describes the first only",)


__all__ = ["LayerFile", "Plan", "Skipped", "plan"]


def plan(request: PackageRequest, *, environ: Mapping[str, str] = os.environ) -> Plan:
    """Return the plan of the new model that `request` asks for.

    Raises `UsageError` for a request that makes no sense, `PackagingError` for files that make no
    model, naming them, and `WeightFormatError` for a weight that does not parse.
    """
    request.check()
    flag, path = _source(request)
    check_context_size_fits(request, cncf=request.format == "cncf")
    created = created_time(request.created, environ)
    maker = LayerFiles.of(request, environ)
    skipped: tuple[Skipped, ...] = ()
    if flag == "--safetensors-dir":
        files, skipped = _directory(path, request, maker)
    else:
        files = _single(flag, path, maker)
    named, named_notes = named_files(request, maker)
    files, notes = _joined(files, named, request)
    check_template_wins(request, [(role_of(f.media_type, f.filepath), f.filepath) for f in files])
    statistics, weight_notes = weight_statistics(
        files, config_json=_config_json(path, files), exact=request.preserve
    )
    result = Plan(files, statistics, created, skipped, (*named_notes, *notes, *weight_notes))
    rehearse(result, request)
    return result


def named_files(
    request: PackageRequest, maker: LayerFiles
) -> tuple[tuple[LayerFile, ...], tuple[str, ...]]:
    """Return the layers of the flags that go after the weights, and notes about them."""
    files = [maker.at(expanded(path), media_types.DOCKER_LICENSE) for path in request.licenses]
    if request.chat_template is not None:
        files.append(maker.at(expanded(request.chat_template), media_types.DOCKER_CHAT_TEMPLATE))
    if request.mmproj is not None:
        path = expanded(request.mmproj)
        files.append(maker.at(path, media_types.DOCKER_MMPROJ))
        check_projector(path)
    return _joined((), files, request)


def _joined(
    files: tuple[LayerFile, ...],
    named: tuple[LayerFile, ...] | list[LayerFile],
    request: PackageRequest,
) -> tuple[tuple[LayerFile, ...], tuple[str, ...]]:
    if request.preserve:  # Docker Model Runner keeps what comes twice
        return (*files, *named), ()
    return without_duplicates(files, named)


def _source(request: PackageRequest) -> tuple[str, Path]:
    sources = request.sources
    if not sources:
        raise UsageError("nothing to package: expected a GGUF, a safetensors directory or a DDUF")
    if len(sources) > 1:
        flags = ", ".join(flag for flag, _ in sources)
        raise UsageError(f"{flags} exclude each other: a model has weights of one kind")
    flag, path = sources[0]
    return flag, expanded(path)


def _config_json(root: Path, files: tuple[LayerFile, ...]) -> Path | None:
    """Return the configuration of the whole model where it is in the directory `root`."""
    return next((f.path for f in files if f.path == root / "config.json"), None)


def _single(flag: str, path: Path, maker: LayerFiles) -> tuple[LayerFile, ...]:
    status = status_of(path)
    if stat.S_ISDIR(status.st_mode):
        raise PackagingError(
            f"{shown(path)} is a directory, {flag} expects a file",
            hint="use --safetensors-dir for a directory, whatever weights it holds",
        )
    kind = classify(path.name)
    if kind not in WEIGHT_KINDS:
        raise PackagingError(
            f"{shown(path)}: the name does not end in .gguf, .safetensors or .dduf",
            hint="the ending says of which format a file is: rename it, or link to it",
        )
    return tuple(maker.at(shard, MEDIA_TYPES[kind]) for shard in discovered_shards(path, kind))


def _directory(
    root: Path, request: PackageRequest, maker: LayerFiles
) -> tuple[tuple[LayerFile, ...], tuple[Skipped, ...]]:
    status = status_of(root)
    if not stat.S_ISDIR(status.st_mode):
        hint = "use --gguf or --dduf for a file" if stat.S_ISREG(status.st_mode) else None
        raise PackagingError(
            f"{shown(root)} is {kind_of_file(status)}, --safetensors-dir expects a directory",
            hint=hint,
        )
    seen = list(walk(root, follow_symlinks=request.follow_symlinks))
    found = [entry for entry in seen if isinstance(entry, Found)]
    skipped = tuple(entry for entry in seen if isinstance(entry, Skipped))
    _check_kinds(root, found, request)
    files = (
        maker.at(entry.path, MEDIA_TYPES[classify(entry.filepath)], entry.filepath)
        for entry in found
    )
    return tuple(files), skipped


def _check_kinds(root: Path, found: list[Found], request: PackageRequest) -> None:
    if not request.allow_pickle:
        _check_pickles(root, found)
    weights = {
        kind: [entry.filepath for entry in found if classify(entry.filepath) is kind]
        for kind in WEIGHT_KINDS
    }
    formats = [f"{kind} ({_listed(paths)})" for kind, paths in weights.items() if paths]
    if not formats:
        raise PackagingError(
            f"{shown(root)}: no weights (.gguf, .safetensors, .dduf) among its {len(found)} files"
        )
    if len(formats) > 1:
        raise PackagingError(
            f"{shown(root)} mixes formats of weights: {', '.join(formats)}",
            hint="package each format as a model of its own",
        )


def _check_pickles(root: Path, found: list[Found]) -> None:
    what = "files named like Python pickles"
    pickles = [entry.filepath for entry in found if is_pickle(entry.filepath)]
    if not pickles:  # the parsers of weights see to it that those are none
        what = "Python pickles"
        others = [entry for entry in found if classify(entry.filepath) not in WEIGHT_KINDS]
        pickles = [e.filepath for e in others if holds_pickle(head_of(e.path, PICKLE_HEAD_BYTES))]
    if pickles:
        raise PackagingError(
            f"{shown(root)} holds {what}, which can run code when they are loaded: "
            f"{_listed(pickles)}",
            hint="leave them out, convert them to safetensors, or use --allow-pickle",
        )


def _listed(paths: list[str]) -> str:
    more = len(paths) - 5
    shown_paths = ", ".join(shown(path) for path in paths[:5])
    return shown_paths + (f" and {more} more" if more > 0 else "")
