"""ModelScope in this process: its list of files, small files itself, others by a redirect.

Shapes: modelscope_hub 0.5.1 (Apache-2.0), _legacy_api.py and _download.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self
from urllib.parse import unquote

from tests.hub.hub import StoredHub, as_json, ranged
from tests.registry.faults import Exchange
from tests.registry.faulty_content import Reply

TOKEN = "ms-for-tests"


class FakeModelScope(StoredHub):
    """The hub. `entries` change single entries of lists, by path."""

    def __enter__(self) -> Self:
        super().__enter__()
        self.entries: dict[str, dict[str, Any]] = {}
        self.is_private = False
        self.short_id = True
        self.content = Api(self)  # type: ignore[assignment]
        return self

    def put(self, repository: str, files: Mapping[str, bytes], revision: str = "master") -> str:
        """Add a commit of these files as `revision`; return it."""
        text = json.dumps([[path, content.hex()] for path, content in sorted(files.items())])
        commit = hashlib.sha1(text.encode()).hexdigest()
        return self.add(repository, commit, files, revision)


class Api:
    """The responses of modelscope.cn."""

    def __init__(self, hub: FakeModelScope) -> None:
        self._hub = hub

    def answer(self, exchange: Exchange) -> Reply:
        parts = unquote(exchange.path).strip("/").split("/")
        if parts[:3] != ["api", "v1", "models"] or len(parts) < 6:
            return Reply(404)
        repository, action = "/".join(parts[3:5]), "/".join(parts[5:])
        known = exchange.headers.get("authorization") == f"Bearer {TOKEN}"
        if self._hub.is_private and not known:
            return self._refused(403, 10010205010, "access denied")
        if not any(name == repository for name, _ in self._hub.files):
            return self._refused(404, 10010205001, "record not found")
        commit = self._hub.revisions.get((repository, exchange.query["Revision"][0]))
        if action == "repo/files":
            return self._list(repository, commit)
        return self._file(exchange, repository, commit or "")

    def _refused(self, status: int, code: int, message: str) -> Reply:
        value = {"Code": code, "Message": message, "RequestId": "x", "Success": False}
        return Reply(status, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _list(self, repository: str, commit: str | None) -> Reply:
        data: dict[str, Any] = {"Files": None, "IsVisual": 0, "LatestCommitter": None}
        if commit is not None:
            files = self._hub.files[repository, commit]
            folders = sorted({path.rpartition("/")[0] for path in files} - {""})
            trees = [{"Path": path, "Name": path, "Type": "tree", "Size": 0} for path in folders]
            entries = [self._entry(path, files[path], commit, at) for at, path in enumerate(files)]
            newest = {"ShortId": commit[:8] if self._hub.short_id else "", "Id": ""}
            data = {"Files": trees + entries, "IsVisual": 0, "LatestCommitter": newest}
        return as_json({"Code": 200, "Data": data, "Message": "success", "Success": True})

    def _entry(self, path: str, content: bytes, commit: str, at: int) -> dict[str, Any]:
        return {
            "Path": path,
            "Name": path.rpartition("/")[2],
            "Type": "blob",
            "Size": len(content),
            "Sha256": hashlib.sha256(content).hexdigest(),
            "IsLFS": len(content) >= 1024,
            "Revision": commit if at == 0 else "f" * 40,  # each has that of its own last change
            **self._hub.entries.get(path, {}),
        }

    def _file(self, exchange: Exchange, repository: str, commit: str) -> Reply:
        path = exchange.query["FilePath"][0]
        content = self._hub.files.get((repository, commit), {}).get(path)
        if content is None:
            return self._refused(404, 10010205001, "record not found")
        if len(content) < 1024:
            return ranged(exchange, content)
        sha256 = hashlib.sha256(content).hexdigest()
        self._hub.objects[sha256] = content
        url = f"{self._hub.storage.url}/lfs/{sha256}?X-Amz-Signature=abc%2Fdef"
        return Reply(302, {"Location": url}, b"")
