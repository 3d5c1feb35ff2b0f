"""OpenSSF model signing 1.0: a statement over the digests of a model's files.

A layer of a model is a file, so the statement is compared with the digests in the manifest, which
the registry client or the store has verified; no file is read again. Only digests by BLAKE2b or
BLAKE3, and those of parts of a file (shards), need the file itself.

The format covers only files. A model also has a config, annotations, and types and an order of its
layers. Statements of Modelpack therefore also name the manifest, in an annotation of the subject
that other verifiers ignore. A statement without it is accepted only for a model whose other
parts cannot change how it runs, see `uncovered`.
Sources: ossf/model-signing-spec, spec/v1.0.md, algorithm-registry.md and schemas/v1.0 (the
predicate has no further fields); in-toto/attestation, spec/v1/resource_descriptor.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.model import Model, Role, format_of, role_of
from modelpack.bundles.names import arrange
from modelpack.errors import FormatError, IntegrityError, UnsupportedError
from modelpack.storage import BlobReader, Source, fill
from modelpack.trust.sigstore import MODEL_SIGNING, Statement, Subject

#: The annotation of the subject that holds the digest of the manifest. Earlier statements have it
#: as a field of the predicate.
MANIFEST: Final = "dev.modelpack.manifest"
#: Names at the root of a model that signers leave out. (Specification, 6.2)
_IGNORED: Final = frozenset((".git", ".gitattributes", ".github", ".gitignore"))
_SERIALIZATION: Final = {
    "method": "files",
    "hash_type": "sha256",
    "allow_symlinks": False,
    "ignore_paths": [],
}
#: The suffix of signatures that are files of the model. (Specification, 9)
_SIGNATURE: Final = ".sig"
# OpenSSF's own tool gives this name to the file of a model that is not a directory.
_ONE_FILE: Final = "."
_BYTES: Final = {"sha256": 32, "blake2b": 64, "blake3": 32}
_CHUNK: Final = 1024 * 1024
# Annotations of a manifest that describe a model and do not change how it runs.
_DESCRIPTIVE: Final = frozenset(
    f"org.opencontainers.image.{name}"
    for name in (
        *("authors", "created", "description", "documentation", "licenses", "revision"),
        *("source", "title", "url", "vendor", "version"),
    )
)
# If several files have one of these roles, a runtime may use the first.
_ORDERED: Final = (Role.WEIGHT, Role.PROJECTOR, Role.CHAT_TEMPLATE)
# A runtime finds the files of these roles wherever they are.
_FOUND_BY_ROLE: Final = (*_ORDERED, Role.ADAPTER)


def files_of(model: Model) -> Mapping[str, Descriptor]:
    """Return the model's files by their path in a bundle.

    Raises `UnsupportedError` for archives, tensors and digests other than SHA-256.
    """
    arrangement = arrange(model)
    what = str(model.reference or model.digest)
    if arrangement.archives or arrangement.tensors:
        kind = "archive" if arrangement.archives else "tensor"
        raise UnsupportedError(
            f"has {kind} layers, whose files have no digests in the manifest",
            path=what,
            hint="sign the manifest instead: omit --format model-signing",
        )
    files = {placed.path: placed.file.descriptor for placed in arrangement.files}
    for path, descriptor in files.items():
        if (algorithm := descriptor.digest.algorithm) != "sha256":
            raise UnsupportedError(f"{path} has a {algorithm} digest, expected sha256", path=what)
    return files


def model_statement(model: Model, name: str) -> Statement:
    """Return the statement over the files and the manifest of `model`, called `name` in it."""
    files = files_of(model)
    resources = [
        {"name": path, "algorithm": "sha256", "digest": files[path].digest.encoded}
        for path in sorted(files)
    ]
    root = Digest.of(b"".join(bytes.fromhex(one["digest"]) for one in resources))
    subject = Subject(root, name, {MANIFEST: str(model.digest)})
    predicate = {"serialization": _SERIALIZATION, "resources": resources}
    return Statement((subject,), MODEL_SIGNING, predicate)


def names_manifest(statement: Statement) -> bool:
    """Return whether the statement names the manifest in addition to the files."""
    return bool(_manifests(statement))


def _manifests(statement: Statement) -> list[Any]:
    places = (statement.predicate, *(one.annotations for one in statement.subjects))
    return [place[MANIFEST] for place in places if MANIFEST in place]


def check_model(
    statement: Statement,
    model: Model,
    contents: Source | None = None,
    *,
    signature: Digest | None = None,
) -> None:
    """Raise `IntegrityError` unless the statement is about `model` and covers all of it.

    It must list exactly the model's files, but for those that its signer ignored and a file .sig
    with the digest `signature`, the bundle that contains the statement. If it names a manifest,
    that must be the model's; otherwise the model must have no `uncovered` parts, and ignored files
    must not change how it runs. Digests that do not follow from the manifest are computed from
    `contents`; without it, `UnsupportedError` is raised for them. Raises `FormatError` for a
    statement that does not follow the format, or whose digest is not that of the listed files.
    """
    what = f"model signature of {model.reference or model.digest}"
    named = _manifests(statement)
    if other := [one for one in named if one != str(model.digest)]:
        raise IntegrityError(f"{what}: signs {other[0]!r}, another manifest")
    listed = _Resources.parse(statement, what)
    # A bundle may have other fields, so under another name it could be a configuration.
    files = {
        path: one
        for path, one in files_of(model).items()
        if one.digest != signature or not path.endswith(_SIGNATURE)
    }
    if len(files) == 1 and listed.is_of_one_file:
        files = {_ONE_FILE: next(iter(files.values()))}
    wrong, absent, whole = [], set(), []
    left = set(listed.digests)
    for path, descriptor in files.items():
        count = listed.count(descriptor.size)
        ranges = () if count > len(listed.digests) else listed.ranges(path, descriptor.size)
        present = left.intersection(name for name, _, _ in ranges)
        left -= present
        if not present:
            absent.add(path)
        elif len(present) < count:
            wrong.append(path)
        else:
            whole.append((path, descriptor, ranges))
    ignored = _ignored(absent, listed.ignored)
    if listed.shard_size:  # empty files have no shards
        ignored |= {path for path in absent if not files[path].size}
    wrong += [*(absent - ignored), *left]
    if not wrong:  # before files are read
        differs = _reader(listed, contents, what)
        wrong = [path for path, descriptor, ranges in whole if differs(descriptor, ranges)]
    if wrong:
        raise IntegrityError(f"{what}: signs other files: {', '.join(sorted(wrong)[:8])}")
    if not named and (parts := _running(ignored, model) + uncovered(model)):
        raise IntegrityError(
            f"{what}: signs only the files, not other parts of the model: {', '.join(parts[:8])}",
            hint="sign the manifest: `modelpack sign`",
        )


_Ranges = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class _Resources:
    """The signed digests by name; `shard_size` is 0 if they are of whole files."""

    digests: Mapping[str, bytes]
    algorithm: str
    shard_size: int
    ignored: tuple[str, ...]

    @classmethod
    def parse(cls, statement: Statement, what: str) -> _Resources:
        """Return the resources that a statement lists; raise `FormatError`."""
        value: Any = statement.predicate.get("serialization")
        if not isinstance(value, dict) or value.get("method") not in ("files", "shards"):
            raise FormatError("does not have the serialization 'files' or 'shards'", path=what)
        algorithm, size = value.get("hash_type"), value.get("shard_size", 0)
        if not isinstance(algorithm, str) or algorithm not in _BYTES:
            raise FormatError(
                f"has the hash {algorithm!r}, expected sha256, blake2b or blake3", path=what
            )
        if isinstance(size, float) and size.is_integer():  # as OpenSSF's own tool writes it
            size = int(size)
        if type(size) is not int or size < 0 or (value["method"] == "shards") != (size > 0):
            raise FormatError(f"has the shard size {size!r} with {value['method']!r}", path=what)
        # OpenSSF's own tool appends the size of the shards to the name of the algorithm.
        names = (algorithm, f"{algorithm}-sharded-{size}") if size else (algorithm,)
        resources = statement.predicate.get("resources")
        digests: dict[str, bytes] = {}
        try:
            for one in resources if isinstance(resources, list) else []:
                if one["algorithm"] not in names or not re.fullmatch("[0-9a-f]+", one["digest"]):
                    raise ValueError
                digests[str(one["name"])] = digest = bytes.fromhex(one["digest"])
                if len(digest) != _BYTES[algorithm]:
                    raise ValueError
        except (KeyError, TypeError, ValueError):
            raise FormatError(
                f"lists resources that are not files with {algorithm} digests", path=what
            ) from None
        if not digests or len(digests) != len(resources or ()):
            raise FormatError("lists no files, or the same file twice", path=what)
        if len(statement.subjects) != 1:
            raise FormatError(f"has {len(statement.subjects)} subjects, expected 1", path=what)
        if statement.subjects[0].digest != Digest.of(b"".join(digests.values())):
            raise FormatError("its digest is not that of the listed files", path=what)
        paths = value.get("ignore_paths")
        ignored = [one for one in paths if isinstance(one, str)] if isinstance(paths, list) else ()
        return cls(digests, algorithm, size, tuple(ignored))

    @property
    def is_of_one_file(self) -> bool:
        """Whether a file was signed and not a directory, so that the file has no name."""
        return all(name.partition(":")[0] == _ONE_FILE for name in self.digests)

    def count(self, size: int) -> int:
        """Return the number of digests of a file of `size` bytes."""
        return -(-size // self.shard_size) if self.shard_size else 1

    def ranges(self, path: str, size: int) -> _Ranges:
        """Return the names of the digests of a file, each with the range of bytes."""
        if not self.shard_size:
            return ((path, 0, size),)
        bounds = [(at, min(at + self.shard_size, size)) for at in range(0, size, self.shard_size)]
        return tuple((f"{path}:{start}:{end}", start, end) for start, end in bounds)


def _reader(
    listed: _Resources, contents: Source | None, what: str
) -> Callable[[Descriptor, _Ranges], bool]:
    """Return a function that says whether a file has other digests than the listed ones."""

    def differs(file: Descriptor, ranges: _Ranges) -> bool:
        signed = [listed.digests[name] for name, _, _ in ranges]
        if listed.algorithm == "sha256" and len(ranges) == 1:
            return signed != [bytes.fromhex(file.digest.encoded)]
        if contents is None:
            kind = "shards" if listed.shard_size else "files"
            raise UnsupportedError(
                f"signs {listed.algorithm} digests of {kind}, which only the stored files verify",
                path=what,
                hint="run `modelpack pull --with-referrers`, then `modelpack verify --local`",
            )
        with contents.blob(file).open() as stream:
            sizes = [end - start for _, start, end in ranges]
            return signed != [_hash(stream, size, listed.algorithm) for size in sizes]

    return differs


def _hash(stream: BlobReader, size: int, algorithm: str) -> bytes:
    """Return the digest of the next `size` bytes."""
    hasher = _blake3() if algorithm == "blake3" else hashlib.new(algorithm)
    buffer = memoryview(bytearray(min(size, _CHUNK)))
    while size and (count := fill(stream, buffer[: min(size, _CHUNK)])):
        hasher.update(buffer[:count])
        size -= count
    return bytes(hasher.digest())


def _blake3() -> Any:
    try:
        from blake3 import blake3
    except ImportError:
        raise UnsupportedError(
            "BLAKE3 digests need the package blake3, which is not installed",
            hint="run pip install blake3",
        ) from None
    return blake3()


def _ignored(paths: Iterable[str], entries: Iterable[str]) -> set[str]:
    """Return which paths a signer left out: by default, and by the ignore paths of a statement."""
    return {
        path
        for path in paths
        if path.partition("/")[0] in _IGNORED
        or any(path == one or path.startswith(f"{one}/") for one in entries)
    }


def _running(ignored: Collection[str], model: Model) -> tuple[str, ...]:
    """Return the ignored files that a runtime may read."""
    harmless = (Role.LICENSE, Role.DOC)
    roles = {placed.path: placed.file.role for placed in arrange(model).files}
    return tuple(
        f"the file {path}, which its signer ignored"
        for path in sorted(ignored)
        if (path.partition("/")[0] not in _IGNORED or roles[path] in _FOUND_BY_ROLE)
        and roles[path] not in harmless
        and not path.endswith(_SIGNATURE)
    )


def uncovered(model: Model) -> tuple[str, ...]:
    """Return the parts of `model` that may change how it runs but do not follow from its files.

    A statement over the files alone does not cover them: anybody with write access to the
    repository can replace them and keep the signature.
    """
    placed = arrange(model).files
    laid_out = [one.file for one in placed]
    parts = [
        f"layer {file.descriptor.digest.short} ({file.media_type})"
        for file in model.files()
        if file not in laid_out
    ]
    if len(placed) + len(parts) < len(model.manifest.layers):
        parts.append("a layer listed twice")
    # The type of a layer, or a name that the layout replaces, may give a file another meaning.
    parts += [
        f"the type {one.file.media_type} of {one.path}"
        for one in placed
        if one.file.role is not role_of("", one.path)
        or (one.file.format or "") != _format(one.file.role, one.path)
    ]
    for role in _ORDERED:
        paths = [one.path for one in placed if one.file.role is role]
        if paths != sorted(paths):
            parts.append(f"the order of the layers of role {role}")
    annotations = model.manifest.annotations.keys() - _DESCRIPTIVE
    parts += [f"the annotation {key}" for key in sorted(annotations)]
    config = model.config
    if config.is_foreign:
        return (*parts, f"the config ({config.media_type})")
    if config.context_size is not None:
        parts.append("context_size of the config")
    formats = {file.format for file in model.files() if file.role is Role.WEIGHT}
    if config.format and formats != {config.format.lower().replace("diffusers", "dduf")}:
        parts.append("format of the config")
    return tuple(parts)


def _format(role: Role, path: str) -> str:
    return format_of("", path) if role in (Role.WEIGHT, Role.PROJECTOR) else ""
