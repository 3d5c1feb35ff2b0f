"""An index that lists one manifest thousands of times: it is read once, wherever it is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.registry import Registry, StaticCredentials
from modelpack.registry_server import RegistryServer
from modelpack.registry_server.cache import Upstream
from modelpack.store.blobs import Blobs
from modelpack.store.layout import LayoutStore
from tests.server.conftest import Client, digest_of, index, manifest

pytestmark = pytest.mark.long

TIMES = 20_000


class Reads(Counter[str]):
    """The number of complete reads of each blob of any store."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    counted, read = Reads(), Blobs.read

    def counting(self: Blobs, digest: Digest, what: str, **limit: int) -> bytes:
        counted[str(digest)] += 1
        return read(self, digest, what, **limit)

    monkeypatch.setattr(Blobs, "read", counting)
    return counted


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RegistryServer]:
    with RegistryServer(tmp_path / "store", address="127.0.0.1:0", sparse=True) as served:
        yield served


def about(client: Client, subject: bytes) -> bytes:
    described = {
        "mediaType": media_types.OCI_MANIFEST, "size": len(subject), "digest": digest_of(subject),
    }  # fmt: skip
    return manifest(client.push_blob(b"{}"), [], subject=described)


def repeated(child: bytes, *, sizes: int = 1) -> bytes:
    """An index of `TIMES` entries of one manifest; only the last has the right size of several."""
    entries = json.loads(index(child))["manifests"] * TIMES
    entries = [
        entry | {"size": entry["size"] + (TIMES - number - 1) % sizes}
        for number, entry in enumerate(entries)
    ]
    return json.dumps(json.loads(index()) | {"manifests": entries}).encode()


@pytest.mark.parametrize("sizes", [1, TIMES])
def test_referrers_of_a_registry(server: RegistryServer, reads: Reads, sizes: int) -> None:
    client = Client(server.url, "team/model")
    subject = client.push_model("v1")
    child = about(client, subject)
    client.put_manifest(digest_of(child), child)
    assert client.request("DELETE", f"manifests/{digest_of(child)}").status_code == 202
    client.request("POST", f"blobs/uploads/?digest={digest_of(child)}", data=child)
    raw = repeated(child, sizes=sizes)
    assert client.put_manifest("many", raw, media_types.OCI_INDEX).status_code == 201
    reads.clear()
    response = client.request("GET", f"referrers/{digest_of(subject)}")
    assert [one["digest"] for one in response.json()["manifests"]] == [digest_of(child)]
    assert reads[digest_of(child)] == 1
    assert max(reads.values()) <= 2  # an index is looked into, and may be about another itself


def test_a_cache_fetches_each_child_once(
    server: RegistryServer, reads: Reads, tmp_path: Path
) -> None:
    client = Client(server.url, "team/model")
    child = client.push_model(None)
    assert client.put_manifest("many", repeated(child), media_types.OCI_INDEX).status_code == 201
    with ExitStack() as stack:
        origin = stack.enter_context(Registry(server.host, credentials=StaticCredentials({})))
        cache = stack.enter_context(
            RegistryServer(tmp_path / "cache", address="127.0.0.1:0", upstream=Upstream(origin))
        )
        reads.clear()
        response = Client(cache.url, "team/model").request("GET", "manifests/many")
        assert response.status_code == 200
        assert 0 < max(reads.values()) < 10


def test_referrers_of_a_store(server: RegistryServer, reads: Reads) -> None:
    client = Client(server.url, "team/model")
    subject = client.push_model("v1")
    child = about(client, subject)
    client.put_manifest(digest_of(child), child)
    path = server.store.root / "index.json"
    value = json.loads(path.read_bytes())
    listed = [one for one in value["manifests"] if one["digest"] == digest_of(child)]
    path.write_text(json.dumps(value | {"manifests": value["manifests"] + listed * TIMES}))
    reads.clear()
    [found] = LayoutStore(server.store.root).referrers(Digest.of(subject))
    assert str(found.digest) == digest_of(child)
    assert max(reads.values()) == 1
