"""Collect the files of a new model, or those to add to an existing one, into a `Plan`.

`plan` and `plan_extras` check the request, walk the directory, reject pickles, find shards and read
the statistics of the weights. No file is hashed here; `build` needs the digests.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Final

from modelpack.artifacts import media_types
from modelpack.artifacts.model import Role, role_of
from modelpack.artifacts.paths import folded
from modelpack.builder.build import Plan, check_document_sizes
from modelpack.builder.capabilities import LocalFile
from modelpack.builder.classify import (
    MEDIA_TYPES,
    PICKLE_HEAD_BYTES,
    WEIGHT_KINDS,
    WEIGHT_TYPES,
    FileKind,
    classify,
    holds_pickle,
    is_pickle,
)
from modelpack.builder.description import describe
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
from modelpack.builder.request import PackageRequest, check_context_size_fits, check_template_wins
from modelpack.builder.times import created_time
from modelpack.builder.vision import media_notes
from modelpack.errors import ModelpackError, PackagingError, UsageError
from modelpack.formats.gguf import read_gguf_header
from modelpack.formats.projector import (
    PROJECTOR_ARCHITECTURE,
    embedding_width,
    gguf_role,
    projected_width,
)
from modelpack.formats.shards import find_shards, shard_set
from modelpack.formats.statistics import (
    ModelStatistics,
    dduf_statistics,
    gguf_statistics,
    safetensors_statistics,
)
from modelpack.plugins import load_function

_CHUNK_BYTES: Final = 1024 * 1024
#: The engine renders at most 512 Ki characters, each up to 4 bytes of UTF-8.
_MAX_TEMPLATE_BYTES: Final = 4 * 512 * 1024


def without_duplicates(
    files: Iterable[LayerFile], named: Iterable[LayerFile]
) -> tuple[tuple[LayerFile, ...], tuple[str, ...]]:
    """Return `files` with those `named` by flags, each once, and notes about repeated files.

    A file named by a flag that has the path and content of one in `files` is not added, but its
    flag decides its type (`--license TERMS.txt`). Raises `PackagingError` for two different files
    with one path: only one of them could be unpacked.
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
        notes.append(f"{shown(file.path)} is already in the model as {shown(file.filepath)!r}")
        kept[place] = replace(other, media_type=file.media_type)
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
        raise unreadable(one.path, error) from error


def weight_statistics(
    files: Sequence[LayerFile], *, config_json: Path | None = None, exact: bool
) -> tuple[ModelStatistics, tuple[str, ...]]:
    """Return the statistics of the weights among `files`, and notes for users.

    Every header is read, so every weight that does not parse is an error. `config_json` is the
    configuration of safetensors, by default the one in their directory. With `exact`, compute the
    statistics as Docker Model Runner does.
    """
    weights = [file for file in files if file.media_type in WEIGHT_TYPES]
    if not weights:
        raise PackagingError("no weights are left: flags give every weight file another type")
    kind = next(k for k, media_type in MEDIA_TYPES.items() if media_type == weights[0].media_type)
    paths = [file.path for file in weights]
    notes: tuple[str, ...] = ()
    if kind is FileKind.GGUF:
        notes = _several_models(weights)
        statistics = gguf_statistics(paths, exact=exact)
    elif kind is FileKind.SAFETENSORS:
        statistics = safetensors_statistics(paths, exact=exact, config_json=config_json)
    else:
        statistics = dduf_statistics(paths)
    return statistics, (*notes, *statistics.notes)


def _several_models(weights: Sequence[LayerFile]) -> tuple[str, ...]:
    """Return a note if a directory has several GGUF models, since a config describes only one."""
    models = {
        shard_set(file.path) or file.path: file.filepath
        for file in reversed(weights)
        if LocalFile.of(file).role is Role.WEIGHT
    }
    if len(models) < 2:
        return ()
    names = ", ".join(sorted(shown(name) for name in models.values()))
    return (f"several models in one directory ({names}): the config describes only the first",)


