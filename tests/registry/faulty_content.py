"""The content of the registry in `tests.registry.faulty`, and its correct responses."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.media_types import OCI_INDEX
from modelpack.errors import InvalidDigestError

if TYPE_CHECKING:
    from tests.registry.faults import Exchange
    from tests.registry.faulty import FaultyRegistry

_ROUTE = re.compile(
    r"/v2/(?P<name>.+?)/(?P<kind>blobs/uploads|blobs|manifests|tags|referrers)/(?P<rest>.*)\Z"
)
_RANGE = re.compile(r"bytes=([0-9]+)-([0-9]*)\Z")


@dataclass(frozen=True)
class Reply:
    """An answer; Content-Length is added unless it is among the headers."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def error_reply(status: int, code: str, message: str = "no details", **headers: str) -> Reply:
    """Return an error response of distribution-spec."""
    body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, {"Content-Type": "application/json", **named}, body)


class Content:
    """Blobs, manifests, tags and upload sessions, by repository."""

    def __init__(self, registry: FaultyRegistry) -> None:
        self._registry = registry
        self._numbers = itertools.count(1)
        self.blobs: dict[tuple[str, str], bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.tags: dict[tuple[str, str], str] = {}
        self.sessions: dict[str, bytes] = {}

    def answer(self, exchange: Exchange) -> Reply:
        """Return the response of a correct registry."""
        if exchange.path == "/v2/":
            return Reply(200, {"Content-Type": "application/json"}, b"{}")
        route = _ROUTE.match(exchange.path)
        if route is None:
            return error_reply(404, "NAME_UNKNOWN")
        name, rest = route["name"], route["rest"]
        match route["kind"], exchange.method:
            case "manifests", "GET" | "HEAD":
                return self._get_manifest(name, rest)
            case "manifests", "PUT":
                return self._put_manifest(exchange, name, rest)
            case "manifests", "DELETE":
                return self._delete_manifest(name, rest)
            case "tags", "GET":
                return self._list_tags(exchange, name)
            case "referrers", "GET" if self._registry.referrers_api:
                return self._list_referrers(name, rest)
            case "referrers", _:
                return error_reply(404, "NAME_UNKNOWN")
            case "blobs", "GET" | "HEAD":
                return self._get_blob(exchange, name, rest)
            case "blobs", "DELETE":
                return Reply(202) if self.blobs.pop((name, rest), None) else _unknown_blob()
            case "blobs/uploads", "POST":
                return self._start_upload(exchange, name)
            case "blobs/uploads", _:
                return self._continue_upload(exchange, name, rest)
        return error_reply(405, "UNSUPPORTED")

    def _get_manifest(self, name: str, reference: str) -> Reply:
        digest = self.tags.get((name, reference), reference)
        media_type, raw = self.manifests.get((name, digest), ("", b""))
        if not raw:
            return error_reply(404, "MANIFEST_UNKNOWN", "manifest unknown")
        return Reply(200, {"Content-Type": media_type, "Docker-Content-Digest": digest}, raw)

    def _put_manifest(self, exchange: Exchange, name: str, reference: str) -> Reply:
        digest = str(Digest.of(exchange.body))
        blobs = json.loads(exchange.body)
        for blob in [*blobs.get("layers", []), *filter(None, [blobs.get("config")])]:
            if (name, blob["digest"]) not in self.blobs:
                return error_reply(404, "MANIFEST_BLOB_UNKNOWN", blob["digest"])
        if ":" in reference and reference != digest:
            return error_reply(400, "DIGEST_INVALID")
        self.manifests[name, digest] = exchange.headers["content-type"], exchange.body
        if ":" not in reference:
            self.tags[name, reference] = digest
        headers = {"Location": f"/v2/{name}/manifests/{digest}", "Docker-Content-Digest": digest}
        if self._registry.referrers_api and "subject" in blobs:
            headers["OCI-Subject"] = blobs["subject"]["digest"]
        return Reply(201, headers)

    def _delete_manifest(self, name: str, reference: str) -> Reply:
        if ":" not in reference:
            known = self.tags.pop((name, reference), None)
        else:
            known = self.manifests.pop((name, reference), None) and reference
            self.tags = {k: d for k, d in self.tags.items() if d != reference}
        return Reply(202) if known else error_reply(404, "MANIFEST_UNKNOWN")

    def _list_tags(self, exchange: Exchange, name: str) -> Reply:
        if not any(repository == name for repository, _ in self.manifests):
            return error_reply(404, "NAME_UNKNOWN", "repository name not known to registry")
        last = exchange.query.get("last", [""])[0]
        size = int(exchange.query.get("n", [str(self._registry.page_size)])[0])
        rest = sorted(tag for repository, tag in self.tags if repository == name and tag > last)
        page = rest[:size]
        headers = {"Content-Type": "application/json"}
        if len(rest) > size:
            headers["Link"] = f'</v2/{name}/tags/list?n={size}&last={page[-1]}>; rel="next"'
        return Reply(200, headers, json.dumps({"name": name, "tags": page}).encode())

    def _list_referrers(self, name: str, subject: str) -> Reply:
        found = []
        for (repository, digest), (media_type, raw) in self.manifests.items():
            document = json.loads(raw)
            if repository == name and document.get("subject", {}).get("digest") == subject:
                kind = {"artifactType": document["artifactType"]}
                found.append({"mediaType": media_type, "digest": digest, "size": len(raw), **kind})
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": found}
        return Reply(200, {"Content-Type": OCI_INDEX}, json.dumps(index).encode())

    def _get_blob(self, exchange: Exchange, name: str, digest: str) -> Reply:
        content = self.blobs.get((name, digest))
        if content is None:
            return _unknown_blob()
        headers = {
            "Content-Type": "application/octet-stream",
            "Docker-Content-Digest": digest,
            "Accept-Ranges": "bytes",
        }
        asked = _RANGE.match(exchange.headers.get("range", ""))
        if asked is None:
            return Reply(200, headers, content)
        start = int(asked[1])
        if start >= len(content):
            # Like docker-registry 2.8.2: it announces a body that it does not send.
            lie = {"Content-Length": str(len(content))}
            return Reply(416, {"Content-Range": f"bytes */{len(content)}", **lie})
        end = min(int(asked[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return Reply(206, headers, content[start : end + 1])

    def _start_upload(self, exchange: Exchange, name: str) -> Reply:
        mounted, origin = exchange.query.get("mount"), exchange.query.get("from")
        if mounted and origin and (origin[0], mounted[0]) in self.blobs:
            self.blobs[name, mounted[0]] = self.blobs[origin[0], mounted[0]]
            return Reply(201, {"Location": f"/v2/{name}/blobs/{mounted[0]}"})
        session = f"session-{next(self._numbers)}"
        self.sessions[session] = b""
        return Reply(202, {"Location": self._location(exchange, name, session), "Range": "0-0"})

    def _continue_upload(self, exchange: Exchange, name: str, session: str) -> Reply:
        if session not in self.sessions:
            return error_reply(404, "BLOB_UPLOAD_UNKNOWN", "blob upload unknown to registry")
        location = {"Location": self._location(exchange, name, session)}
        if exchange.method == "DELETE":
            del self.sessions[session]
            return Reply(204)
        held = self.sessions[session]
        claimed = exchange.headers.get("content-range", "")
        if claimed and claimed != f"{len(held)}-{len(held) + len(exchange.body) - 1}":
            at = {"Range": f"0-{max(len(held) - 1, 0)}"}
            return replace(error_reply(416, "BLOB_UPLOAD_INVALID"), headers=location | at)
        content = held + exchange.body
        self.sessions[session] = content
        written = {"Range": f"0-{max(len(content) - 1, 0)}"}
        if exchange.method == "GET":
            return Reply(204, location | written)
        if exchange.method == "PATCH":
            return Reply(202, location | written)
        try:
            digest = Digest.parse(exchange.query["digest"][0])
        except (KeyError, InvalidDigestError):
            return error_reply(400, "DIGEST_INVALID")
        if Digest.of(content, digest.algorithm) != digest:
            self.sessions[session] = b""
            return error_reply(400, "DIGEST_INVALID", "provided digest did not match content")
        del self.sessions[session]
        self.blobs[name, str(digest)] = content
        return Reply(201, {"Location": f"/v2/{name}/blobs/{digest}"})

    def _location(self, exchange: Exchange, name: str, session: str) -> str:
        # Clients must return this query unchanged, with its blank value and escapes.
        path = f"/v2/{name}/blobs/uploads/{session}?_state=a%2Bb%3D%3D&blank="
        return path if self._registry.relative_locations else self._registry.url + path


def _unknown_blob() -> Reply:
    return error_reply(404, "BLOB_UNKNOWN", "blob unknown to registry")
