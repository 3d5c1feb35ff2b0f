"""A registry on a free port, and the requests of its tests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import requests
from blake3 import blake3

from modelpack.artifacts import media_types
from modelpack.registry_server import RegistryServer
from modelpack.testing import registry

OCTETS = {"Content-Type": "application/octet-stream"}


def digest_of(content: bytes, algorithm: str = "sha256") -> str:
    hasher = blake3(content) if algorithm == "blake3" else hashlib.new(algorithm, content)
    return f"{algorithm}:{hasher.hexdigest()}"


@dataclass(frozen=True)
class Client:
    """Plain HTTP to one repository, without the code under test."""

    base: str
    name: str

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        """`path` is relative to the repository, or absolute like a Location."""
        url = path if path.startswith("http") else self.base + self.path(path)
        return requests.request(method, url, timeout=30, **options)

    def path(self, path: str) -> str:
        return path if path.startswith("/") else f"/v2/{self.name}/{path}"

    def upload(self) -> str:
        """Start an upload session; return its location."""
        response = self.request("POST", "blobs/uploads/")
        assert response.status_code == 202, response.text
        return response.headers["Location"]

    def patch(self, location: str, chunk: bytes, first: int | None = None) -> requests.Response:
        headers = dict(OCTETS)
        if first is not None:
            headers["Content-Range"] = f"{first}-{first + len(chunk) - 1}"
        return self.request("PATCH", location, data=chunk, headers=headers)

    def put(self, location: str, digest: str, chunk: bytes = b"", **headers: str) -> Any:
        url = f"{location}?digest={digest}"
        return self.request("PUT", url, data=chunk, headers={**OCTETS, **headers})

    def push_blob(self, content: bytes) -> dict[str, Any]:
        """Push a blob with one POST; return its descriptor."""
        digest = digest_of(content)
        url = f"blobs/uploads/?digest={digest}"
        response = self.request("POST", url, data=content, headers=OCTETS)
        assert response.status_code == 201, response.text
        return {"mediaType": "application/x.test", "size": len(content), "digest": digest}

    def put_manifest(
        self, reference: str, raw: bytes, media_type: str = media_types.OCI_MANIFEST
    ) -> requests.Response:
        headers = {"Content-Type": media_type}
        return self.request("PUT", f"manifests/{reference}", data=raw, headers=headers)

    def push_model(self, reference: str | None, content: bytes = b"weights", **more: Any) -> bytes:
        """Push a manifest of one layer with its blobs; by digest where `reference` is None."""
        raw = manifest(self.push_blob(b"{}"), [self.push_blob(content)], **more)
        response = self.put_manifest(reference or digest_of(raw), raw)
        assert response.status_code == 201, response.text
        return raw


def manifest(config: dict[str, Any], layers: list[dict[str, Any]], **more: Any) -> bytes:
    value = {
        "schemaVersion": 2,
        "mediaType": media_types.OCI_MANIFEST,
        "config": config,
        "layers": layers,
    }
    return json.dumps({**value, **more}).encode()


def index(*manifests: bytes, **more: Any) -> bytes:
    """Return an index of manifests and indexes."""
    entries = [
        {
            "mediaType": json.loads(raw)["mediaType"],
            "size": len(raw),
            "digest": digest_of(raw),
        }
        for raw in manifests
    ]
    value = {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": entries}
    return json.dumps({**value, **more}).encode()


def errors(response: requests.Response) -> list[str]:
    """Return the codes of an error body."""
    return [problem["code"] for problem in response.json()["errors"]]


@pytest.fixture(scope="module")
def server() -> Iterator[RegistryServer]:
    with registry() as running:
        yield running


@pytest.fixture
def client(server: RegistryServer, request: pytest.FixtureRequest) -> Client:
    """A client of a repository for this test only."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name.lower()).strip("-")
    while "--" in name:
        name = name.replace("--", "-")
    return Client(server.url, f"test/{name[:150]}")
