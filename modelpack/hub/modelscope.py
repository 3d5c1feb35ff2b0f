"""ModelScopeRepository: the files of a model of ModelScope, at a commit.

API, as modelscope_hub 0.5.1 (Apache-2.0, _legacy_api.py) uses it:

    GET /api/v1/models/{id}/repo/files?Revision={revision}&Recursive=True    the list of files
    GET /api/v1/models/{id}/repo?Revision={revision}&FilePath={path}         a file, or a redirect

The list has the SHA-256 of every file, so its files are read like those of the Hugging Face Hub.
It names the first digits of the newest commit, of which the files that it changed have all. The
server returns no files for an unknown revision, and truncates longer lists silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlencode

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.paths import checked_path
from modelpack.errors import InvalidDigestError, NotFoundError, RegistryError, UnsupportedError
from modelpack.hub.reference import HubReference
from modelpack.hub.repository import MAX_PAGE, HubFile, HubRepository, check_tree, decoded
from modelpack.registry.auth import NOTHING
from modelpack.registry.endpoint import BlobLocation
from modelpack.registry.http_client import HttpClient

#: The entries at which the server cuts a list (REPO_FILES_TRUNCATION_LIMIT of modelscope_hub).
MAX_ENTRIES: Final = 3000
_SHORTEST_ID: Final = 7


class ModelScopeRepository(HubRepository):
    """Files of a repository at a commit; `listed` are its files."""

    def __init__(
        self,
        client: HttpClient,
        endpoint: str,
        reference: HubReference,
        listed: tuple[HubFile, ...],
    ) -> None:
        """`reference` is at a commit if the server returned one, as of `open_modelscope`."""
        super().__init__(client, endpoint, reference)
        self._listed = listed

    def files(self) -> tuple[HubFile, ...]:
        """Return all files of the commit, in the order of the hub."""
        return self._listed

    def _location(self, path: str) -> BlobLocation:
        reference = self.reference
        query = urlencode({"Revision": reference.revision, "FilePath": path})
        url = f"{self._endpoint}/api/v1/models/{reference.repository}/repo?{query}"
        return BlobLocation(self._client, url, f"{path} of {reference}", NOTHING)


def open_modelscope(
    client: HttpClient, endpoint: str, reference: HubReference
) -> ModelScopeRepository:
    """Return the repository at the current commit of its revision, with its list of files.

    Raises `NotFoundError` for no such repository or revision, `UnsafePathError`, `UnsupportedError`
    for a list that may be cut, and what a request raises.
    """
    what = f"the files of {reference}"
    query = urlencode({"Revision": reference.revision, "Recursive": "True"})
    url = f"{endpoint}/api/v1/models/{reference.repository}/repo/files?{query}"
    response = client.request(url, what=what, limit=MAX_PAGE)
    answer = decoded(response.content, dict, what, reference.site.endpoint_variable)
    data = answer.get("Data")
    if answer.get("Success") is False or not isinstance(data, dict):
        said = str(answer.get("Message", ""))[:200]
        raise RegistryError(f"{what}: ModelScope answered {said!r}")
    entries = data.get("Files")
    if not isinstance(entries, list) or not entries:
        raise NotFoundError(
            f"{what}: no such revision: {reference.revision!r}",
            hint="check the revision: a branch, a tag or a commit of the repository",
        )
    if len(entries) >= MAX_ENTRIES:
        raise UnsupportedError(f"has {MAX_ENTRIES} entries or more; the list is cut", path=what)
    blobs = [entry for entry in entries if _is_blob(entry, what)]
    files = tuple(_file(entry, what) for entry in blobs)
    check_tree(files, what)
    commit = _commit(data, blobs)
    if reference.is_commit and commit not in (None, reference.revision):
        raise RegistryError(f"{what}: ModelScope returned another commit: {commit}")
    return ModelScopeRepository(client, endpoint, reference.at(commit or reference.revision), files)


def _is_blob(entry: Any, what: str) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("Path"), str):
        raise RegistryError(f"{what}: an entry without a path")
    return bool(entry.get("Type") == "blob")


def _file(entry: Mapping[str, Any], what: str) -> HubFile:
    path, size, sha256 = checked_path(entry["Path"]), entry.get("Size"), entry.get("Sha256")
    if type(size) is not int or size < 0:
        raise RegistryError(f"{what}: {path!r} has no size")
    if not sha256:
        return HubFile(path, size, "")
    try:
        return HubFile(path, size, "", Digest.parse(f"sha256:{sha256}"))
    except InvalidDigestError as error:
        raise RegistryError(f"{what}: {path!r}: {error}") from None


def _commit(data: Mapping[str, Any], blobs: list[Any]) -> str | None:
    """Return the newest commit, or None if no file has the full commit id."""
    newest = data.get("LatestCommitter")
    start = newest.get("ShortId") if isinstance(newest, dict) else None
    if not isinstance(start, str) or len(start) < _SHORTEST_ID:
        return None
    found = {blob.get("Revision") for blob in blobs}
    commits = [one for one in found if isinstance(one, str) and one.startswith(start)]
    return commits[0] if len(commits) == 1 and len(commits[0]) == 40 else None
