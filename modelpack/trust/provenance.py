"""The provenance of a packaged model: a SLSA v1 predicate in an in-toto statement.

It says from which files, commit and model, with which parameters and by which version a model was
packaged. The same inputs give the same bytes: it has times only if SOURCE_DATE_EPOCH sets them.
Sources, from their text: slsa.dev/spec/v1.0/provenance and v1.1; in-toto/attestation,
spec/v1/resource_descriptor.md. `spec/provenance.md` defines our build type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

from modelpack._version import __version__
from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import checked_time, kind_of
from modelpack.artifacts.manifest import Manifest
from modelpack.errors import FormatError, UsageError
from modelpack.trust.sigstore import PAYLOAD_TYPE, Statement

#: The predicate type of SLSA's provenance, in all its minor versions.
SLSA_PROVENANCE: Final = "https://slsa.dev/provenance/v1"
#: The build type of `modelpack package`, which spec/provenance.md defines.
BUILD_TYPE: Final = "urn:modelpack:package:v1"
#: The builder: the command line, on a machine that whoever signs the statement vouches for.
BUILDER: Final = "urn:modelpack:cli"
#: The annotation with the predicate type of a statement without a signature, as BuildKit's.
IN_TOTO_PREDICATE: Final = "in-toto.io/predicate-type"
GIT_COMMIT: Final = "gitCommit"
_EMPTY: Final = b"{}"
# RFC 3986: a scheme, and no characters that a URI cannot have.
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s\x00-\x1f\x7f<>\"{}|\\^`]+\Z")
_COMMIT = re.compile(r"(.+)@([0-9a-f]{40}|[0-9a-f]{64})\Z")


@dataclass(frozen=True, slots=True)
class Resource:
    """An input: its name, its address or both, and its digests in hexadecimal, by algorithm."""

    name: str = ""
    uri: str = ""
    digest: Mapping[str, str] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, digest: Digest, *, name: str = "", uri: str = "") -> Resource:
        """Return the resource with this digest."""
        return cls(name, uri, {digest.algorithm: digest.encoded})

    @classmethod
    def named(cls, text: str) -> Resource:
        """Return the source `URI[@COMMIT]` that a user names; raise `UsageError`."""
        match = _COMMIT.match(text)
        uri, commit = (match[1], match[2]) if match else (text, "")
        if not _URI.match(uri):
            raise UsageError(
                f"{text!r} is not a source",
                hint="give URI@COMMIT, such as git+https://git.example/team/model@4f2a…",
            )
        if without_secrets(uri) != uri:
            raise UsageError("the source has a user or a password in its URI", hint="leave it out")
        return cls("source", uri, {GIT_COMMIT: commit} if commit else {})

    @classmethod
    def parse(cls, value: Any, where: str) -> Resource:
        """Return the resource descriptor in decoded JSON; raise `FormatError`."""
        fields = _object(value, where)
        name, uri = (_text(fields, key, where) for key in ("name", "uri"))
        digest = _texts(fields, "digest", where)
        if not (uri or digest or _text(fields, "content", where)):
            raise FormatError("has neither uri nor digest nor content", path=where)
        return cls(name, uri, digest)

    def to_json(self) -> dict[str, Any]:
        """Return the resource descriptor."""
        value = {"name": self.name, "uri": self.uri, "digest": dict(self.digest)}
        return {key: item for key, item in value.items() if item}

    def __str__(self) -> str:
        digest = next(iter(self.digest.values()), "")
        return "@".join(part for part in (self.uri or self.name, digest) if part)


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a SLSA v1 predicate says; `parameters` are the external ones, `finished` is RFC 3339."""

    build_type: str = BUILD_TYPE
    builder: str = BUILDER
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    dependencies: tuple[Resource, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    finished: str | None = None

    @classmethod
    def parse(cls, predicate: Mapping[str, Any], what: str) -> Provenance:
        """Return the provenance in a predicate; raise `FormatError` with the wrong field.

        Unknown fields are ignored, and null and empty values count as absent, as SLSA requires.
        """
        definition = _object(predicate.get("buildDefinition"), f"{what}: buildDefinition")
        details = _object(predicate.get("runDetails"), f"{what}: runDetails")
        builder = _object(details.get("builder"), f"{what}: runDetails.builder")
        metadata = _object(details.get("metadata") or {}, f"{what}: runDetails.metadata")
        _object(definition.get("internalParameters") or {}, f"{what}: internalParameters")
        _resources(details, "byproducts", what)
        _resources(builder, "builderDependencies", what)
        _text(metadata, "invocationId", f"{what}: metadata")
        times = [_time(metadata, key, f"{what}: metadata") for key in ("startedOn", "finishedOn")]
        return cls(
            _uri(definition, "buildType", f"{what}: buildDefinition"),
            _uri(builder, "id", f"{what}: runDetails.builder"),
            _object(definition.get("externalParameters"), f"{what}: externalParameters"),
            _resources(definition, "resolvedDependencies", what),
            _texts(builder, "version", f"{what}: runDetails.builder"),
            times[1],
        )

    def to_json(self) -> dict[str, Any]:
        """Return the predicate."""
        details: dict[str, Any] = {"builder": {"id": self.builder, "version": dict(self.versions)}}
        if self.finished is not None:
            details["metadata"] = {"startedOn": self.finished, "finishedOn": self.finished}
        return {
            "buildDefinition": {
                "buildType": self.build_type,
                "externalParameters": dict(self.parameters),
                "resolvedDependencies": [one.to_json() for one in self.dependencies],
            },
            "runDetails": details,
        }

    @property
    def sources(self) -> tuple[str, ...]:
        """The commits and the models that it was made of, as `URI@DIGEST`; files are left out."""
        return tuple(str(one) for one in self.dependencies if one.uri or GIT_COMMIT in one.digest)

    def __str__(self) -> str:
        tool = " ".join(next(iter(self.versions.items()), (self.builder,)))
        return " from ".join([tool, *([", ".join(self.sources)] if self.sources else [])])


def tool_versions(**others: str) -> Mapping[str, str]:
    """Return the version of Modelpack and of other tools that took part, for `Provenance`."""
    return {"modelpack": __version__, **others}


def without_secrets(uri: str) -> str:
    """Return a URI without a user and a password, except for the user of SSH."""
    parts = urlsplit(uri)
    user, at, host = parts.netloc.rpartition("@")
    if not at or (parts.scheme.endswith("ssh") and ":" not in user):
        return uri
    return urlunsplit(parts._replace(netloc=host))


def statement_manifest(
    statement: Statement, subject: Descriptor
) -> tuple[Manifest, Mapping[Descriptor, bytes]]:
    """Return the manifest that attaches a statement without a signature, and its blobs."""
    raw, said = statement.encode(), {IN_TOTO_PREDICATE: statement.predicate_type}
    layer = Descriptor(PAYLOAD_TYPE, Digest.of(raw), len(raw), said)
    config = Descriptor(media_types.OCI_EMPTY, Digest.of(_EMPTY), len(_EMPTY))
    manifest = Manifest.build(
        config,
        (layer,),
        artifact_type=PAYLOAD_TYPE,
        subject=Descriptor(subject.media_type, subject.digest, subject.size),
        annotations=said,
    )
    return manifest, {layer: raw, config: _EMPTY}


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"is {kind_of(value)}, expected an object", path=where)
    return value


