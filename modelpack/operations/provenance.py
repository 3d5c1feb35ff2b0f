"""Record how a model was packaged, as SLSA provenance attached to it, and read it again.

The inputs are the packaged files, the model that it starts from, and the commit that the files are
of: that of a git work tree in which they are unchanged, or of a snapshot in the Hugging Face cache.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.reference import Reference
from modelpack.builder.files import Found, LayerFile, expanded, walk
from modelpack.builder.request import PackageRequest
from modelpack.builder.times import SOURCE_DATE_EPOCH, source_time
from modelpack.errors import (
    FormatError,
    IntegrityError,
    InvalidReferenceError,
    NotFoundError,
    PackagingError,
)
from modelpack.formats.model_card import hub_url
from modelpack.operations.remote import RemoteOptions, fetch_referenced_manifest, open_repository
from modelpack.progress import Stop
from modelpack.storage import ReferrerSource, Watch, read_blob, watching
from modelpack.store.file_copy import hash_file
from modelpack.store.layout import LayoutStore
from modelpack.trust.keys import PrivateKey
from modelpack.trust.provenance import (
    GIT_COMMIT,
    IN_TOTO_PREDICATE,
    SLSA_PROVENANCE,
    Provenance,
    Resource,
    statement_manifest,
    tool_versions,
    without_secrets,
)
from modelpack.trust.sigstore import (
    BUNDLE_TYPES,
    PAYLOAD_TYPE,
    PREDICATE_TYPE,
    Bundle,
    Statement,
    Subject,
)

_HUB_CACHE: Final = re.compile(r"models--([\w.-]+?)--([\w.-]+)\Z")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}\Z")
_SCP: Final = re.compile(r"([\w.-]+@)?([\w.-]+):(?!//)(.+)\Z")
_GIT_SECONDS: Final = 600  # with Git LFS, comparing reads the files
_MAX_READ: Final = 20


@dataclass(frozen=True, slots=True)
class ProvenanceOptions:
    """How to record the provenance of a model: signed by `key`, otherwise without a signature.

    `source` is the commit that the files are of, by default the one that is found. `parameters` are
    those of steps before packaging, such as a quantisation, with the versions of their `tools`; the
    files of the directory `inputs` are then the inputs, and not the files that are packaged.
    `origins` are the objects that the files were downloaded from.
    """

    key: PrivateKey | None = None
    source: Resource | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tools: Mapping[str, str] = field(default_factory=dict, hash=False)
    inputs: Path | None = None
    origins: Sequence[Resource] = ()


@dataclass(frozen=True, slots=True)
class Packaging:
    """What a model was packaged from: the request, its files with their digests, and its base."""

    reference: Reference
    request: PackageRequest
    files: Sequence[LayerFile]
    digests: Sequence[Digest]
    base: Resource | None = None


def attach_provenance(
    options: ProvenanceOptions,
    made: Packaging,
    manifest: Manifest,
    store: LayoutStore,
    watch: Watch,
) -> Digest:
    """Attach the provenance of a model in `store`; return the digest of the referrer.

    Raises `UsageError` for a SOURCE_DATE_EPOCH that is no number, and `PackagingError` if `inputs`
    cannot be read.
    """
    from modelpack.operations.signatures import attach_statement, put  # imports requests

    provenance = provenance_of(options, made, manifest, os.environ, watch)
    subject = manifest.descriptor
    statement = Statement(
        (Subject(subject.digest, made.reference.name),), SLSA_PROVENANCE, provenance.to_json()
    )
    if options.key is not None:
        return attach_statement(store, subject, statement, options.key, watch)
    attached, blobs = statement_manifest(statement, subject)
    put(store, attached, blobs, None, watch)
    return attached.digest


def provenance_of(
    options: ProvenanceOptions,
    made: Packaging,
    manifest: Manifest,
    environ: Mapping[str, str],
    watch: Watch,
) -> Provenance:
    """Return the provenance of a packaged model."""
    paths = [file.path for file in made.files]
    found = [
        Resource.of(digest, name=file.filepath)
        for file, digest in zip(made.files, made.digests, strict=True)
    ]
    if options.inputs is not None:
        root = expanded(options.inputs)
        entries = [one for one in walk(root, follow_symlinks=True) if isinstance(one, Found)]
        paths = [one.path for one in entries]
        found = [_hashed(one, watch) for one in entries]
    source = options.source or (found_source(paths) if paths else None)
    base = made.base or _base_of(manifest)
    origin = list(_origin(manifest)) if made.base is not None else []
    return Provenance(
        parameters={**_parameters(made.request, base), **options.parameters},
        dependencies=tuple(one for one in (source, base, *origin, *options.origins, *found) if one),
        versions=tool_versions(**options.tools),
        finished=source_time(environ) if environ.get(SOURCE_DATE_EPOCH) else None,
    )


def _parameters(request: PackageRequest, base: Resource | None) -> Mapping[str, Any]:
    """Return the options of the request; files by their names, since paths are the machine's."""
    values: dict[str, Any] = {
        "gguf": request.gguf and request.gguf.name,
        "safetensorsDir": bool(request.safetensors_dir),
        "dduf": request.dduf and request.dduf.name,
        "from": str(base) if base is not None else "",
        "licenses": [path.name for path in request.licenses],
        "chatTemplate": request.chat_template and request.chat_template.name,
        "mmproj": request.mmproj and request.mmproj.name,
        "contextSize": request.context_size,
        "format": request.format,
        "annotations": dict(sorted(request.annotations.items())),
        "created": str(request.created) if request.created is not None else None,
        "preserve": request.preserve,
        "followSymlinks": request.follow_symlinks,
        "allowPickle": request.allow_pickle,
    }
    return {key: value for key, value in values.items() if value not in (None, False, "", [], {})}


