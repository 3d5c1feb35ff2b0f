"""HubRepository: the files of one repository of the hub, at one commit.

API: `/api/models/{id}/revision/{revision}` returns the commit of a revision,
`/api/models/{id}/tree/{commit}?recursive=true` lists its files over pages (`Link`), and
`/{id}/resolve/{commit}/{path}` returns a file, for large ones by a redirect to storage. Xet, the
hub's own transfer protocol, is not used: the same bytes are available over plain HTTP.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final
from urllib.parse import quote

from modelpack.artifacts.descriptor import Descriptor, size_mismatch
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.paths import checked_path
from modelpack.errors import (
    DigestMismatchError,
    InvalidDigestError,
    RegistryError,
    UnsupportedError,
)
from modelpack.hub.reference import HubReference
from modelpack.registry.auth import NOTHING
from modelpack.registry.blob_download import RemoteBlob, RemoteFile
from modelpack.registry.endpoint import BlobLocation
from modelpack.registry.http_client import HttpClient
from modelpack.registry.manifests import Pages
from modelpack.storage import fill

#: The hub keeps larger files in LFS (10 MB); this leaves room for mirrors with other rules.
MAX_PLAIN_BYTES: Final = 64 * 1024 * 1024
#: Limit on the files of a repository; no manifest could list more.
MAX_FILES: Final = 100_000
MAX_PAGE: Final = 16 * 1024 * 1024
_COMMIT: Final = re.compile(r"[0-9a-f]{40}\Z")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a commit; `sha256` is known if the hub keeps it in LFS or Xet.

    `oid` is the id of git's object: for a file in LFS, that of the pointer. `size` is in bytes.
    """

    path: str
    size: int
    oid: str
    sha256: Digest | None = None


class HubRepository:
    """Files of a repository at a commit, listed and read."""

    def __init__(self, client: HttpClient, endpoint: str, reference: HubReference) -> None:
        """`reference` is at a commit, as `resolve_commit` returns it."""
        self.reference = reference
        self._client = client
        self._endpoint = endpoint

    def files(self) -> tuple[HubFile, ...]:
        """Return all files of the commit, in the order of the hub.

        Raises `UnsafePathError` for an unsafe path, `RegistryError` for a path that is both a file
        and a directory, and what a request raises.
        """
        what = f"the files of {self.reference}"
        url = (
            f"{self._endpoint}/api/models/{self.reference.repository}/tree/"
            f"{self.reference.revision}?recursive=true"
        )
        found: list[HubFile] = []
        for response in Pages(self._client, url, what, limit=MAX_PAGE):
            entries = decoded(response.content, list, what)
            found += [_file(entry, what) for entry in entries if _is_file(entry, what)]
            if len(found) > MAX_FILES:
                raise UnsupportedError(f"more than {MAX_FILES} files", path=what)
        check_tree(found, what)
        return tuple(found)

    def read(self, file: HubFile) -> bytes:
        """Return the bytes of a small file, verified against the list of files.

        Raises `DigestMismatchError`, `SizeMismatchError`, `UnsupportedError` for one too large.
        """
        what = f"{file.path} of {self.reference}"
        if file.size > MAX_PLAIN_BYTES:
            raise UnsupportedError(
                f"has {file.size} bytes and no SHA-256 on the hub; the limit is {MAX_PLAIN_BYTES}",
                path=what,
                hint="ask the owner of the repository to keep the file in LFS or Xet",
            )
        buffer = memoryview(bytearray(file.size + 1))  # one more: the end must follow
        with self.blob(file.path, _unnamed(file)).open() as stream:
            content = bytes(buffer[: fill(stream, buffer)])
        _check(file, content, what)
        return content

    def blob(self, path: str, descriptor: Descriptor) -> RemoteBlob:
        """Return the file at `path` as a source; the caller verifies its bytes."""
        return RemoteBlob(self._location(path), descriptor)

    def open_file(self, file: HubFile) -> RemoteFile:
        """Return a seekable file that is read by range requests."""
        return RemoteFile(self._location(file.path), _unnamed(file))

    def _location(self, path: str) -> BlobLocation:
        reference = self.reference
        url = f"{self._endpoint}/{reference.repository}/resolve/{reference.revision}/{quote(path)}"
        return BlobLocation(self._client, url, f"{path} of {reference}", NOTHING)


