"""Models as tar archives, as `docker model package` sends them and `export` gives them.

`blobs/sha256/<hex>` for each layer and the config, then `manifest.json`. Source: Docker Model
Runner, pkg/distribution/tarball.
"""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import IO

from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.errors import (
    FormatError,
    IntegrityError,
    InvalidDigestError,
    ManifestError,
    UnsafePathError,
)
from modelpack.gojson import MAX_DOCUMENT_BYTES
from modelpack.manifest import Manifest
from modelpack.progress import Stop, silent
from modelpack.storage import BlobReader, Watch
from modelpack.stores.layout import LayoutStore

_MANIFEST = "manifest.json"
_CHUNK = 1024 * 1024
# Until the manifest comes, nobody knows what a blob is.
_UNKNOWN = "application/octet-stream"


def archive_size(manifest: Manifest) -> int:
    """Return the number of bytes of a model's archive."""
    sizes = [blob.size for blob in manifest.unique_blobs] + [len(manifest.raw)]
    folders = 2
    return 512 * (folders + len(sizes) + 2) + sum(_padded(size) for size in sizes)


def write_archive(store: LayoutStore, name: str) -> tuple[int, Iterator[bytes]]:
    """Return the size of a stored model's archive, and its bytes; the blobs are kept until the end.

    Raises `NotFoundError`, `UnsupportedError`.
    """
    descriptor = store.resolve(name)
    manifest = Manifest.parse(store.fetch_manifest(descriptor), name)
    manifest.check_is_model(name)
    return archive_size(manifest), _archive(store, manifest)


def _archive(store: LayoutStore, manifest: Manifest) -> Iterator[bytes]:
    with store.lease(blob.digest for blob in manifest.unique_blobs):
        for folder in ("blobs", "blobs/sha256"):
            yield _header(folder, 0, tarfile.DIRTYPE, 0o755)
        for blob in manifest.unique_blobs:
            yield _header(f"blobs/{blob.digest.algorithm}/{blob.digest.encoded}", blob.size)
            with store.blob_path(blob.digest).open("rb") as stream:
                while piece := stream.read(_CHUNK):
                    yield piece
            yield bytes(_padded(blob.size) - blob.size)
        yield _header(_MANIFEST, len(manifest.raw))
        yield manifest.raw
        yield bytes(_padded(len(manifest.raw)) - len(manifest.raw) + 2 * 512)


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE, mode: int = 0o666) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type, entry.mode = size, kind, mode
    return entry.tobuf(tarfile.GNU_FORMAT)


def _padded(size: int) -> int:
    return -(-size // 512) * 512


@dataclass(slots=True)
class _Member:
    """A blob in an archive that is read once, from its start to its end."""

    stream: IO[bytes]
    digest: Digest
    opened: bool = False

    def open(self, offset: int = 0) -> AbstractContextManager[BlobReader]:
        """Return the stream at `offset`."""
        if self.opened:
            raise IntegrityError(f"the archive has other bytes for {self.digest}")
        self.opened = True
        while offset:
            offset -= len(self.stream.read(min(offset, _CHUNK)))
        return closing(_Reader(self.stream))


class _Reader(io.RawIOBase):
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        piece = self._stream.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


def read_archive(store: LayoutStore, stream: IO[bytes], stop: Stop) -> Digest:
    """Keep the model of an archive, which has no name; return its id.

    Nothing shows before all of it is there and verified. Raises `FormatError` for what is no such
    archive, `IntegrityError`, `StorageFullError`, `UnsupportedError`.
    """
    watch = Watch(silent, stop)
    raw: bytes | None = None
    with store.lease(()):
        try:
            with tarfile.open(fileobj=stream, mode="r|", bufsize=_CHUNK) as archive:
                for entry in archive:
                    stop.check()
                    content = archive.extractfile(entry) if entry.isfile() else None
                    if content is None:
                        continue
                    if entry.name == _MANIFEST:
                        raw = content.read(MAX_DOCUMENT_BYTES + 1)
                    elif (digest := _digest_of(entry.name)) is not None:
                        blob = Descriptor(_UNKNOWN, digest, entry.size)
                        store.write_blob(blob, _Member(content, digest), watch)
        except tarfile.TarError as error:
            raise FormatError(f"is no tar archive: {error}", path="archive") from error
        if raw is None:
            raise ManifestError(f"has no {_MANIFEST}", path="archive")
        if len(raw) > MAX_DOCUMENT_BYTES:
            raise ManifestError(f"has more than {MAX_DOCUMENT_BYTES} bytes", path=_MANIFEST)
        manifest = Manifest.parse(raw, _MANIFEST)
        manifest.check_is_model(_MANIFEST)
        store.write_manifest(manifest.descriptor, raw)
    return manifest.digest


def _digest_of(name: str) -> Digest | None:
    """Return the digest of a blob from its path; None for paths of nothing that is known."""
    parts = posixpath.normpath(name).split("/")
    if ".." in parts:
        raise UnsafePathError(f"the archive holds the path {name!r}, which leads out of it")
    if len(parts) != 3 or parts[0] not in ("blobs", "manifests"):
        return None
    try:
        return Digest.parse(f"{parts[1]}:{parts[2]}")
    except InvalidDigestError as error:
        raise FormatError(f"{name!r} is no blob: {error}", path="archive") from error
