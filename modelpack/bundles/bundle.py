"""A directory that appears under its name complete, or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import decode_object, encode
from modelpack.artifacts.model import (
    Model,
    ModelFile,
    Role,
    format_of,
    preferred_template,
    role_of,
)
from modelpack.bundles.directory import DIRECTORY_MODE, Folder, Tree, is_directory
from modelpack.bundles.links import LinkMode as LinkMode
from modelpack.bundles.links import Placement, put, write_all
from modelpack.bundles.names import arrange, with_chat_template
from modelpack.bundles.tar import extract
from modelpack.bundles.tar_reader import Allowance
from modelpack.bundles.tar_reader import TarLimits as TarLimits
from modelpack.errors import (
    ConflictError,
    StorageFullError,
    StoreError,
    UnsupportedError,
    UsageError,
)
from modelpack.progress import Action, Progress, Stop, silent
from modelpack.storage import Watch

_TAKEN = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR})
# (function, flag) that exchange two names in one step.
_EXCHANGE = {"linux": ("renameat2", 2), "darwin": ("renameatx_np", 2)}


def absolute(directory: Path) -> Path:
    """Return the absolute path, links above the last component resolved.

    Raises `UsageError` for the root of the file system.
    """
    if directory.name in ("", ".."):
        directory = Path(os.path.realpath(directory))
    if not directory.name:
        raise UsageError(f"{directory} cannot be replaced", hint="name a new directory")
    return Path(os.path.realpath(directory.parent)) / directory.name


@contextmanager
def new_directory(directory: Path, *, overwrite: bool) -> Iterator[Folder]:
    """Give an empty directory that is renamed to `directory` when the block is left well.

    Left by an exception, it is removed with all that is in it, and so are directories above that
    were made for it. An existing directory that is not empty is only replaced if `overwrite`; it
    is removed once the new one stands in its place. Raises `ConflictError`, `UsageError`.
    """
    directory = absolute(directory)
    missing = _missing(directory.parent)
    temporary = f".modelpack-{secrets.token_hex(8)}.partial"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with Folder.open(directory.parent) as parent:
            _check_free(parent, directory, overwrite=overwrite)
            try:
                with parent.make(temporary, 0o700) as folder:
                    yield folder
                    os.fchmod(folder.fd, DIRECTORY_MODE)
                replaced = _publish(parent, temporary, directory, overwrite=overwrite)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True, dir_fd=parent.fd)
                raise
            if replaced:
                shutil.rmtree(temporary, dir_fd=parent.fd)
    except BaseException:
        for path in missing:
            with suppress(OSError):  # not made after all, or somebody else uses it by now
                os.rmdir(path)
        raise


def _missing(path: Path) -> list[Path]:
    """Return which of the path and its parents are not there, the deepest first."""
    return list(takewhile(lambda parent: not parent.exists(), (path, *path.parents)))


def _check_free(parent: Folder, directory: Path, *, overwrite: bool) -> None:
    status = parent.status(directory.name)
    if status is None:
        return
    if not is_directory(status):
        raise ConflictError(
            f"{directory} is there already, and it is not a directory",
            hint="name a new directory; for a symbolic link, the directory that it leads to",
        )
    if os.path.samestat(status, os.stat(".")):
        raise UsageError(
            f"{directory} is the current directory, which a new one would replace",
            hint="name a directory inside it, or change to another one first",
        )
    with parent.enter(directory.name) as existing:
        if os.listdir(existing.fd) and not overwrite:
            raise _taken(directory)


def _publish(parent: Folder, temporary: str, directory: Path, *, overwrite: bool) -> bool:
    """Rename; return whether what was there before is now at `temporary`."""
    try:
        # An empty directory is replaced by this.
        _rename(parent, temporary, directory.name)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        status = parent.status(directory.name)
        if not overwrite or status is None or not is_directory(status):
            raise _taken(directory) from error
        _exchange(parent, temporary, directory.name)
        return True
    return False


def _exchange(parent: Folder, temporary: str, name: str) -> None:
    """Swap the two names, in one step where the system can."""
    if _exchanged(parent, temporary, name):
        return
    aside = f"{temporary}.old"
    _rename(parent, name, aside)
    try:
        _rename(parent, temporary, name)
    except BaseException:
        _rename(parent, aside, name)
        raise
    _rename(parent, aside, temporary)


def _exchanged(parent: Folder, one: str, other: str) -> bool:
    import ctypes

    function, flag = _EXCHANGE.get(sys.platform, ("", 0))
    library = ctypes.CDLL(None, use_errno=True)
    if not function or not hasattr(library, function):
        return False
    call = getattr(library, function)
    failed = call(parent.fd, os.fsencode(one), parent.fd, os.fsencode(other), flag)
    return not failed


def _rename(parent: Folder, old: str, new: str) -> None:
    os.rename(old, new, src_dir_fd=parent.fd, dst_dir_fd=parent.fd)


def _taken(directory: Path) -> ConflictError:
    return ConflictError(
        f"{directory} is there already and not empty",
        hint="name a new directory, or ask to replace this one",
    )


_CONFIG = "config.json"
_MODEL = "model"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_DEFAULT_LIMITS = TarLimits()
# Which weights are run where there are several kinds and the config names none.
_FORMATS = ("gguf", "safetensors", "dduf")


@dataclass(frozen=True, slots=True)
class BundleFile:
    """A file of a bundle; `path` is relative to its directory, with slashes.

    `digest` is that of the layer, `content` that of the file's bytes; they differ for a file that
    was in an archive.
    """

    path: str
    role: Role
    digest: Digest
    linked: Placement
    content: Digest
    format: str = ""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A directory that a runtime can open. `weight` is the first shard where there are several.

    `notes` say what a user might miss: a second chat template, a renamed license.
    """

    directory: Path
    files: tuple[BundleFile, ...]
    weight: Path
    chat_template: Path | None
    mmproj: Path | None
    config: Path
    notes: tuple[str, ...] = ()