def resolve_commit(client: HttpClient, endpoint: str, reference: HubReference) -> HubReference:
    """Return the same model at the current commit of its revision.

    Raises `NotFoundError` for no such repository or revision, `AuthError`, `DeniedError`.
    """
    url = f"{endpoint}/api/models/{reference.repository}/revision/{quote(reference.revision, '')}"
    what = str(reference)
    answer = decoded(client.request(url, what=what, limit=MAX_PAGE).content, dict, what)
    commit = answer.get("sha")
    if not isinstance(commit, str) or not _COMMIT.match(commit):
        raise RegistryError(f"{what}: the hub returned no commit for {reference.revision!r}")
    if reference.is_commit and commit != reference.revision:
        raise RegistryError(f"{what}: the hub returned another commit: {commit}")
    return reference.at(commit)


def _unnamed(file: HubFile) -> Descriptor:
    """Return a descriptor for reading a file, with a zero digest if its SHA-256 is unknown."""
    digest = file.sha256 or Digest("sha256", "0" * 64)
    return Descriptor("application/octet-stream", digest, file.size)


def _check(file: HubFile, content: bytes, what: str) -> None:
    if len(content) != file.size:
        raise size_mismatch(what, file.size, len(content))
    if file.sha256 is not None:
        file.sha256.check(content, what)
        return
    if not file.oid:
        raise RegistryError(f"{what}: the hub states no SHA-256")
    # A git object: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
    hasher = hashlib.sha1(b"blob %d\0" % len(content), usedforsecurity=False)
    hasher.update(content)
    if hasher.hexdigest() != file.oid:
        raise DigestMismatchError(
            f"{what}: expected git's object {file.oid}, got {hasher.hexdigest()}",
            expected=file.oid,
            got=hasher.hexdigest(),
        )


def decoded(raw: bytes, kind: type[Any], what: str, variable: str = "HF_ENDPOINT") -> Any:
    """Return the JSON value in a response; raise `RegistryError` if it is not of this kind."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise RegistryError(
            f"{what}: the hub's response is not a JSON {'array' if kind is list else 'object'}",
            hint=f"check that {variable} is the address of a hub",
        )
    return value


def _is_file(entry: Any, what: str) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise RegistryError(f"{what}: an entry without a path")
    return bool(entry.get("type") == "file")


def check_tree(files: Iterable[HubFile], what: str) -> None:
    # With NUL for `/`, the files of a directory sort right after its name.
    for path, following in pairwise(sorted(file.path.replace("/", "\0") for file in files)):
        if following.startswith(f"{path}\0"):
            shown = path.replace("\0", "/")[:300]
            raise RegistryError(f"{what}: {shown!r} is a file and a directory")


def _file(entry: Mapping[str, Any], what: str) -> HubFile:
    path = checked_path(str(entry["path"]))
    lfs = entry.get("lfs")
    source = lfs if isinstance(lfs, dict) else entry
    size, oid = source.get("size"), entry.get("oid")
    if type(size) is not int or size < 0 or not isinstance(oid, str) or not _COMMIT.match(oid):
        raise RegistryError(f"{what}: {path!r} has no size or no object id")
    if source is entry:
        return HubFile(path, size, oid)
    try:
        return HubFile(path, size, oid, Digest.parse(f"sha256:{source.get('oid')}"))
    except InvalidDigestError as error:
        raise RegistryError(f"{what}: {path!r}: {error}") from None
