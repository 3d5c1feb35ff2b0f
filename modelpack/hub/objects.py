"""Objects under an address: a model in an object store or another remote file system.

    s3://BUCKET/PREFIX    gs://BUCKET/PREFIX    az://CONTAINER/PREFIX    s3://BUCKET/FILE.gguf
    SCHEME://HOST/PATH    of any fsspec implementation that is installed

`object_stores` reads the first three by obstore, `filesystems` all others by fsspec. The digest of
an object is unknown until it is read, so objects are downloaded to be packaged. A download reads
the version that was listed, and goes on where an earlier one stopped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from modelpack.artifacts.paths import checked_path
from modelpack.errors import (
    InvalidReferenceError,
    NotFoundError,
    RegistryError,
    SizeMismatchError,
    SourceChangedError,
    UnsafePathError,
    UnsupportedError,
)
from modelpack.progress import Action, Progress
from modelpack.storage import Watch
from modelpack.store.filesystem import map_os_errors

if TYPE_CHECKING:
    from modelpack.registry.limits import RateLimit

#: The largest number of objects under one address.
MAX_OBJECTS: Final = 100_000
#: The schemes that obstore reads; fsspec reads others.
CLOUD: Final = ("s3", "gs", "az")
_ALIASES: Final[Mapping[str, str]] = {"gcs": "gs"}
# Schemes of other names: hubs and registries.
_OTHER: Final = frozenset(
    {"hf", "huggingface", "modelscope", "http", "https", "docker", "oci", "docker-archive"}
)
_SCHEME: Final = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]\Z")
_HOST: Final = re.compile(r"[A-Za-z0-9._@:\[\]-]{0,255}\Z")
_SINGLE: Final = (".gguf", ".dduf")


@dataclass(frozen=True, slots=True)
class ObjectAddress:
    """The address of a model; `prefix` is a directory's or a file's key in `bucket`.

    Outside object stores, `bucket` is the host, which may be empty.
    """

    scheme: str
    bucket: str
    prefix: str

    @classmethod
    def parse(cls, text: str) -> ObjectAddress | None:
        """Return the address in `text`, None for a name of a hub or registry and for a path.

        Raises `InvalidReferenceError` for an invalid bucket or key. Whether the scheme is known is
        checked when the address is opened.
        """
        text = text.strip()
        match = _SCHEME.match(text)
        if match is None or (scheme := match[1].lower()) in _OTHER:
            return None
        scheme = _ALIASES.get(scheme, scheme)
        bucket, _, prefix = text[match.end() :].partition("/")
        prefix = prefix.rstrip("/")
        if scheme in CLOUD:
            problem = "" if _BUCKET.match(bucket) else f"{_shown(bucket)!r} is not a bucket"
            problem = problem if bucket else "no bucket"
        else:
            problem = _problem(bucket, prefix)
        if problem:
            raise _invalid(scheme, problem)
        try:
            return cls(scheme, bucket, checked_path(prefix) if prefix else "")
        except UnsafePathError as error:
            raise _invalid(scheme, str(error)) from None

    @property
    def is_file(self) -> bool:
        """Whether the address names one GGUF or DDUF file."""
        return self.prefix.lower().endswith(_SINGLE)

    @property
    def directory(self) -> str:
        """The key of the directory: for a file, of the one that contains it."""
        return self.prefix.rpartition("/")[0] if self.is_file else self.prefix

    def url(self, key: str) -> str:
        """Return the address of the object `key`."""
        return f"{self.scheme}://{self.bucket}/{key}"

    # What `selection.choose` asks of a name.

    @property
    def quantization(self) -> None:
        """None: a file's own address selects it."""
        return None

    @property
    def example(self) -> str:
        """How to name one of several files."""
        return self.url(f"{self.directory and self.directory + '/'}FILE.gguf")

    def __str__(self) -> str:
        return self.url(self.prefix) if self.prefix else f"{self.scheme}://{self.bucket}"


def _problem(host: str, path: str) -> str:
    """Return why fsspec does not get an address with these parts."""
    if ":" in host.rpartition("@")[0]:
        return "it has a password, which models would record"
    # fsspec: `::` chains file systems, such as a zip in a cache; a query may have a token.
    for sign in ("::", "://", "?", "#"):
        if sign in f"{host}/{path}":
            return f"it has {sign!r}"
    return "" if _HOST.match(host) else f"{_shown(host)!r} is not a host"