def lay_out(
    model: Model,
    blob_path: Callable[[Descriptor], Path],
    directory: Path,
    *,
    links: LinkMode = LinkMode.AUTO,
    limits: TarLimits = _DEFAULT_LIMITS,
    watch: Watch | None = None,
    overwrite: bool = False,
    runtime_names: bool = True,
) -> Bundle:
    """Make `directory` the bundle of `model`, whose blobs are where `blob_path` says.

    With `runtime_names`, the chat template of a safetensors model is `chat_template.jinja`, the
    name that transformers and vLLM prefer to what tokenizer_config.json says, whatever the model
    calls it. Without, all files have the names that the model gives them.

    A directory that is there and not empty is refused (`ConflictError`) unless `overwrite`: then
    it is replaced, in one step where the system can. On failure there is nothing new, and what was
    there before stands. Raises `UnsafePathError` if the model tries to leave the directory or puts
    two files in one place, `IntegrityError` for an archive beyond its limits, `FormatError` for a
    damaged one, `UnsupportedError` if there is no weight, `NotFoundError` and `SizeMismatchError`
    if the store lost a blob, `StorageFullError` and `StoreError` for the file system.
    """
    watch = watch or Watch(silent, Stop())
    directory = absolute(directory)
    arrangement = with_chat_template(arrange(model)) if runtime_names else arrange(model)
    notes = list(arrangement.notes)
    with _translating(directory), new_directory(directory, overwrite=overwrite) as folder:
        files: list[BundleFile] = []
        with folder.make(_MODEL) as inside:
            tree = Tree(inside)
            for placed in arrangement.files:
                linked = _place(placed.path, placed.file, tree, blob_path, links, watch, notes)
                content = placed.file.descriptor.digest
                files.append(_bundle_file(placed.path, placed.file, linked, content))
            sizes = [archive.descriptor.size for archive in arrangement.archives]
            allowance = Allowance(limits, sizes, others=len(tree))
            for archive in arrangement.archives:
                what = f"layer {archive.filepath or archive.descriptor.digest.short}"
                path = blob_path(archive.descriptor)
                for member, content in extract(archive, path, tree, allowance, watch, what):
                    files.append(_bundle_file(member, archive, Placement.EXTRACTED, content))
            folder.check_holds(_MODEL, inside)
        _write(folder, _CONFIG, runtime_config(model.config))
        bundle = _bundle(directory, files, model.config, notes)
    for note in bundle.notes:
        watch.report(Progress(Action.NOTE, str(directory), message=note))
    return bundle


