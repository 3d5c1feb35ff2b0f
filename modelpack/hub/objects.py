"""Objects in S3 and Google Cloud Storage: a model under an address, listed and downloaded.

    s3://BUCKET/PREFIX    gs://BUCKET/PREFIX    s3://BUCKET/FILE.gguf

obstore (the Rust crate object_store) makes the requests, with the credentials and endpoints of its
environment variables. It is one package, where s3fs and gcsfs bring fifty; only this module
imports it. Objects have no digest that is known before they are read, so they are downloaded to be
packaged. A download reads the object with the ETag that was listed, and goes on where an earlier
one stopped.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from modelpack.artifacts.paths import checked_path
from modelpack.errors import (
    AuthError,
    DeniedError,
    InvalidReferenceError,
    NotFoundError,
    RegistryError,
    RemoteUnavailableError,
    SizeMismatchError,
    SourceChangedError,
    UnsafePathError,
    UnsupportedError,
    UsageError,
)
from modelpack.progress import Action, Progress
from modelpack.storage import Watch
from modelpack.store.filesystem import map_os_errors

if TYPE_CHECKING:
    from obstore.store import GCSStore, S3Store

    from modelpack.registry.limits import RateLimit

#: The largest number of objects under one address.
MAX_OBJECTS: Final = 100_000
#: Seconds without a byte after which a download is retried.
READ_SECONDS: Final = 60
_CHUNK: Final = 1024 * 1024
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]\Z")
_SINGLE: Final = (".gguf", ".dduf")
_STATUS: Final = re.compile(r"status code: (\d{3})")
_URL: Final = re.compile(r"https?://\S+")
_CREDENTIALS: Final = re.compile(r"credential|\btoken\b", re.IGNORECASE)
_CODE: Final = re.compile(r"<Code>(\w{1,60})</Code>")
#: Where each kind of storage finds another endpoint.
ENDPOINTS: Final[Mapping[str, tuple[str, ...]]] = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
}
_LOG_IN: Final[Mapping[str, str]] = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a "
    "public bucket",
    "gs": "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS, or "
    "GOOGLE_SKIP_SIGNATURE=true for a public bucket",
}


@dataclass(frozen=True, slots=True)
class ObjectAddress:
    """The address of a model in an object store; `prefix` is a directory's or a file's key."""

    scheme: str
    bucket: str
    prefix: str

    @classmethod
    def parse(cls, text: str) -> ObjectAddress | None:
        """Return the address in `text`, None if it has another scheme.

        Raises `InvalidReferenceError` for an invalid bucket or key.
        """
        scheme, separator, rest = text.strip().partition("://")
        scheme = {"gcs": "gs"}.get(scheme, scheme)
        if not separator or scheme not in ENDPOINTS:
            return None
        bucket, _, prefix = rest.partition("/")
        prefix = prefix.rstrip("/")
        if not _BUCKET.match(bucket):
            raise _invalid(text, f"{bucket[:100]!r} is not a bucket" if bucket else "no bucket")
        try:
            return cls(scheme, bucket, checked_path(prefix) if prefix else "")
        except UnsafePathError as error:
            raise _invalid(text, str(error)) from None

    @property
    def is_file(self) -> bool:
        """Whether the address names one GGUF or DDUF file."""
        return self.prefix.lower().endswith(_SINGLE)

    @property
    def directory(self) -> str:
        """The key of the directory: for a file, of the one that contains it."""
        return self.prefix.rpartition("/")[0] if self.is_file else self.prefix

    # What `selection.choose` asks of a name.

    @property
    def quantization(self) -> None:
        """None: a file's own address selects it."""
        return None

    @property
    def example(self) -> str:
        """How to name one of several files."""
        return f"{self.scheme}://{self.bucket}/{self.directory and self.directory + '/'}FILE.gguf"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")


def _invalid(text: str, problem: str) -> InvalidReferenceError:
    return InvalidReferenceError(
        f"invalid address {text[:300]!r}: {problem}",
        reference=text,
        hint="write s3://BUCKET/PREFIX or gs://BUCKET/PREFIX",
    )


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object: its key, its path below the address, and its ETag, by which it is read."""

    key: str
    path: str
    size: int
    etag: str
    modified: datetime


@dataclass(frozen=True, slots=True)
class Bucket:
    """An open connection to the bucket of an address."""

    address: ObjectAddress
    _store: S3Store | GCSStore = field(repr=False)

    def objects(self) -> tuple[StoredObject, ...]:
        """Return the objects under the address, sorted by path.

        Raises `NotFoundError` for no bucket and no objects, `UnsafePathError` for a key that is no
        path, `UnsupportedError` for more than `MAX_OBJECTS`, `AuthError`, `DeniedError` and
        `RemoteUnavailableError`.
        """
        import obstore

        directory = self.address.directory
        what = f"the objects of {self.address}"
        found: list[StoredObject] = []
        with _translated(what, self.address):
            listed = obstore.list(self._store, prefix=directory or None)
            for entry in (entry for entries in listed for entry in entries):
                if len(found) == MAX_OBJECTS:
                    raise UnsupportedError(f"more than {MAX_OBJECTS} objects", path=what)
                key = entry["path"]
                path = checked_path(key.removeprefix(f"{directory}/") if directory else key)
                etag = entry["e_tag"]
                if not etag:
                    raise RegistryError(f"{what}: {key!r} has no ETag")
                found.append(StoredObject(key, path, entry["size"], etag, entry["last_modified"]))
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
        import obstore

        what = f"{self.address.scheme}://{self.address.bucket}/{one.key}"
        if part.exists() and part.stat().st_size == one.size:
            return
        with map_os_errors("write", part), part.open("ab") as stream:
            done = stream.tell()
            if done > one.size:
                stream.truncate(done := 0)
            options: Any = {"if_match": one.etag}
            if done:
                options["range"] = {"offset": done}
            if done < one.size:
                with _translated(what, self.address):
                    response = obstore.get(self._store, one.key, options=options)
                    for chunk in response.stream(min_chunk_size=_CHUNK):
                        watch.stop.check()
                        if rate is not None:
                            rate.wait(len(chunk), watch.stop)
                        done += stream.write(chunk)
                        if done > one.size:
                            break
                        report = Progress(Action.FETCH, one.path, None, done, one.size)
                        watch.report(report)
        if done != one.size:
            part.unlink()
            raise SizeMismatchError(
                f"{what}: expected {one.size} bytes, got {'more' if done > one.size else done}",
                expected=str(one.size),
                got=str(done),
            )


def part_name(one: StoredObject) -> str:
    """Return the name of an object's download: another for each content that it may have."""
    text = f"{one.key}\0{one.etag}\0{one.size}"
    return f"{hashlib.sha256(text.encode()).hexdigest()}.part"