def _shown(host: str) -> str:
    """Return the host without the user and password before it."""
    return host.rpartition("@")[2][:100]


def _invalid(scheme: str, problem: str) -> InvalidReferenceError:
    where = "BUCKET/PREFIX" if scheme in CLOUD else "HOST/PATH"
    return InvalidReferenceError(
        f"invalid {scheme}:// address: {problem}",
        reference=f"{scheme}://",
        hint=f"write {scheme}://{where}, and give credentials in the environment",
    )


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object: its key, its path below the address, and what its version is known by.

    `etag` is empty and `modified` is None where a file system does not state them.
    """

    key: str
    path: str
    size: int
    etag: str
    modified: datetime | None


class ObjectSource(Protocol):
    """How the objects under an address are listed and read."""

    def listed(self) -> Iterable[tuple[str, int, str, datetime | None]]:
        """Yield the key, size, ETag and time of each object below the address's directory."""

    def chunks(self, one: StoredObject, offset: int) -> Iterable[bytes]:
        """Yield the bytes of the object from `offset` on.

        Raises `SourceChangedError` if it is not the listed version, at the latest after the last.
        """


@dataclass(frozen=True, slots=True)
class Bucket:
    """An open connection to the bucket of an address."""

    address: ObjectAddress
    source: ObjectSource = field(repr=False)

    def objects(self) -> tuple[StoredObject, ...]:
        """Return the objects under the address, sorted by path.

        Raises `NotFoundError` for no bucket and no objects, `UnsafePathError` for a key that is no
        path, `UnsupportedError` for more than `MAX_OBJECTS`, `AuthError`, `DeniedError` and
        `RemoteUnavailableError`.
        """
        directory = self.address.directory
        what = f"the objects of {self.address}"
        found: list[StoredObject] = []
        for key, size, etag, modified in self.source.listed():
            if len(found) == MAX_OBJECTS:
                raise UnsupportedError(f"more than {MAX_OBJECTS} objects", path=what)
            path = checked_path(key.removeprefix(f"{directory}/") if directory else key)
            found.append(StoredObject(key, path, size, etag, modified))
        found.sort(key=lambda one: one.path.replace("/", "\0"))
        # A store may have a marker of no bytes for each directory.
        folders = {f"{parent}" for one in found for parent in _parents(one.path)}
        for one in found:
            if one.path in folders and one.size:
                raise UnsafePathError(f"{what}: {one.path!r} is a file and a directory")
        found = [one for one in found if one.path not in folders and one.key != directory]
        for one, following in pairwise(found):
            if one.path == following.path:
                raise RegistryError(f"{what}: {one.path!r} is listed twice")
        if not found:
            raise NotFoundError(
                f"{self.address}: no objects", hint="check the bucket and the prefix"
            )
        return tuple(found)

    def fetch(self, one: StoredObject, part: Path, watch: Watch, rate: RateLimit | None) -> None:
        """Download an object to the file `part`, after the bytes that it has already.

        Raises `SourceChangedError` if the object was replaced since it was listed, and
        `SizeMismatchError` for more or fewer bytes.
        """
        if not one.etag and one.modified is None:  # the bytes there may be of another content
            part.unlink(missing_ok=True)
        if part.exists() and part.stat().st_size == one.size:
            return
        with map_os_errors("write", part), part.open("ab") as stream:
            done = stream.tell()
            if done > one.size:
                stream.truncate(done := 0)
            chunks = self.source.chunks(one, done) if done < one.size else ()
            try:
                for chunk in chunks:
                    watch.stop.check()
                    if rate is not None:
                        rate.wait(len(chunk), watch.stop)
                    done += stream.write(chunk)
                    if done > one.size:
                        break
                    report = Progress(Action.FETCH, one.path, None, done, one.size)
                    watch.report(report)
            except SourceChangedError:
                part.unlink()
                raise
        if done != one.size:
            part.unlink()
            raise SizeMismatchError(
                f"{self.address.url(one.key)}: expected {one.size} bytes, "
                f"got {'more' if done > one.size else done}",
                expected=str(one.size),
                got=str(done),
            )


def part_name(one: StoredObject) -> str:
    """Return the name of an object's download: another for each content that it may have."""
    version = one.etag or one.modified
    text = f"{one.key}\0{version}\0{one.size}"
    return f"{hashlib.sha256(text.encode()).hexdigest()}.part"


def _parents(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path
