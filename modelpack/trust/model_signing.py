"""OpenSSF model signing 1.0: a statement over the digests of a model's files.

A layer of a model is a file, so the statement is compared with the digests in the manifest, which
the registry client or the store has verified; no file is read again.

The format covers only files. A model also has a config, annotations, and types and an order of its
layers. Statements of Modelpack therefore also name the manifest, in a field of the predicate that
other verifiers ignore. A statement without that field is accepted only for a model whose other
parts cannot change how it runs, see `uncovered`.
Sources: ossf/model-signing-spec, spec/v1.0.md; sigstore/model-transparency,
model_signing/_signing/signing.py ("any other field should be ignored by verifiers").
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.model import Model, Role, format_of, role_of
from modelpack.bundles.names import arrange
from modelpack.errors import FormatError, IntegrityError, InvalidDigestError, UnsupportedError
from modelpack.trust.sigstore import MODEL_SIGNING, Statement, Subject

#: The field of the predicate that holds the digest of the manifest.
MANIFEST: Final = "dev.modelpack.manifest"
#: Names at the root of a model that signers leave out. (Specification, 6.2)
_IGNORED: Final = frozenset((".git", ".gitattributes", ".github", ".gitignore"))
_SERIALIZATION: Final = {
    "method": "files",
    "hash_type": "sha256",
    "allow_symlinks": False,
    "ignore_paths": [],
}
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


def files_of(model: Model) -> Mapping[str, Digest]:
    """Return the digests of the model's files by their path in a bundle.

    Raises `UnsupportedError` for archives and digests other than SHA-256.
    """
    arrangement = arrange(model)
    what = str(model.reference or model.digest)
    if arrangement.archives:
        raise UnsupportedError(
            "has archive layers, whose files have no digests in the manifest",
            path=what,
            hint="sign the manifest instead: omit --format model-signing",
        )
    files = {placed.path: placed.file.descriptor.digest for placed in arrangement.files}
    for path, digest in files.items():
        if digest.algorithm != "sha256":
            raise UnsupportedError(
                f"{path} has a {digest.algorithm} digest, expected sha256", path=what
            )
    return files


def model_statement(model: Model, name: str) -> Statement:
    """Return the statement over the files and the manifest of `model`, called `name` in it."""
    files = files_of(model)
    resources = [
        {"name": path, "algorithm": "sha256", "digest": files[path].encoded}
        for path in sorted(files)
    ]
    predicate = {
        "serialization": _SERIALIZATION,
        "resources": resources,
        MANIFEST: str(model.digest),
    }
    return Statement((Subject(_root(resources), name),), MODEL_SIGNING, predicate)


def names_manifest(statement: Statement) -> bool:
    """Return whether the statement names the manifest in addition to the files."""
    return MANIFEST in statement.predicate


def check_model(statement: Statement, model: Model) -> None:
    """Raise `IntegrityError` unless the statement is about `model` and covers all of it.

    It must list exactly the model's files, but for those that its signer ignored. If it names a
    manifest, that must be the model's; otherwise the model must have no `uncovered` parts, and
    ignored files must not change how it runs. Raises `FormatError` for a statement whose
    digest is not that of the listed files, or whose serialization method is not `files`.
    """
    what = f"model signature of {model.reference or model.digest}"
    if names_manifest(statement) and statement.predicate[MANIFEST] != str(model.digest):
        raise IntegrityError(f"{what}: signs {statement.predicate[MANIFEST]!r}, another manifest")
    resources: Any = statement.predicate.get("resources") or []
    serialization = statement.predicate.get("serialization")
    if not isinstance(serialization, dict) or serialization.get("method") != "files":
        raise FormatError("does not have the serialization method 'files'", path=what)
    signed: dict[str, Digest] = {}
    try:
        for one in resources:
            signed[str(one["name"])] = Digest.parse(f"{one['algorithm']}:{one['digest']}")
        root = _root(resources)
    except (KeyError, TypeError, ValueError, InvalidDigestError):
        raise FormatError("lists resources that are not files with digests", path=what) from None
    if not signed or len(signed) != len(resources):
        raise FormatError("lists no files, or the same file twice", path=what)
    if statement.subjects[0].digest != root:
        raise FormatError("its digest is not that of the listed files", path=what)
    files = files_of(model)
    wrong = sorted(path for path in signed.keys() & files.keys() if signed[path] != files[path])
    ignored = _ignored(files.keys() - signed.keys(), serialization.get("ignore_paths"))
    wrong += sorted((signed.keys() ^ files.keys()) - ignored)
    if wrong:
        raise IntegrityError(f"{what}: signs other files: {', '.join(wrong[:8])}")
    if not names_manifest(statement) and (parts := _running(ignored, model) + uncovered(model)):
        raise IntegrityError(
            f"{what}: signs only the files, not other parts of the model: {', '.join(parts[:8])}",
            hint="sign the manifest: `modelpack sign`",
        )


def _ignored(paths: Iterable[str], listed: Any) -> set[str]:
    """Return which paths a signer left out: by default, and by the ignore paths of a statement."""
    entries = [one for one in listed if isinstance(one, str)] if isinstance(listed, list) else []
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
        if path.partition("/")[0] not in _IGNORED and roles[path] not in harmless
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


def _root(resources: Any) -> Digest:
    return Digest.of(b"".join(bytes.fromhex(one["digest"]) for one in resources))
