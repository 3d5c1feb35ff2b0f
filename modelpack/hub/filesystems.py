"""RemoteFiles: files of any remote file system that has an fsspec implementation.

fsspec (https://filesystem-spec.readthedocs.io) finds the implementation of a scheme among the
installed packages, and gives it the credentials in its own configuration. Only this module imports
it. Its interface cannot read one version of a file: the ETag or time and the size are compared with
the listed ones after the read, and what was read of another version is discarded.

fsspec's own implementations of local files, archives, caches and HTTP are refused. The text of
another package's exception may have credentials, so errors have its kind alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from modelpack.errors import (
    AuthError,
    DeniedError,
    ModelpackError,
    NotFoundError,
    RegistryError,
    RemoteUnavailableError,
    SourceChangedError,
    UnsafePathError,
    UnsupportedError,
    UsageError,
)
from modelpack.hub.objects import CLOUD, ObjectAddress, StoredObject

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_CHUNK: Final = 1024 * 1024
#: Directories below each other, and in all.
MAX_DEPTH: Final = 32
MAX_DIRECTORIES: Final = 10_000
# fsspec's own implementations of files on other machines, and of this process's memory. Its others
# read local files, or files inside of others; HTTP has no lists.
_OWN: Final = frozenset(
    {"arrow_hdfs", "dbfs", "ftp", "hdfs", "memory", "sftp", "smb", "ssh", "webhdfs"}
)
# These do not encrypt, or take any host key: a password would go to whoever answers.
_UNVERIFIED: Final = frozenset({"arrow_hdfs", "ftp", "hdfs", "sftp", "ssh", "webhdfs"})
_CREDENTIALS: Final = re.compile(r"auth|credential", re.IGNORECASE)
# How implementations name an ETag, and the time of the last change.
_ETAGS: Final = ("etag", "e_tag", "ETag", "md5Hash", "content_md5", "crc32c")
_TIMES: Final = (
    "mtime", "modified", "last_modified", "LastModified", "updated", "modify", "created"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RemoteFiles:
    """The directory of an address, as an `ObjectSource`."""

    address: ObjectAddress

    @classmethod
    def opened(cls, address: ObjectAddress, insecure: frozenset[str]) -> RemoteFiles:
        """Return the files of an address.

        Raises `UsageError` for a scheme that is unknown, local or has no package installed, and for
        one that does not verify the server unless the host is this machine or in `insecure`.
        """
        import fsspec

        from modelpack.registry.urls import is_local  # imports requests

        scheme, host = address.scheme, address.bucket.rpartition("@")[2]
        if scheme in ("file", "local"):
            raise UsageError(
                f"{address}: a local file is no object",
                hint="give its path: modelpack package PATH NAME",
            )
        try:
            kind = fsspec.get_filesystem_class(scheme)
        except ValueError:
            raise UsageError(
                f"{address}: unknown scheme {scheme!r}",
                hint=f"use {', '.join(CLOUD)} or install the package with fsspec's implementation",
            ) from None
        except ImportError as error:  # with fsspec's text on what to install
            raise UsageError(
                f"{address}: no implementation of {scheme}:// is installed",
                hint=f"install it next to modelpack; fsspec says: {error}",
            ) from None
        if kind.__module__.startswith("fsspec.") and scheme not in _OWN:
            raise UsageError(
                f"{address}: {scheme}:// is not a remote file system",
                hint="download the files and run modelpack package",
            )
        if scheme in _UNVERIFIED and host not in insecure and not is_local(host):
            raise UsageError(
                f"{address}: {scheme}:// does not verify that it reads from {host!r}",
                hint=f"use --insecure {host or 'HOST'} on a network that you trust",
            )
        return cls(address)

    def listed(self) -> Iterator[tuple[str, int, str, datetime | None]]:
        """Yield the key, size, ETag and time of each file, a directory at a time."""
        what = f"the files of {self.address}"
        directory = self.address.directory
        with _translated(what, self.address):
            files, root = self._connected(directory)
            files.invalidate_cache()
            root = root.rstrip("/")
            pending = [root]
            for path in pending:
                for entry in files.ls(path or root + "/", detail=True):
                    name = str(entry["name"]).rstrip("/")
                    if name == path:  # of a marker, or of a file
                        continue
                    below = name.removeprefix(f"{root}/")
                    if not name.startswith(f"{root}/") or entry["type"] == "link":
                        raise UnsafePathError(f"{what}: {name[:200]!r} is a link or not below it")
                    if entry["type"] == "directory":
                        if below.count("/") == MAX_DEPTH or len(pending) == MAX_DIRECTORIES:
                            raise UnsupportedError(
                                f"{what}: too many directories at {name[:200]!r}"
                            )
                        pending.append(name)
                    elif entry["type"] == "file":
                        if type(entry["size"]) is not int:
                            raise RegistryError(f"{what}: {name[:200]!r} has no size")
                        key = f"{directory}/{below}" if directory else below
                        yield key, entry["size"], *_version(entry)

    def chunks(self, one: StoredObject, offset: int) -> Iterator[bytes]:
        """Yield the bytes of the file from `offset` on; check its version after the last."""
        what = self.address.url(one.key)
        with _translated(what, self.address):
            files, path = self._connected(one.key)
            with files.open(path, "rb") as stream:
                if offset:
                    stream.seek(offset)
                while chunk := stream.read(_CHUNK):
                    yield chunk
            files.invalidate_cache()
            now = files.info(path)
            etag, modified = _version(now)
            same = etag == one.etag if one.etag else modified == one.modified
            if now["size"] != one.size or not same:
                raise SourceChangedError(
                    f"{what}: the file was replaced while it was read",
                    hint="import the model again",
                )

    def _connected(self, key: str) -> tuple[AbstractFileSystem, str]:
        """Return the file system, one for each thread, and its own path of a key."""
        import fsspec

        found: tuple[AbstractFileSystem, str] = fsspec.url_to_fs(self.address.url(key))
        return found


def _version(entry: Mapping[str, Any]) -> tuple[str, datetime | None]:
    """Return the ETag and the time of the last change of a file, empty and None if not stated."""
    etag = next((str(entry[name]) for name in _ETAGS if entry.get(name)), "")
    for name in _TIMES:
        value = entry.get(name)
        if isinstance(value, datetime):
            return etag, value if value.tzinfo else value.replace(tzinfo=UTC)
        if isinstance(value, (int, float)) and 0 < value < 2**33:
            return etag, datetime.fromtimestamp(value, UTC)
    return etag, None


@contextmanager
def _translated(what: str, address: ObjectAddress) -> Iterator[None]:
    """Turn the errors of fsspec's implementations into ours, without their text."""
    hint = f"check the address and what fsspec's implementation of {address.scheme}:// needs"
    try:
        yield
    except ModelpackError:
        raise
    except FileNotFoundError:
        raise NotFoundError(f"{what}: not found", hint="check the host and the path") from None
    except PermissionError:
        raise DeniedError(f"{what}: denied", hint=hint) from None
    except ImportError as error:
        raise UsageError(
            f"{what}: {error.name or 'a package'} is not installed",
            hint=f"install it next to modelpack, to read {address.scheme}://",
        ) from None
    except (TypeError, ValueError) as error:  # a setting that is missing, or wrong
        raise UsageError(f"{what}: not opened: {type(error).__name__}", hint=hint) from None
    except Exception as error:  # noqa: BLE001 - implementations raise what they like
        if _CREDENTIALS.search(type(error).__name__):
            raise AuthError(f"{what}: {type(error).__name__}", hint=hint) from None
        why = error.strerror if isinstance(error, OSError) and error.strerror else None
        raise RemoteUnavailableError(f"{what}: {why or type(error).__name__}", hint=hint) from None