def _hashed(entry: Found, watch: Watch) -> Resource:
    try:
        digest = hash_file(entry.path, seen=lambda _: watch.stop.check())
    except OSError as error:
        raise PackagingError(f"{entry.path}: cannot be read: {error.strerror}") from error
    return Resource.of(digest, name=entry.filepath)


def _base_of(manifest: Manifest) -> Resource | None:
    """Return the model that an adapter or a drafter is for."""
    digest = manifest.annotations.get(media_types.BASE_DIGEST)
    if digest is None or manifest.artifact_type not in (media_types.ADAPTER, media_types.DRAFTER):
        return None
    uri = ""
    with suppress(InvalidReferenceError):  # without a name, or on the hub
        uri = f"oci://{Reference.parse(manifest.annotations.get(media_types.BASE_NAME, '')).name}"
    return Resource.of(Digest.parse(digest), name="base", uri=uri)


def _origin(manifest: Manifest) -> Iterator[Resource]:
    """Yield the commit of the hub that a model which was started from came from."""
    page = manifest.annotations.get(media_types.SOURCE, "")
    commit = manifest.annotations.get(media_types.REVISION, "")
    if page.startswith("https://") and _COMMIT.match(commit):
        yield Resource("origin", without_secrets(page), {GIT_COMMIT: commit})


def found_source(paths: Sequence[Path]) -> Resource | None:
    """Return the commit that all files are of, or None if none is found.

    In a git work tree, the files must be tracked and equal to those of the commit.
    """
    absolute = [Path(os.path.abspath(path)) for path in paths]
    return _hub_snapshot(absolute) or _git_commit(absolute)


def _hub_snapshot(paths: Sequence[Path]) -> Resource | None:
    snapshots = {_snapshot_of(path) for path in paths}
    found = snapshots.pop() if len(snapshots) == 1 else None
    if found is None:
        return None
    repository, commit = found
    return Resource("source", hub_url(repository), {GIT_COMMIT: commit})


