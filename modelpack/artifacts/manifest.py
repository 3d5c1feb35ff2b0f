"""Manifest and Index: image manifests and image indexes, with the bytes they were parsed from.

Sources: OCI image-spec v1.1, manifest.md and image-index.md. A digest identifies the exact bytes,
so those are kept and passed on unchanged; a parsed manifest is never serialised again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor, checked_media_type, parsed_annotations
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import check_spelling, decode_object, encode, kind_of
from modelpack.errors import ManifestError, UnsupportedError

_FIELDS = {
    key.casefold(): key
    for key in (
        *("schemaVersion", "mediaType", "artifactType", "config", "layers", "manifests"),
        *("annotations", "subject"),
    )
}


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image manifest: a config and layers. `raw` are its exact bytes."""

    raw: bytes = field(repr=False)
    config: Descriptor
    layers: tuple[Descriptor, ...]
    media_type: str = media_types.OCI_MANIFEST
    artifact_type: str | None = None
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)
    subject: Descriptor | None = None

    @classmethod
    def parse(cls, raw: bytes, what: str = "manifest") -> Manifest:
        """Return the manifest in `raw`; raise `ManifestError`, naming the invalid field."""
        value = decode_object(raw, what)
        _check_version(value, what)
        media_type = value.get("mediaType", media_types.OCI_MANIFEST)
        if media_type not in media_types.MANIFEST_TYPES:
            expected = media_types.OCI_MANIFEST
            raise ManifestError(f"mediaType is {media_type!r}, expected {expected!r}", path=what)
        for key in ("config", "layers"):
            if key not in value:
                raise ManifestError(f"has no {key!r}", path=what)
        _check_kind(value, ("manifests",), what)
        config = Descriptor.parse(value["config"], f"{what}: config")
        artifact_type = _artifact_type(value, what)
        if config.media_type == media_types.OCI_EMPTY and artifact_type is None:
            raise ManifestError("has the empty config but no 'artifactType'", path=what)
        return cls(
            raw,
            config,
            _descriptors(value["layers"], f"{what}: layers"),
            media_type,
            artifact_type,
            parsed_annotations(value.get("annotations"), f"{what}: annotations"),
            _subject(value, what),
        )

    @classmethod
    def build(
        cls,
        config: Descriptor,
        layers: Sequence[Descriptor],
        *,
        artifact_type: str | None = None,
        subject: Descriptor | None = None,
        annotations: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Return a new manifest, with the bytes that Docker Model Runner would write.

        `subject` is the manifest that this one refers to, for a referrer.
        """
        value: dict[str, Any] = {"schemaVersion": 2, "mediaType": media_types.OCI_MANIFEST}
        if artifact_type:
            value["artifactType"] = artifact_type
        value["config"] = config.to_json()
        value["layers"] = [layer.to_json() for layer in layers]
        if subject is not None:
            value["subject"] = subject.to_json()
        if annotations:
            value["annotations"] = dict(sorted(annotations.items()))
        return cls.parse(encode(value))

    @property
    def digest(self) -> Digest:
        """The digest of the bytes: the model's id."""
        return Digest.of(self.raw)

    @property
    def descriptor(self) -> Descriptor:
        """The descriptor of this manifest for an index."""
        return Descriptor(
            self.media_type, self.digest, len(self.raw), artifact_type=self.artifact_type
        )

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """The layers in order, then the config; digests may repeat."""
        return (*self.layers, self.config)

    @property
    def unique_blobs(self) -> tuple[Descriptor, ...]:
        """`blobs` with each digest once."""
        return tuple({blob.digest: blob for blob in self.blobs}.values())

    @property
    def total_size(self) -> int:
        """The bytes of all unique blobs, without the manifest itself."""
        return sum(blob.size for blob in self.unique_blobs)

    @property
    def is_cncf(self) -> bool:
        """Whether this is a CNCF ModelPack manifest rather than Docker's."""
        return (
            self.config.media_type == media_types.CNCF_CONFIG
            or self.artifact_type == media_types.CNCF_MANIFEST
        )

    @property
    def is_ollama(self) -> bool:
        """Whether this is a model of Ollama's registry."""
        prefix = media_types.OLLAMA_LAYER_PREFIX
        return self.config.media_type == media_types.DOCKER_IMAGE_CONFIG and any(
            layer.media_type.startswith(prefix) for layer in self.layers
        )

    def check_is_model(self, what: str) -> None:
        """Raise `UnsupportedError` unless the config has the media type of a model."""
        known = (
            *media_types.MODEL_CONFIG_TYPES,
            media_types.CNAI_CONFIG,
            media_types.KITOPS_CONFIG,
        )
        if self.config.media_type not in known and not self.is_ollama:
            raise UnsupportedError(
                f"is not a supported model: config type {self.config.media_type!r}",
                path=what,
                hint="use a model with a config of one of the types "
                + ", ".join(known)
                + ", or a model of Ollama",
            )


@dataclass(frozen=True, slots=True)
class Index:
    """An image index: a list of manifests. `raw` are its exact bytes."""

    raw: bytes = field(repr=False)
    manifests: tuple[Descriptor, ...]
    media_type: str = media_types.OCI_INDEX
    artifact_type: str | None = None
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)
    subject: Descriptor | None = None

    @classmethod
    def parse(cls, raw: bytes, what: str = "index") -> Index:
        """Return the index in `raw`; raise `ManifestError`, naming the invalid field."""
        value = decode_object(raw, what)
        _check_version(value, what)
        media_type = value.get("mediaType", media_types.OCI_INDEX)
        if media_type not in media_types.INDEX_TYPES:
            expected = media_types.OCI_INDEX
            raise ManifestError(f"mediaType is {media_type!r}, expected {expected!r}", path=what)
        if "manifests" not in value:
            raise ManifestError("has no 'manifests'", path=what)
        _check_kind(value, ("layers", "config"), what)
        return cls(
            raw,
            _descriptors(value["manifests"], f"{what}: manifests"),
            media_type,
            _artifact_type(value, what),
            parsed_annotations(value.get("annotations"), f"{what}: annotations"),
            _subject(value, what),
        )

    @classmethod
    def build(
        cls, manifests: Sequence[Descriptor], *, annotations: Mapping[str, str] | None = None
    ) -> Index:
        """Return a new index of these manifests, in their order."""
        value: dict[str, Any] = {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX}
        value["manifests"] = [manifest.to_json() for manifest in manifests]
        if annotations:
            value["annotations"] = dict(sorted(annotations.items()))
        return cls.parse(encode(value))

    @property
    def digest(self) -> Digest:
        """The digest of the bytes."""
        return Digest.of(self.raw)

    @property
    def descriptor(self) -> Descriptor:
        """The descriptor of this index."""
        return Descriptor(
            self.media_type, self.digest, len(self.raw), artifact_type=self.artifact_type
        )