def runtime_config(config: ModelConfig) -> bytes:
    """Return the bytes of a bundle's `config.json`, as Docker Model Runner writes them.

    The inner `config` object of a Docker config, all of a CNCF config; a newline at the end.
    """
    value = decode_object(config.encode(), _CONFIG)
    if not config.is_cncf:
        return encode(value["config"]) + b"\n"
    if "family" not in config.cncf_descriptor:  # ours, when we package; not in the model's config
        value["descriptor"].pop("family", None)
    return encode(value) + b"\n"


def _place(
    path: str,
    file: ModelFile,
    tree: Tree,
    blob_path: Callable[[Descriptor], Path],
    links: LinkMode,
    watch: Watch,
    notes: list[str],
) -> Placement:
    watch.stop.check()
    digest, size = file.descriptor.digest, file.descriptor.size
    with tree.place(path, f"layer {digest.short}") as (folder, name):
        linked = put(file, blob_path(file.descriptor), folder, name, links, watch, notes)
    watch.report(Progress(Action.UNPACK, path, digest, size, size))
    return linked


def _bundle_file(path: str, layer: ModelFile, linked: Placement, content: Digest) -> BundleFile:
    extracted = linked is Placement.EXTRACTED
    role = role_of(layer.media_type, path) if extracted else layer.role
    kind = format_of(layer.media_type, path) if extracted else layer.format
    return BundleFile(f"{_MODEL}/{path}", role, layer.descriptor.digest, linked, content, kind)


def _bundle(
    directory: Path, files: Sequence[BundleFile], config: ModelConfig, notes: list[str]
) -> Bundle:
    weights = [file for file in files if file.role is Role.WEIGHT]
    for kind in (config.format.lower().replace("diffusers", "dduf"), *_FORMATS):
        of_kind = [file for file in weights if file.format == kind]
        if kind and of_kind:
            weights = of_kind
            break
    if not weights:
        raise UnsupportedError(
            "has no weights to run",
            path=str(directory),
            hint="a ModelKit may name another one for its model: `modelpack config` shows which"
            if config.media_type == media_types.KITOPS_CONFIG
            else "`modelpack inspect` lists its files",
        )
    template, mmproj = _template(files, notes), _projector(files, notes)
    return Bundle(
        directory,
        tuple(files),
        directory / min(weights, key=_lookup_order).path,
        directory / template.path if template else None,
        directory / mmproj.path if mmproj else None,
        directory / _CONFIG,
        tuple(notes),
    )


def _template(files: Sequence[BundleFile], notes: list[str]) -> BundleFile | None:
    found = [file for file in files if file.role is Role.CHAT_TEMPLATE]
    at = preferred_template([(file.role, file.path.removeprefix(f"{_MODEL}/")) for file in files])
    if at is None:
        return None
    return _noted(files[at], found, notes)


def _projector(files: Sequence[BundleFile], notes: list[str]) -> BundleFile | None:
    found = [file for file in files if file.role is Role.PROJECTOR]
    if not found:
        return None
    return _noted(min(found, key=lambda file: file.path.count("/")), found, notes)


def _noted(chosen: BundleFile, found: Sequence[BundleFile], notes: list[str]) -> BundleFile:
    if len({file.digest for file in found}) > 1:
        role = chosen.role.replace("_", " ")
        notes.append(f"{chosen.path} is the {role} of {len(found)} to be used")
    return chosen


def _lookup_order(file: BundleFile) -> tuple[bool, bool, tuple[str, ...]]:
    """Sort as Docker Model Runner looks for weights: top level first, then by path."""
    parts = PurePosixPath(file.path).parts[1:]
    return parts[-1].startswith("."), len(parts) > 1, parts


def _write(folder: Folder, name: str, content: bytes) -> None:
    fd = folder.create(name)
    try:
        write_all(fd, content)
    finally:
        os.close(fd)


@contextmanager
def _translating(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in _FULL:
            raise StorageFullError(
                f"cannot lay out {directory}: {why}",
                hint="free some space and run the same command again",
            ) from error
        raise StoreError(f"cannot lay out {directory}: {why}") from error