def open_bucket(
    address: ObjectAddress,
    *,
    insecure: frozenset[str] = frozenset(),
    environ: Mapping[str, str] = os.environ,
) -> Bucket:
    """Return the bucket of an address; plain http is for this machine and `insecure` hosts.

    Raises `UsageError` if obstore is not installed and for an invalid endpoint or setting.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import GCSStore, S3Store
    except ModuleNotFoundError:
        raise UsageError(
            f"{address}: obstore is not installed", hint="run pip install 'modelpack[cloud]'"
        ) from None
    client: Any = {
        "allow_http": _is_plain(address, insecure, environ),
        "connect_timeout": timedelta(seconds=10),
        "read_timeout": timedelta(seconds=READ_SECONDS),
        "timeout": timedelta(days=7),  # of a whole object
    }
    retry: Any = {"max_retries": 4, "retry_timeout": timedelta(seconds=90)}
    kind = S3Store if address.scheme == "s3" else GCSStore
    try:
        made = kind(address.bucket, client_options=client, retry_config=retry)
    except (BaseError, OSError, ValueError) as error:
        raise UsageError(f"{address}: {_first_line(error)}") from None
    return Bucket(address, made)


def _is_plain(address: ObjectAddress, insecure: frozenset[str], environ: Mapping[str, str]) -> bool:
    """Return whether the endpoint of the environment uses plain http, and may."""
    from modelpack.registry.urls import is_local  # imports requests

    plain = False  # obstore decides which of several variables it uses, so each is checked
    for name in ENDPOINTS[address.scheme]:
        endpoint = environ.get(name, "")
        if not endpoint:
            continue
        try:
            parts = urlsplit(endpoint)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise UsageError(
                f"{name} is not the address of a server", hint="set it to https://HOST[:PORT]"
            )
        if parts.scheme == "http" and not is_local(parts.netloc) and parts.netloc not in insecure:
            raise UsageError(
                f"{name}: {parts.netloc} would get credentials over plain http",
                hint=f"use https, or --insecure {parts.netloc}",
            )
        plain = plain or parts.scheme == "http"
    return plain


def _parents(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path


def _first_line(error: BaseException) -> str:
    # Further lines are of Rust's debug output.
    return str(error).partition("\n")[0][:500]


@contextmanager
def _translated(what: str, address: ObjectAddress) -> Iterator[None]:
    """Turn the errors of obstore into ours; addresses and headers of requests are left out."""
    from obstore import exceptions

    try:
        yield
    except exceptions.PreconditionError:
        raise SourceChangedError(
            f"{what}: the object was replaced while it was read", hint="import the model again"
        ) from None
    except exceptions.InvalidPathError as error:
        key = re.search(r'path "(.{0,200}?)"', str(error), re.IGNORECASE)
        raise UnsafePathError(
            f"{what}: the key {key[1] if key else ''!r} is not a path", got=key[1] if key else ""
        ) from None
    except FileNotFoundError:
        raise NotFoundError(f"{what}: not found", hint="check the bucket and the key") from None
    except (exceptions.BaseError, OSError) as error:
        raise _error(what, address, str(error)) from None


def _error(what: str, address: ObjectAddress, said: str) -> RegistryError:
    status, code = _STATUS.search(said), _CODE.search(said)
    number = int(status[1]) if status else None
    shown = f"{number or ''}{' ' + code[1] if code else ''}".strip()
    if (code and code[1] == "NoSuchBucket") or (number == 404 and not code):
        return NotFoundError(f"{what}: no such bucket", status_code=number, hint="check its name")
    denied: type[RegistryError] | None = {401: AuthError, 403: DeniedError}.get(number or 0)
    if code and code[1].endswith("Token"):  # 400 ExpiredToken
        denied = AuthError
    if denied is not None:
        return denied(f"{what}: denied: {shown}", status_code=number, hint=_LOG_IN[address.scheme])
    if number is None or (number < 500 and number != 429):
        # The key in a URL may have these words: tokenizer.json.
        if not code and _CREDENTIALS.search(_URL.sub("", said)):
            return AuthError(f"{what}: no credentials were found", hint=_LOG_IN[address.scheme])
        if number is not None:
            return RegistryError(f"{what}: the server answered {shown}", status_code=number)
    why = f"the server answered {shown}" if shown else "the server did not answer"
    return RemoteUnavailableError(f"{what}: {why}", status_code=number)