def plan(request: PackageRequest, *, environ: Mapping[str, str] = os.environ) -> Plan:
    """Return the plan of the new model that `request` describes.

    Raises `UsageError` for an invalid request, `PackagingError` with the paths for files that
    cannot be packaged, and `WeightFormatError` for a weight that does not parse.
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
    config_json = next((file.path for file in files if file.path == path / "config.json"), None)
    statistics, weight_notes = weight_statistics(
        files, config_json=config_json, exact=request.preserve
    )
    local = [LocalFile.of(file) for file in files]
    if statistics.format == "safetensors":
        weight_notes = (*weight_notes, *media_notes(local))
    description = None
    if request.format == "cncf" and not request.preserve:
        description = describe(local, statistics.quantization)
    notes = (*named_notes, *notes, *weight_notes)
    result = Plan(files, statistics, created, description, skipped, notes)
    check_document_sizes(result, request)
    return result


def plan_extras(request: PackageRequest, *, environ: Mapping[str, str] = os.environ) -> Plan:
    """Return the plan of the layers, possibly none, that `request` adds to an existing model.

    Raises `UsageError` if it names weights, and the errors of `plan` for its files.
    """
    request.check()
    if request.sources:
        flags = ", ".join(flag for flag, _ in request.sources)
        raise UsageError(f"weights ({flags}) cannot be combined with a model to start from")
    created = None if request.created is None else created_time(request.created, environ)
    files, notes = named_files(request, LayerFiles.of(request, environ))
    return Plan(files, created=created, notes=notes)


def named_files(
    request: PackageRequest, maker: LayerFiles
) -> tuple[tuple[LayerFile, ...], tuple[str, ...]]:
    """Return the layers of --license, --chat-template and --mmproj, and notes about them."""
    files = [maker.at(expanded(path), media_types.DOCKER_LICENSE) for path in request.licenses]
    if request.chat_template is not None:
        files.append(maker.at(expanded(request.chat_template), media_types.DOCKER_CHAT_TEMPLATE))
    if request.mmproj is not None:
        files.append(maker.at(expanded(request.mmproj), media_types.DOCKER_MMPROJ))
    return _joined((), files, request)


def check_added_files(request: PackageRequest) -> None:
    """Check that runtimes can use the GGUF files and the chat template of a planned request.

    The model's GGUF file is no projector. That is a GGUF of the architecture `clip` whose
    embeddings of pictures have the width of the model's, if that is a GGUF file of the request. A
    chat template is UTF-8 and has Jinja tags; if the extra `engine` is installed, its worker
    process also renders it once, within the limits of the server. Raises `PackagingError` and
    `WeightFormatError`.
    """
    if request.gguf is not None:
        _check_weights(expanded(request.gguf))
    if request.mmproj is not None:
        _check_projector(expanded(request.mmproj), request.gguf)
    if request.chat_template is not None:
        _check_template(expanded(request.chat_template))


def _check_weights(path: Path) -> None:
    if gguf_role(min(find_shards(path)), Role.WEIGHT) is Role.PROJECTOR:
        raise PackagingError(
            f"--gguf {shown(path)} is a projector, which no runtime can run alone",
            hint="give it by --mmproj, and the model by --gguf",
        )


def _check_projector(path: Path, gguf: Path | None) -> None:
    header = read_gguf_header(path)
    found = header.metadata.get("general.architecture")
    if found is None or found.value != PROJECTOR_ARCHITECTURE:
        got = "none" if found is None else repr(found.value)
        raise PackagingError(
            f"--mmproj {shown(path)} is not a projector: its architecture is {got}, expected "
            f"{PROJECTOR_ARCHITECTURE!r}",
            hint="use the mmproj file that is published with the model",
        )
    width = projected_width(header)
    if gguf is None or width is None:  # a projector of sound, or of a type that is not known here
        return
    wanted = embedding_width(read_gguf_header(min(find_shards(expanded(gguf)))))
    if wanted is not None and wanted != width:
        raise PackagingError(
            f"--mmproj {shown(path)} does not fit the model: it makes embeddings of width {width},"
            f" {shown(expanded(gguf))} takes {wanted}",
            hint="use the mmproj file that is published with the model",
        )


def _check_template(path: Path) -> None:
    raw, problem = head_of(path, _MAX_TEMPLATE_BYTES + 1), ""
    if len(raw) > _MAX_TEMPLATE_BYTES:
        problem = f"has more than {_MAX_TEMPLATE_BYTES} bytes"
    elif b"{{" not in raw and b"{%" not in raw:
        problem = "is not a Jinja template: it has no {{ … }} and no {% … %}"
    else:
        try:
            _render_once(raw.decode())
        except UnicodeDecodeError:
            problem = "is not UTF-8"
        except ModelpackError as error:
            problem = f"cannot be used: {error}"
    if problem:
        raise PackagingError(f"--chat-template {shown(path)} {problem}")


def _render_once(source: str) -> None:
    try:
        chat_template = load_function("chat_template")
    except ImportError:  # without the extra `engine`
        return
    assert chat_template is not None, "registered by this distribution"
    chat_template(source).render(
        {
            "messages": [{"role": "user", "content": "Hello"}],
            "add_generation_prompt": True,
            "bos_token": "",
            "eos_token": "",
        }
    )


def _joined(
    files: tuple[LayerFile, ...],
    named: tuple[LayerFile, ...] | list[LayerFile],
    request: PackageRequest,
) -> tuple[tuple[LayerFile, ...], tuple[str, ...]]:
    if request.preserve:  # Docker Model Runner keeps repeated files
        return (*files, *named), ()
    kept, notes = without_duplicates(files, named)
    return kept, (*notes, *_collisions(kept))


def _collisions(files: Sequence[LayerFile]) -> list[str]:
    """Return a note for each name that some file systems cannot have beside another.

    Licenses of one name are unpacked under different names.
    """
    taken: dict[str, str] = {}
    directories: dict[str, str] = {}
    pairs = []
    for file in files:
        for parent in PurePosixPath(file.filepath).parents:
            directories.setdefault(folded(str(parent)), str(parent))
        if file.media_type != MEDIA_TYPES[FileKind.LICENSE]:
            pairs.append((taken.setdefault(folded(file.filepath), file.filepath), file.filepath))
    for file in files:
        if (directory := directories.get(folded(file.filepath))) is not None:
            pairs.append((file.filepath, directory))
    return [
        f"{shown(one)} and {shown(other)} are one name where a file system ignores case or how "
        "accents are composed, so the model cannot be unpacked"
        for one, other in pairs
        if one != other
    ]


def _source(request: PackageRequest) -> tuple[str, Path]:
    sources = request.sources
    if not sources:
        raise UsageError(
            "no weights to package: expected a GGUF, a safetensors directory or a DDUF"
        )
    if len(sources) > 1:
        flags = ", ".join(flag for flag, _ in sources)
        raise UsageError(f"{flags} cannot be combined: a model has weights of one format")
    flag, path = sources[0]
    return flag, expanded(path)


def _single(flag: str, path: Path, maker: LayerFiles) -> tuple[LayerFile, ...]:
    status = status_of(path)
    if stat.S_ISDIR(status.st_mode):
        raise PackagingError(
            f"{shown(path)} is a directory, {flag} expects a file",
            hint="use --safetensors-dir for a directory with weights of any format",
        )
    kind = classify(path.name)
    if kind not in WEIGHT_KINDS:
        raise PackagingError(
            f"{shown(path)}: the name does not end in .gguf, .safetensors or .dduf",
            hint="rename it or link to it: the extension must be that of the format",
        )
    shards = (path,) if kind is FileKind.DDUF else find_shards(path)
    return tuple(maker.at(shard, MEDIA_TYPES[kind]) for shard in shards)


def _directory(
    root: Path, request: PackageRequest, maker: LayerFiles
) -> tuple[tuple[LayerFile, ...], tuple[Skipped, ...]]:
    status = status_of(root)
    if not stat.S_ISDIR(status.st_mode):
        raise PackagingError(
            f"{shown(root)} is {kind_of_file(status)}, --safetensors-dir expects a directory",
            hint="use --gguf or --dduf for a file" if stat.S_ISREG(status.st_mode) else None,
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
            f"{shown(root)} has no weights (.gguf, .safetensors, .dduf) among {len(found)} files"
        )
    if len(formats) > 1:
        raise PackagingError(
            f"{shown(root)} has weights of several formats: {', '.join(formats)}",
            hint="package each format as a separate model",
        )


def _check_pickles(root: Path, found: list[Found]) -> None:
    what = "files with extensions of Python pickles"
    pickles = [entry.filepath for entry in found if is_pickle(entry.filepath)]
    if not pickles:  # weights are left out here: their parsers reject pickles
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
