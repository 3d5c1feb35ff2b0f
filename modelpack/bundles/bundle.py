"""Bundle: a model as a directory that a runtime can open, as Docker Model Runner makes it.

Start at `lay_out`: `names` plans the paths, `links` places files, `tar` unpacks archive layers, and
`directory` makes the result appear in one step.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import decode_object, encode
from modelpack.artifacts.model import Model, ModelFile, Role, format_of, preferred_template, role_of
from modelpack.bundles.directory import Folder, Tree, absolute, new_directory
from modelpack.bundles.joined_tensors import JOINED_WEIGHTS, join_tensors
from modelpack.bundles.links import LinkMode, Placement, put
from modelpack.bundles.names import Arrangement, arrange, with_chat_template
from modelpack.bundles.tar import Allowance, TarLimits, extract
from modelpack.errors import StorageFullError, StoreError, UnsupportedError
from modelpack.formats.config_json import CONFIG_JSON
from modelpack.formats.projector import gguf_role, identified
from modelpack.formats.reader import WeightFile
from modelpack.progress import Action, Progress, Stop, silent
from modelpack.storage import Watch

_CONFIG = "config.json"
_MODEL = "model"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_DEFAULT_LIMITS = TarLimits()
# The order of preference if there are several formats and the config names none.
_FORMATS = ("gguf", "safetensors", "dduf")


@dataclass(frozen=True, slots=True)
class BundleFile:
    """A file of a bundle; `path` is relative to its directory, with slashes.

    `digest` is that of the layer, `content` that of the file's bytes. They differ for a file from
    an archive. A file that is joined from several layers has the digest of its bytes.
    """

    path: str
    role: Role
    digest: Digest
    linked: Placement
    content: Digest
    format: str = ""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A directory that a runtime can open. `weight` is the first of several shards.

    `notes` tell the user about files that were renamed or left out.
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
    """Make `directory` a bundle of `model`; `blob_path` returns the file of each blob.

    With `runtime_names`, the chat template of a safetensors model is called `chat_template.jinja`,
    which transformers and vLLM prefer over the one in tokenizer_config.json. Otherwise all files
    keep the model's names.

    Raises `ConflictError` for an existing directory that is not empty, unless `overwrite`: then it
    is replaced, in one step if the system can. A failure leaves everything as it was. Raises
    `UnsafePathError` if a path would leave the directory or two files have the same path,
    `IntegrityError` for an archive beyond its limits, `FormatError` for a damaged archive,
    `UnsupportedError` for a model without weights, `NotFoundError` and `SizeMismatchError` for a
    lost or damaged blob, `StorageFullError` and `StoreError` for errors of the file system.
    """
    watch = watch or Watch(silent, Stop())
    directory = absolute(directory)
    model = identified(model, lambda file: blob_path(file.descriptor))
    arrangement = with_chat_template(arrange(model)) if runtime_names else arrange(model)
    notes = list(arrangement.notes)
    with _map_os_errors(directory), new_directory(directory, overwrite=overwrite) as folder:
        files: list[BundleFile] = []
        with folder.make(_MODEL) as inside:
            tree = Tree(inside)
            written = arrangement.files
            if arrangement.tensors:
                written = tuple(placed for placed in written if placed.path != CONFIG_JSON)
                files += _join(arrangement, blob_path, tree, watch, notes)
            for placed in written:
                watch.stop.check()
                path, blob = placed.path, placed.file.descriptor
                with tree.place(path, f"layer {blob.digest.short}") as (into, name):
                    linked = put(placed.file, blob_path(blob), into, name, links, watch, notes)
                watch.report(Progress(Action.UNPACK, path, blob.digest, blob.size, blob.size))
                files.append(_bundle_file(path, placed.file, linked, blob.digest))
            sizes = [archive.descriptor.size for archive in arrangement.archives]
            allowance = Allowance(limits, sizes, others=len(tree))
            for archive in arrangement.archives:
                what = f"layer {archive.filepath or archive.descriptor.digest.short}"
                blob_file = blob_path(archive.descriptor)
                for member, content in extract(archive, blob_file, tree, allowance, watch, what):
                    file = _bundle_file(member, archive, Placement.EXTRACTED, content)
                    if file.format == "gguf":
                        file = replace(file, role=_role_of_extracted(inside, member, file.role))
                    files.append(file)
            folder.check_holds(_MODEL, inside)
        with os.fdopen(folder.create(_CONFIG), "wb") as stream:
            stream.write(runtime_config(model.config))
        bundle = _bundle(directory, files, model.config, notes)
    for note in bundle.notes:
        watch.report(Progress(Action.NOTE, str(directory), message=note))
    return bundle


def _join(
    arrangement: Arrangement,
    blob_path: Callable[[Descriptor], Path],
    tree: Tree,
    watch: Watch,
    notes: list[str],
) -> list[BundleFile]:
    """Write the joined weights of tensor layers and the config.json that describes them."""
    configs = [placed.file for placed in arrangement.files if placed.path == CONFIG_JSON]
    joined = join_tensors(arrangement.tensors, configs[0] if configs else None, blob_path)
    notes += joined.notes
    files = []
    for path, role, kind, pieces in (
        (JOINED_WEIGHTS, Role.WEIGHT, "safetensors", joined.pieces(watch)),
        (CONFIG_JSON, Role.CONFIG, "", iter([joined.config])),
    ):
        hasher = hashlib.sha256()
        with (
            tree.place(path, "the joined tensors") as (into, name),
            os.fdopen(into.create(name), "wb") as stream,
        ):
            for piece in pieces:
                stream.write(piece)
                hasher.update(piece)
        digest = Digest.of_hasher(hasher)
        place = f"{_MODEL}/{path}"
        files.append(BundleFile(place, role, digest, Placement.EXTRACTED, digest, kind))
    return files


def runtime_config(config: ModelConfig) -> bytes:
    """Return the bytes of a bundle's `config.json`, as Docker Model Runner writes them.

    These are the inner `config` object of a Docker config, or all of a CNCF config, and a newline.
    """
    value = decode_object(config.encode(), _CONFIG)
    if not config.is_cncf:
        return encode(value["config"]) + b"\n"
    if "family" not in config.cncf_descriptor:  # added when packaging; not in the model's config
        value["descriptor"].pop("family", None)
    return encode(value) + b"\n"


def _bundle_file(path: str, layer: ModelFile, linked: Placement, content: Digest) -> BundleFile:
    extracted = linked is Placement.EXTRACTED
    role = role_of(layer.media_type, path) if extracted else layer.role
    kind = format_of(layer.media_type, path) if extracted else layer.format
    return BundleFile(f"{_MODEL}/{path}", role, layer.descriptor.digest, linked, content, kind)


def _role_of_extracted(inside: Folder, path: str, otherwise: Role) -> Role:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=inside.fd)
    with os.fdopen(fd, "rb", buffering=0) as stream:
        return gguf_role(WeightFile(stream, path=path, size=os.fstat(fd).st_size), otherwise)


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
            hint="run `modelpack config` to check whether this ModelKit refers to another one"
            if config.media_type == media_types.KITOPS_CONFIG
            else "run `modelpack inspect` to list its files",
        )
    at = preferred_template([(file.role, file.path.removeprefix(f"{_MODEL}/")) for file in files])
    template = None if at is None else files[at]
    projectors = [file for file in files if file.role is Role.PROJECTOR]
    mmproj = min(projectors, key=lambda file: file.path.count("/"), default=None)
    for chosen in (template, mmproj):
        if chosen is not None:
            _note_choice(chosen, files, notes)
    return Bundle(
        directory,
        tuple(files),
        directory / min(weights, key=_lookup_order).path,
        directory / template.path if template else None,
        directory / mmproj.path if mmproj else None,
        directory / _CONFIG,
        tuple(notes),
    )


def _note_choice(chosen: BundleFile, files: Sequence[BundleFile], notes: list[str]) -> None:
    """Add a note if the model has other files of the role of `chosen`."""
    found = [file for file in files if file.role is chosen.role]
    if len({file.digest for file in found}) > 1:
        role = chosen.role.replace("_", " ")
        notes.append(f"{chosen.path} is used as the {role}; the model has {len(found)}")


def _lookup_order(file: BundleFile) -> tuple[bool, bool, tuple[str, ...]]:
    """Sort as Docker Model Runner looks for weights: top level first, then by path."""
    parts = PurePosixPath(file.path).parts[1:]
    return parts[-1].startswith("."), len(parts) > 1, parts


@contextmanager
def _map_os_errors(directory: Path) -> Iterator[None]:
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
