"""From a request to a plan: which files become which layers, in which order, and what they are.

Layers are in the order of Docker Model Runner: weights with their shards, or a directory as it is
walked; then licenses, chat template and projector. Only headers are read here: hashing is left to
whoever stores the files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from modelpack import mediatypes
from modelpack.errors import PackagingError, UsageError
from modelpack.model import role_of
from modelpack.packaging.build import rehearse
from modelpack.packaging.classify import (
    MEDIA_TYPES,
    PICKLE_HEAD_BYTES,
    WEIGHT_KINDS,
    classify,
    holds_pickle,
    is_pickle,
)
from modelpack.packaging.duplicates import without_duplicates
from modelpack.packaging.files import (
    LayerFile,
    LayerFiles,
    expanded,
    head_of,
    kind_of_file,
    shown,
    status_of,
)
from modelpack.packaging.planned import Plan
from modelpack.packaging.request import (
    PackageRequest,
    check_context_size_fits,
    check_template_wins,
)
from modelpack.packaging.times import created_time
from modelpack.packaging.walk import Found, Skipped, walk
from modelpack.packaging.weights import check_projector, discovered_shards, weight_statistics

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
    files = [maker.at(expanded(path), mediatypes.DOCKER_LICENSE) for path in request.licenses]
    if request.chat_template is not None:
        files.append(maker.at(expanded(request.chat_template), mediatypes.DOCKER_CHAT_TEMPLATE))
    if request.mmproj is not None:
        path = expanded(request.mmproj)
        files.append(maker.at(path, mediatypes.DOCKER_MMPROJ))
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
