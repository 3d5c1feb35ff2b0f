"""Scenario 29 against real registries: a connection that is lost in the middle of an upload."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from modelpack.registry import BlobOptions, RetryPolicy
from modelpack.storage import Outcome
from modelpack.testing import registry as embedded_registry
from tests.peers import docker_registry
from tests.registry.cutting import CuttingProxy
from tests.registry.sources import Client, Content, read_all

CONTENT = random.Random(29).randbytes(12_000_000)
WHOLE = BlobOptions()
# The registry needs a moment to detect that the connection ended.
PATIENT = RetryPolicy(first_delay=0.5, chance=lambda: 0.0)
CHUNKS = BlobOptions(chunk_size=4_000_000)


def push_through_a_cut(host: str, blobs: BlobOptions) -> int:
    """Upload over a connection that breaks after 60 %; return the bytes that it took."""
    source = Content(CONTENT)
    with (
        CuttingProxy(host, 7_200_000) as proxy,
        Client(proxy.host, blobs=blobs, retry=PATIENT) as client,
    ):
        written = client.repository.write_blob(source.descriptor, source, client.watch)
        assert proxy.has_cut
        assert written is Outcome.WRITTEN
        assert read_all(client.repository, source.descriptor) == CONTENT
        return proxy.uploaded


@pytest.mark.parametrize("blobs", [WHOLE, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.scenario(29)
def test_our_registry_goes_on_where_it_was_cut(blobs: BlobOptions) -> None:
    with embedded_registry() as server:
        assert push_through_a_cut(server.host, blobs) < len(CONTENT) * 1.1


@pytest.mark.parametrize("blobs", [WHOLE, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.scenario(29)
def test_docker_registry_starts_again(blobs: BlobOptions, tmp_path: Path) -> None:
    """docker-registry 2.8.2 keeps the bytes, but not the state that a client needs to resume."""
    with docker_registry(tmp_path / "registry") as host:
        assert push_through_a_cut(host, blobs) < len(CONTENT) * 1.7
