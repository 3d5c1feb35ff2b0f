"""Every row of the specification's table of endpoints: request, status, required headers."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import requests

from modelpack.artifacts import media_types
from modelpack.registry_server import RegistryServer
from tests.server.conftest import Client, digest_of, errors

BLOB = b"weights"
DIGEST = digest_of(BLOB)
ABSENT = digest_of(b"absent")
CONFIG = digest_of(b"{}")


@dataclass(frozen=True)
class Row:
    method: str
    path: str
    status: int
    headers: dict[str, str] = field(default_factory=dict)  # of the answer; "" is any value
    code: str | None = None
    data: bytes = b""
    sent: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.status}"


SESSION = {"Location": "/v2/rows/m/blobs/uploads/", "Range": "0-0"}
ROWS = [
    # end-1
    Row("GET", "/v2/", 200, {"Content-Type": "application/json"}),
    Row("HEAD", "/v2/", 200),
    Row("GET", "/v2", 200),
    # end-2
    Row("GET", f"blobs/{DIGEST}", 200, {"Docker-Content-Digest": DIGEST, "Content-Length": "7"}),
    Row("HEAD", f"blobs/{DIGEST}", 200, {"Docker-Content-Digest": DIGEST, "Content-Length": "7"}),
    Row("GET", f"blobs/{ABSENT}", 404, code="BLOB_UNKNOWN"),
    Row("HEAD", f"blobs/{ABSENT}", 404),
    # end-3
    Row("GET", "manifests/v1", 200, {"Docker-Content-Digest": "", "Content-Type": "MANIFEST"}),
    Row("HEAD", "manifests/v1", 200, {"Docker-Content-Digest": "", "Content-Length": "SIZE"}),
    Row("GET", "manifests/MANIFEST", 200, {"Docker-Content-Digest": "DIGEST"}),
    Row("HEAD", "manifests/MANIFEST", 200, {"Content-Length": "SIZE"}),
    Row("GET", "manifests/nope", 404, code="MANIFEST_UNKNOWN"),
    Row("HEAD", "manifests/nope", 404),
    Row("GET", f"manifests/{ABSENT}", 404, code="MANIFEST_UNKNOWN"),
    Row("GET", "/v2/rows/other/manifests/v1", 404, code="MANIFEST_UNKNOWN"),
    Row("GET", "/v2/rows/other/manifests/MANIFEST", 404, code="MANIFEST_UNKNOWN"),
    # end-4a, 4b, 4c
    Row("POST", "blobs/uploads/", 202, SESSION),
    Row("POST", "blobs/uploads", 202, SESSION),
    Row("POST", "blobs/uploads/?digest-algorithm=sha512", 202, SESSION),
    Row("POST", "blobs/uploads/?digest-algorithm=md5", 400, code="DIGEST_INVALID"),
    Row(
        "POST",
        f"blobs/uploads/?digest={DIGEST}",
        201,
        {"Location": f"/v2/rows/m/blobs/{DIGEST}", "Docker-Content-Digest": DIGEST},
        data=BLOB,
    ),
    Row("POST", f"blobs/uploads/?digest={ABSENT}", 400, code="DIGEST_INVALID", data=b"others"),
    # end-5, 6, 13, 14: sessions that do not exist; the others are in test_uploads
    Row("PATCH", "blobs/uploads/nope", 404, code="BLOB_UPLOAD_UNKNOWN", data=b"x"),
    Row("PUT", f"blobs/uploads/nope?digest={DIGEST}", 404, code="BLOB_UPLOAD_UNKNOWN"),
    Row("PUT", "blobs/uploads/nope", 400, code="DIGEST_INVALID"),
    Row("GET", "blobs/uploads/nope", 404, code="BLOB_UPLOAD_UNKNOWN"),
    Row("DELETE", "blobs/uploads/nope", 404, code="BLOB_UPLOAD_UNKNOWN"),
    Row(
        "GET",
        "blobs/uploads/5a0b8be9-2a3c-4a47-9f6d-6d7f1b1f7a11",
        404,
        code="BLOB_UPLOAD_UNKNOWN",
    ),
    # end-8a, 8b
    Row("GET", "tags/list", 200, {"Content-Type": "application/json"}),
    Row("GET", "tags/list?n=0", 200),
    Row("GET", "tags/list?n=-1", 400),
    Row("GET", "/v2/rows/other/tags/list", 404, code="NAME_UNKNOWN"),
    # end-9, end-10: nothing to delete
    Row("DELETE", "manifests/nope", 404, code="MANIFEST_UNKNOWN"),
    Row("DELETE", f"manifests/{ABSENT}", 404, code="MANIFEST_UNKNOWN"),
    Row("DELETE", f"blobs/{ABSENT}", 404, code="BLOB_UNKNOWN"),
    # end-11
    Row(
        "POST",
        f"blobs/uploads/?mount={DIGEST}&from=rows/m",
        201,
        {"Location": f"/v2/rows/m/blobs/{DIGEST}", "Docker-Content-Digest": DIGEST},
    ),
    Row("POST", f"blobs/uploads/?mount={DIGEST}", 201),
    Row("POST", f"blobs/uploads/?mount={ABSENT}&from=rows/m", 202, SESSION),
    Row("POST", "blobs/uploads/?mount=sha256:x&from=rows/m", 400, code="DIGEST_INVALID"),
    # end-12a, 12b
    Row("GET", f"referrers/{ABSENT}", 200, {"Content-Type": media_types.OCI_INDEX}),
    Row(
        "GET", f"referrers/{ABSENT}?artifactType=a/b", 200, {"OCI-Filters-Applied": "artifactType"}
    ),
    Row("GET", f"/v2/rows/other/referrers/{ABSENT}", 200, {"Content-Type": media_types.OCI_INDEX}),
    Row("GET", "referrers/sha256:x", 400, code="DIGEST_INVALID"),
    # Docker's extension
    Row("GET", "/v2/_catalog", 200, {"Content-Type": "application/json"}),
    # Everything else
    Row("GET", "/", 404, code="UNSUPPORTED"),
    Row("GET", "/v2/rows/m", 404, code="UNSUPPORTED"),
    Row("GET", "/v2/rows/m/blobs/", 404, code="UNSUPPORTED"),
    Row("POST", "tags/list", 405, {"Allow": ""}, code="UNSUPPORTED"),
    Row("OPTIONS", "manifests/v1", 405, {"Allow": ""}, code="UNSUPPORTED"),
    Row("DELETE", f"blobs/{DIGEST}", 405, {"Allow": ""}, code="DENIED"),
]


@pytest.fixture(scope="module")
def model(server: RegistryServer) -> bytes:
    return Client(server.url, "rows/m").push_model("v1", BLOB)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_row(server: RegistryServer, model: bytes, row: Row) -> None:
    client = Client(server.url, "rows/m")
    path = row.path.replace("MANIFEST", digest_of(model))
    response = client.request(row.method, path, data=row.data, headers=row.sent)
    assert response.status_code == row.status, response.text
    known = {
        "MANIFEST": media_types.OCI_MANIFEST,
        "SIZE": str(len(model)),
        "DIGEST": digest_of(model),
    }
    for name, value in row.headers.items():
        assert response.headers[name].startswith(known.get(value, value)), (name, response.headers)
    if row.code is not None:
        assert errors(response) == [row.code]
        assert response.json()["errors"][0]["message"]
    if row.method == "HEAD":
        assert response.content == b""


def test_every_answer_names_the_api(server: RegistryServer) -> None:
    for path in ("/v2/", "/v2/a/manifests/b", "/nowhere"):
        response = requests.get(server.url + path, timeout=10)
        assert response.headers["Docker-Distribution-Api-Version"] == "registry/2.0"
        assert not [name for name in response.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    "name", ["a/manifests", "manifests", "a/blobs", "blobs/uploads", "tags/list", "a/tags/list/b"]
)
def test_names_may_hold_the_words_of_the_api(server: RegistryServer, name: str) -> None:
    client = Client(server.url, name)
    raw = client.push_model("v1", name.encode())
    assert client.request("GET", "manifests/v1").content == raw
    assert client.request("GET", "tags/list").json() == {"name": name, "tags": ["v1"]}
    content = client.request("GET", f"blobs/{digest_of(name.encode())}").content
    assert content == name.encode()


@pytest.mark.parametrize(
    "name", ["Upper/case", "a//b", "a_-b", "-a", "a.b:5/c", "x" * 256, "a%00b", "..%2f..%2fetc"]
)
def test_bad_names(server: RegistryServer, name: str) -> None:
    url = f"{server.url}/v2/{name}"
    for method, rest in [
        ("GET", "manifests/v1"),
        ("PUT", "manifests/v1"),
        ("DELETE", "manifests/v1"),
        ("GET", f"blobs/{DIGEST}"),
        ("DELETE", f"blobs/{DIGEST}"),
        ("POST", "blobs/uploads/"),
        ("GET", "blobs/uploads/x"),
        ("GET", "tags/list"),
        ("GET", f"referrers/{DIGEST}"),
    ]:
        response = requests.request(method, f"{url}/{rest}", timeout=10)
        assert (response.status_code, errors(response)) == (400, ["NAME_INVALID"]), rest


# Refused before they become part of a path.
@pytest.mark.parametrize(
    "digest",
    [
        "sha256:../../etc",
        "sha256:..%2f..%2fetc",
        "md5:d41d8cd98f00b204e9800998ecf8427e",
        "sha256:" + "A" * 64,
        "sha256:" + "0" * 63,
        "sha512:" + "0" * 64,
        "sha256:",
        ":",
        "sha256:" + "0" * 64 + "%00",
    ],
)
@pytest.mark.scenario(27)
def test_bad_digests(server: RegistryServer, digest: str) -> None:
    client = Client(server.url, "bad/digests")
    requested = [
        ("GET", f"blobs/{digest}"),
        ("HEAD", f"blobs/{digest}"),
        ("DELETE", f"blobs/{digest}"),
        ("GET", f"manifests/{digest}"),
        ("PUT", f"manifests/{digest}"),
        ("DELETE", f"manifests/{digest}"),
        ("GET", f"referrers/{digest}"),
    ]
    if ".." in digest:  # a slash makes it another path
        requested = []
    requested += [
        ("POST", f"blobs/uploads/?digest={digest}"),
        ("POST", f"blobs/uploads/?mount={digest}"),
        ("PUT", f"{client.upload()}?digest={digest}"),
    ]
    for method, path in requested:
        response = client.request(method, path)
        assert response.status_code == 400, (method, path)
        if method != "HEAD":
            assert errors(response) == ["DIGEST_INVALID"]


@pytest.mark.parametrize("tag", [".dot", "-dash", "x" * 129, "ü", "a%20b"])
def test_bad_tags(client: Client, tag: str) -> None:
    """Names that do not exist: nothing can be pushed or deleted by them."""
    response = client.request("GET", f"manifests/{tag}")
    assert (response.status_code, errors(response)) == (404, ["MANIFEST_UNKNOWN"])
    assert client.request("HEAD", f"manifests/{tag}").status_code == 404
    for method in ("PUT", "DELETE"):
        response = client.request(method, f"manifests/{tag}")
        assert (response.status_code, errors(response)) == (400, ["MANIFEST_INVALID"])