def referrer_descriptor(descriptor: Descriptor, document: Manifest | Index) -> Descriptor:
    """Return the descriptor of a referrer for a list (distribution-spec, "Listing Referrers").

    It has the manifest's annotations; a manifest without an artifact type has its config's type.
    """
    artifact_type = document.artifact_type
    if artifact_type is None and isinstance(document, Manifest):
        artifact_type = document.config.media_type
    return Descriptor(
        descriptor.media_type,
        descriptor.digest,
        descriptor.size,
        document.annotations,
        artifact_type,
    )


def parse_manifest_or_index(
    raw: bytes, what: str, *, media_type: str | None = None
) -> Manifest | Index:
    """Return the manifest or index in `raw`; it must match `media_type`, the server's claim."""
    value = decode_object(raw, what)
    own = value.get("mediaType")
    if own is None:
        own = media_type or (
            media_types.OCI_INDEX if "manifests" in value else media_types.OCI_MANIFEST
        )
    if media_type is not None and own != media_type:
        raise ManifestError(
            f"its mediaType is {own!r}, but it was served as {media_type!r}", path=what
        )
    if own in media_types.INDEX_TYPES:
        return Index.parse(raw, what)
    if own in media_types.MANIFEST_TYPES:
        return Manifest.parse(raw, what)
    raise UnsupportedError(f"media type {own!r} is neither a manifest nor an index", path=what)


def _check_version(value: dict[str, Any], what: str) -> None:
    version = value.get("schemaVersion")
    if type(version) is not int or version != 2:
        raise ManifestError(f"schemaVersion is {version!r}, expected 2", path=what)


def _check_kind(value: dict[str, Any], others: tuple[str, ...], what: str) -> None:
    """Reject a document that another reader may parse as the other kind (CVE-2021-41190)."""
    check_spelling(value, _FIELDS, what)
    for key in others:
        if key in value:
            raise ManifestError(f"has {key!r}, which its media type does not", path=what)


def _descriptors(value: Any, where: str) -> tuple[Descriptor, ...]:
    if not isinstance(value, list):
        raise ManifestError(f"is {kind_of(value)}, expected an array", path=where)
    return tuple(Descriptor.parse(item, f"{where}[{i}]") for i, item in enumerate(value))


def _artifact_type(value: dict[str, Any], what: str) -> str | None:
    artifact_type = value.get("artifactType")
    if artifact_type is None:
        return None
    return checked_media_type(artifact_type, f"{what}: artifactType")


def _subject(value: dict[str, Any], what: str) -> Descriptor | None:
    subject = value.get("subject")
    return None if subject is None else Descriptor.parse(subject, f"{what}: subject")
