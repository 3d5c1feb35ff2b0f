"""The blobs that manifests need, directly or not: the mark phase of garbage collection."""

from __future__ import annotations

import re
from collections.abc import Iterable

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import MAX_DOCUMENT_BYTES
from modelpack.artifacts.manifest import (
    Index,
    Manifest,
    parse_manifest_or_index,
)
from modelpack.errors import (
    FormatError,
    IntegrityError,
    InvalidDigestError,
    NotFoundError,
    StoreError,
)
from modelpack.store.blobs import Blobs
from modelpack.store.filesystem import map_os_errors

_DIGEST = re.compile(rb"\bsha256:[0-9a-f]{64}\b|\bsha512:[0-9a-f]{128}\b")


def read_manifest(blobs: Blobs, descriptor: Descriptor) -> Manifest | Index:
    """Return the stored manifest or index, verified.

    Raises `NotFoundError`, `IntegrityError` or `FormatError`.
    """
    return _parsed(blobs.read(descriptor.digest, "manifest"), descriptor)


def _parsed(raw: bytes, descriptor: Descriptor) -> Manifest | Index:
    return parse_manifest_or_index(raw, str(descriptor.digest), media_type=descriptor.media_type)


def successors(manifest: Manifest | Index) -> tuple[Descriptor, ...]:
    """Return the blobs or manifests that a manifest needs; its subject is not one of them."""
    return manifest.manifests if isinstance(manifest, Index) else manifest.unique_blobs


def reachable(blobs: Blobs, roots: Iterable[Descriptor]) -> set[Digest]:
    """Return the digests of the roots and of everything they need, directly or not.

    Raises `StoreError` if a manifest is damaged, since its needs are unknown. A missing manifest
    needs nothing.
    """
    found: set[Digest] = set()
    waiting = list(roots)
    while waiting:
        descriptor = waiting.pop()
        if descriptor.digest in found:
            continue
        found.add(descriptor.digest)
        if descriptor.media_type not in media_types.MANIFEST_AND_INDEX_TYPES:
            continue
        try:
            raw = blobs.read(descriptor.digest, "manifest")
        except (NotFoundError, IntegrityError) as error:
            if isinstance(error, NotFoundError) and not blobs.was_damaged(descriptor.digest):
                continue
            raise StoreError(
                f"cannot determine which blobs are needed: {error}",
                hint="run `modelpack fsck`, then pull the damaged model again or remove it",
            ) from error
        try:
            waiting.extend(successors(_parsed(raw, descriptor)))
        except (FormatError, InvalidDigestError):
            found.update(_mentioned(raw))
    return found


def _mentioned(raw: bytes) -> set[Digest]:
    """Return every digest in a manifest that does not parse: keep too much, not too little."""
    return {Digest.parse(match.decode()) for match in _DIGEST.findall(raw)}


def referrers(
    blobs: Blobs, candidates: Iterable[Digest], subjects: set[Digest]
) -> list[Descriptor]:
    """Return the manifests among `candidates` whose subject is one of `subjects`."""
    found = []
    for digest in candidates:
        manifest = as_manifest(blobs, digest)
        if manifest and manifest.subject and manifest.subject.digest in subjects:
            found.append(manifest.descriptor)
    return found


def as_manifest(blobs: Blobs, digest: Digest) -> Manifest | Index | None:
    """Return the blob as a manifest or an index, or None if it is neither."""
    try:
        if blobs.size(digest) > MAX_DOCUMENT_BYTES:
            return None
        path = blobs.path(digest)
        with map_os_errors("read", path), path.open("rb") as stream:
            if stream.read(1) != b"{":
                return None
        return parse_manifest_or_index(blobs.read(digest, "manifest"), str(digest))
    except (NotFoundError, IntegrityError, FormatError):
        return None