def _text(value: Mapping[str, Any], key: str, where: str) -> str:
    found = value.get(key) or ""
    if not isinstance(found, str):
        raise FormatError(f"{key} is {kind_of(found)}, expected a string", path=where)
    return found


def _uri(value: Mapping[str, Any], key: str, where: str) -> str:
    found = _text(value, key, where)
    if not _URI.match(found):
        raise FormatError(f"{key} is {found[:100]!r}, expected a URI", path=where)
    return found


def _time(value: Mapping[str, Any], key: str, where: str) -> str | None:
    return checked_time(value[key], f"{where}.{key}") if value.get(key) else None


def _texts(value: Mapping[str, Any], key: str, where: str) -> Mapping[str, str]:
    found = _object(value.get(key) or {}, f"{where}.{key}")
    for name, text in found.items():
        if not isinstance(text, str):
            raise FormatError(f"{key}.{name} is {kind_of(text)}, expected a string", path=where)
    return found


def _resources(value: Mapping[str, Any], key: str, what: str) -> tuple[Resource, ...]:
    found = value.get(key) or []
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise FormatError(f"is {kind_of(found)}, expected an array", path=f"{what}: {key}")
    return tuple(Resource.parse(one, f"{what}: {key}[{i}]") for i, one in enumerate(found))