def _snapshot_of(path: Path) -> tuple[str, str] | None:
    parts = path.parts
    for at in range(len(parts) - 2, 0, -1):
        match = _HUB_CACHE.match(parts[at - 1])
        if match and parts[at] == "snapshots" and _COMMIT.match(parts[at + 1]):
            return f"{match[1]}/{match[2]}", parts[at + 1]
    return None


def _git_commit(paths: Sequence[Path]) -> Resource | None:
    directory = paths[0].parent
    commit = _git(directory, "rev-parse", "--verify", "HEAD")
    if commit is None or not _COMMIT.match(commit):
        return None
    names = [str(path) for path in paths]
    if _git(directory, "ls-files", "--error-unmatch", "--", *names) is None:
        return None
    if _git(directory, "diff", "--quiet", "HEAD", "--", *names) is None:
        return None
    remote = _git(directory, "config", "--get", "remote.origin.url") or ""
    return Resource("source", _git_uri(remote), {GIT_COMMIT: commit})


def _git_uri(remote: str) -> str:
    """Return the address of a git remote as a URI; that of a directory is left out."""
    match = _SCP.match(remote)
    if match:
        remote = f"ssh://{match[1] or ''}{match[2]}/{match[3].lstrip('/')}"
    if not re.match(r"(?:https?|ssh|git)://", remote):
        return ""
    return f"git+{without_secrets(remote)}"


def _git(directory: Path, *arguments: str) -> str | None:
    """Return the output of git, or None if it fails or is not installed."""
    command = ["git", "-C", str(directory), "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_SECONDS,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_LITERAL_PATHSPECS": "1"},
        )  # fmt: skip
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@dataclass(frozen=True, slots=True)
class Recorded:
    """A provenance that is attached to a model, not verified; `is_signed` if it has a signature."""

    provenance: Provenance
    referrer: Descriptor
    is_signed: bool
    predicate: Mapping[str, Any] = field(hash=False)


def read_provenance(
    reference: str | Reference,
    *,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    stop: Stop | None = None,
) -> tuple[Recorded, ...]:
    """Return the provenance of the model `reference` in its registry or, with `store`, there.

    No signature is verified. Raises `NotFoundError` if there is no such model.
    """
    if store is not None:
        return recorded_provenance(store, store.resolve(str(reference)).digest)
    where = Reference.parse(reference) if isinstance(reference, str) else reference
    with open_repository(where, remote or RemoteOptions(), watching(None, stop)) as repository:
        descriptor, _ = fetch_referenced_manifest(repository, where)
        return recorded_provenance(repository, descriptor.digest)


def recorded_provenance(source: ReferrerSource, subject: Digest) -> tuple[Recorded, ...]:
    """Return the provenance that is attached to the manifest `subject`; no signature is verified.

    Statements that do not parse, or that are about another model, are left out.
    """
    attached = [
        one
        for one in source.referrers(subject)
        if SLSA_PROVENANCE
        in (one.annotations.get(PREDICATE_TYPE), one.annotations.get(IN_TOTO_PREDICATE))
    ]
    found = (_recorded(source, one, subject) for one in islice(attached, _MAX_READ))
    return tuple(one for one in found if one is not None)


def _recorded(source: ReferrerSource, referrer: Descriptor, subject: Digest) -> Recorded | None:
    what = f"provenance {referrer.digest.short}"
    try:
        [layer] = Manifest.parse(source.fetch_manifest(referrer), what).layers
        raw = read_blob(source, layer)
        is_signed = layer.media_type in BUNDLE_TYPES
        if is_signed:
            statement = Bundle.parse(raw, what).statement
        elif layer.media_type == PAYLOAD_TYPE:
            statement = Statement.parse(raw, what)
        else:
            return None
        if statement.predicate_type != SLSA_PROVENANCE or not statement.is_about(subject):
            return None
        provenance = Provenance.parse(statement.predicate, what)
    except (FormatError, IntegrityError, NotFoundError, ValueError):
        return None
    return Recorded(provenance, referrer, is_signed, statement.predicate)
