"""An embedded registry with a model of many files that counts requests, and an empty store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.registry_server import RegistryServer, RequestRecord
from modelpack.testing import registry
from tests.models import tiny_safetensors
from tests.scenarios.processes import wait_until


class Records(list[RequestRecord]):
    """The finished requests of an embedded server but those for metrics, recorded in its thread."""

    def add(self, record: RequestRecord) -> None:
        """Add a record; an argument for `on_request`.

        Requests of `settled` may be recorded after the next `forget`.
        """
        if record.path != "/metrics":
            self.append(record)

    def settled(self, server: RegistryServer) -> list[RequestRecord]:
        """Wait until no other request is in progress, and return the requests so far.

        A client may get its response before its request is recorded.
        """
        url = f"http://{server.host}/metrics"
        alone = "\nmodelpack_registry_requests_in_progress 1\n"
        wait_until(lambda: alone in requests.get(url, timeout=20).text, "other requests to end")
        return [record for record in self if record.path != "/v2/"]

    def forget(self, server: RegistryServer) -> None:
        """Delete the records so far."""
        self.settled(server)
        self.clear()


@dataclass
class Published:
    """A model in a registry; `records` are the requests since the last `forget`."""

    server: RegistryServer
    reference: str
    manifest: Manifest
    records: Records
    origin: modelpack.Store
    store: modelpack.Store

    @property
    def digest(self) -> Digest:
        return self.manifest.digest

    @property
    def by_digest(self) -> str:
        return f"{self.reference.rpartition(':')[0]}@{self.digest}"

    def blobs_fetched(self) -> set[str]:
        """Return the digests of the blobs that clients read."""
        done = self.records.settled(self.server)
        paths = [r.path for r in done if r.method == "GET" and r.status in (200, 206)]
        return {path.rpartition("/")[2] for path in paths if "/blobs/" in path}

    def path_digest(self, path: str) -> str:
        [digest] = [str(blob.digest) for blob in self.manifest.layers if blob.filepath == path]
        return digest


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Published]:
    records = Records()
    with registry(tmp_path / "registry", on_request=records.add) as server:
        reference = f"{server.host}/team/many:v1"
        origin = modelpack.Store(tmp_path / "origin")
        request = modelpack.PackageRequest(safetensors_dir=tiny_safetensors(tmp_path))
        made = modelpack.package(reference, request, push=True, store=origin)
        records.forget(server)
        store = modelpack.Store(tmp_path / "store")
        yield Published(server, reference, made.manifest, records, origin, store)
