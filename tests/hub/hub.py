"""A Hugging Face Hub in this process, on two hosts: its API, and the storage behind it.

    with FakeHub() as hub:
        hub.put("Org/Model", {"config.json": b"{}", "model.safetensors": weights}, large=...)

It answers as huggingface.co does: which commit a revision is, the files of a commit over pages,
small files itself, large ones by a redirect to signed addresses of `storage`, with the headers that
lead a client of Xet elsewhere. Faults, `requests` and the rest are those of FaultyRegistry.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote

from tests.registry.faults import Exchange
from tests.registry.faulty import FaultyRegistry
from tests.registry.faulty_content import Reply

#: Files from this size on are in LFS, as is what `large` names.
LARGE = 1024
TOKEN = "hf_for_tests"


class StoredHub(FaultyRegistry):
    """A hub with a storage server for large files; a context manager.

    Revisions are by repository and name, files by repository and commit.
    """

    def __enter__(self) -> Self:
        super().__enter__()
        self.storage = FaultyRegistry()
        self.storage.__enter__()
        self.objects: dict[str, bytes] = {}
        self.storage.content = Storage(self.objects)  # type: ignore[assignment]
        self.revisions: dict[tuple[str, str], str] = {}
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.storage.__exit__(kind, error, trace)
        super().__exit__(kind, error, trace)

    def add(self, repository: str, commit: str, files: Mapping[str, bytes], revision: str) -> str:
        """Add a commit of these files as `revision`; return it."""
        self.files[repository, commit] = dict(files)
        for name in (revision, commit):
            self.revisions[repository, name] = commit
        return commit


class FakeHub(StoredHub):
    """The Hugging Face Hub."""

    def __enter__(self) -> Self:
        super().__enter__()
        self.page_size = 3
        self.large: set[str] = set()
        self.downloads: dict[str, Any] = {}  # by repository
        self.details: dict[str, dict[str, Any]] = {}  # of search results, by repository
        self.private: dict[str, str] = {}  # repository -> "private" or "gated"
        self.content = Api(self)  # type: ignore[assignment]
        return self

    def put(self, repository: str, files: Mapping[str, bytes], revision: str = "main") -> str:
        """Add a commit of these files as `revision`; return it."""
        text = json.dumps([[path, git_oid(content)] for path, content in sorted(files.items())])
        commit = hashlib.sha1(f"{repository}{text}".encode()).hexdigest()
        return self.add(repository, commit, files, revision)

    def is_large(self, path: str, content: bytes) -> bool:
        """Return whether a file is kept in storage rather than in git."""
        return len(content) >= LARGE or path in self.large


class Api:
    """The responses of huggingface.co."""

    def __init__(self, hub: FakeHub) -> None:
        self._hub = hub

    def answer(self, exchange: Exchange) -> Reply:
        path = unquote(exchange.path)
        if path == "/api/models":
            return self._search(exchange)
        found = re.match(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)\Z", path)
        if found:
            return self._api(exchange, *found.groups())
        found = re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)\Z", path)
        if found:
            return self._file(exchange, *found.groups())
        return refusal(404, "", "no such page")

    def _search(self, exchange: Exchange) -> Reply:
        [term], [limit] = exchange.query["search"], exchange.query["limit"]
        names = sorted({name for name, _ in self._hub.files if term.lower() in name.lower()})
        counts = self._hub.downloads
        if exchange.query.get("sort") == ["downloads"]:
            names.sort(key=lambda name: -counts[name])
        found = [{"id": name, "downloads": counts[name], **self._hub.details.get(name, {})}
                 for name in names]  # fmt: skip
        return as_json(found[: int(limit)])

    def _api(self, exchange: Exchange, repository: str, what: str, revision: str) -> Reply:
        refused = self._refused(exchange, repository, gate=what == "tree")
        if refused is not None:
            return refused
        commit = self._hub.revisions.get((repository, revision))
        if commit is None:
            return refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if what == "revision":
            return as_json({"id": repository, "sha": commit, "siblings": []})
        return self._tree(exchange, repository, commit)

    def _tree(self, exchange: Exchange, repository: str, commit: str) -> Reply:
        entries = [
            self._entry(path, content)
            for path, content in sorted(self._hub.files[repository, commit].items())
        ]
        folders = {path.rpartition("/")[0] for path in self._hub.files[repository, commit]}
        entries += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
                    for path in sorted(folders) if path]  # fmt: skip
        start = int(exchange.query.get("cursor", ["0"])[0])
        end = start + self._hub.page_size
        headers = {}
        if end < len(entries):
            url = f"{self._hub.url}{exchange.path}?recursive=true&cursor={end}"
            headers["Link"] = f'<{url}>; rel="next"'
        return as_json(entries[start:end], **headers)

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
        if not self._hub.is_large(path, content):
            return entry | {"oid": git_oid(content)}
        sha256 = hashlib.sha256(content).hexdigest()
        return entry | {
            "oid": git_oid(b"pointer to " + sha256.encode()),
            "lfs": {"oid": sha256, "size": len(content), "pointerSize": 134},
            "xetHash": hashlib.sha256(b"xet" + content).hexdigest(),
        }

    def _file(self, exchange: Exchange, repository: str, commit: str, path: str) -> Reply:
        refused = self._refused(exchange, repository, gate=True)
        if refused is not None:
            return refused
        content = self._hub.files.get((repository, commit), {}).get(path)
        if content is None:
            return refusal(404, "EntryNotFound", "Entry not found")
        if not self._hub.is_large(path, content):
            return ranged(exchange, content, ETag=f'"{git_oid(content)}"', X_Repo_Commit=commit)
        sha256 = hashlib.sha256(content).hexdigest()
        self._hub.objects[sha256] = content
        xet = hashlib.sha256(b"xet" + content).hexdigest()
        headers = {
            "Location": f"{self._hub.storage.url}/repos/{sha256}?X-Amz-Signature=abc%2Fdef",
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(content)),
            "X-Linked-Etag": f'"{sha256}"',
            "X-Xet-Hash": xet,
            "Link": f'<{self._hub.url}/api/models/x/xet-read-token/{commit}>; rel="xet-auth"',
        }
        return Reply(302, headers, b"Found. Redirecting")

    def _refused(self, exchange: Exchange, repository: str, *, gate: bool) -> Reply | None:
        known = exchange.headers.get("authorization") == f"Bearer {TOKEN}"
        why = self._hub.private.get(repository)
        if not any(repository == name for name, _ in self._hub.files):
            status = 404 if known else 401
            return refusal(status, "RepoNotFound", "Repository not found")
        if why == "private" and not known:
            return refusal(401, "RepoNotFound", "Invalid username or password.")
        if why == "gated" and gate:
            said = f"Access to model {repository} is restricted."
            return refusal(403 if known else 401, "GatedRepo", said)
        return None


class Storage:
    """The responses of the storage behind the hub: objects by SHA-256, for signed requests only."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self._objects = objects

    def answer(self, exchange: Exchange) -> Reply:
        if exchange.query.get("X-Amz-Signature") != ["abc/def"]:
            return Reply(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
        if "authorization" in exchange.headers:
            return Reply(400, {}, b"<Error><Code>InvalidArgument</Code></Error>")
        content = self._objects.get(exchange.path.rpartition("/")[2])
        return Reply(404) if content is None else ranged(exchange, content)


def git_oid(content: bytes) -> str:
    """Return git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def as_json(value: Any, **headers: str) -> Reply:
    """Return a response of the API."""
    return Reply(200, {"Content-Type": "application/json", **headers}, json.dumps(value).encode())


def refusal(status: int, code: str, message: str) -> Reply:
    """Return an error response, with the headers in which the hub gives the reason."""
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Reply(status, headers, json.dumps({"error": message}).encode())


def ranged(exchange: Exchange, content: bytes, **headers: str) -> Reply:
    """Return the content, or the requested range of it."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    asked = re.match(r"bytes=(\d+)-(\d*)\Z", exchange.headers.get("range", ""))
    if asked is None:
        return Reply(200, named, content)
    start = int(asked[1])
    end = min(int(asked[2] or len(content)), len(content) - 1) + 1
    if start >= len(content):
        return Reply(416, {"Content-Range": f"bytes */{len(content)}"})
    named["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
    return Reply(206, named, content[start:end])
