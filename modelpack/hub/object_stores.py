"""CloudStorage: objects in S3, Google Cloud Storage and Azure, by obstore.

obstore (the Rust crate object_store) makes the requests, with the credentials and endpoints of its
environment variables. It is one package, where s3fs, gcsfs and adlfs bring sixty. Only this module
imports it, by its own interface: `obstore.fsspec` reads without a condition on the ETag
(tests/hub/test_objects.py shows it), returns a whole directory as one list, and copies an object
through memory or in a request for each piece. Here a download is one request with the listed ETag.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from modelpack.errors import (
    AuthError,
    DeniedError,
    NotFoundError,
    RegistryError,
    RemoteUnavailableError,
    SourceChangedError,
    UnsafePathError,
    UsageError,
)
from modelpack.hub.objects import ObjectAddress, StoredObject

if TYPE_CHECKING:
    from obstore.store import AzureStore, GCSStore, S3Store

#: Seconds without a byte after which a download is retried.
READ_SECONDS: Final = 60
_CHUNK: Final = 1024 * 1024
_STATUS: Final = re.compile(r"status code: (\d{3})")
_URL: Final = re.compile(r"https?://\S+")
_CREDENTIALS: Final = re.compile(r"credential|\btoken\b", re.IGNORECASE)
_NO_BUCKET: Final = ("NoSuchBucket", "ContainerNotFound")
_CODE: Final = re.compile(r"<Code>(\w{1,60})</Code>")
#: Where each kind of storage finds another endpoint.
ENDPOINTS: Final[Mapping[str, tuple[str, ...]]] = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "AZURITE_BLOB_STORAGE_URL"),
}
_LOG_IN: Final[Mapping[str, str]] = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a "
    "public bucket",
    "gs": "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS, or "
    "GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or AZURE_USE_AZURE_CLI=true "
    "after az login, or AZURE_SKIP_SIGNATURE=true for a public container",
}


@dataclass(frozen=True, slots=True)
class CloudStorage:
    """The bucket of an address, as an `ObjectSource`."""

    address: ObjectAddress
    store: S3Store | GCSStore | AzureStore

    @classmethod
    def opened(
        cls, address: ObjectAddress, insecure: frozenset[str], environ: Mapping[str, str]
    ) -> CloudStorage:
        """Return the bucket; raise `UsageError` without obstore and for invalid settings."""
        try:
            from obstore.exceptions import BaseError
            from obstore.store import AzureStore, GCSStore, S3Store
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
        kind = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[address.scheme]
        try:
            made = kind(address.bucket, client_options=client, retry_config=retry)
        except (BaseError, OSError, ValueError) as error:
            raise UsageError(f"{address}: {_first_line(error)}") from None
        return cls(address, made)

    def listed(self) -> Iterator[tuple[str, int, str, datetime]]:
        """Yield the key, size, ETag and time of each object, in pages."""
        import obstore

        what = f"the objects of {self.address}"
        with _translated(what, self.address):
            listed = obstore.list(self.store, prefix=self.address.directory or None)
            for entry in (entry for entries in listed for entry in entries):
                if not (etag := entry["e_tag"]):
                    raise RegistryError(f"{what}: {entry['path']!r} has no ETag")
                yield entry["path"], entry["size"], etag, entry["last_modified"]

    def chunks(self, one: StoredObject, offset: int) -> Iterator[bytes]:
        """Yield the bytes of the object from `offset` on, of the version with its ETag only."""
        import obstore

        options: Any = {"if_match": one.etag}
        if offset:
            options["range"] = {"offset": offset}
        with _translated(self.address.url(one.key), self.address):
            response = obstore.get(self.store, one.key, options=options)
            yield from response.stream(min_chunk_size=_CHUNK)


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
    if (code and code[1] in _NO_BUCKET) or (number == 404 and not code):
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
