"""Sizes that an upstream's manifest states, which need not be those of the blobs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from modelpack.registry import Registry, RetryPolicy, StaticCredentials
from modelpack.registry_server import RegistryServer
from modelpack.registry_server.cache import Upstream
from tests.server.conftest import Client, manifest

WEIGHTS = os.urandom(3 << 20)
LIES = [1, len(WEIGHTS) - 1, len(WEIGHTS) + 1, 64 << 20]


@pytest.fixture
def clients(tmp_path: Path) -> Iterator[tuple[Client, Client, Path]]:
    """A repository of an upstream that takes any manifest, and the same of its cache."""
    with ExitStack() as stack:
        upstream = stack.enter_context(
            RegistryServer(tmp_path / "upstream", address="127.0.0.1:0", sparse=True)
        )
        origin = stack.enter_context(
            Registry(
                upstream.host,
                credentials=StaticCredentials({}),
                retry=RetryPolicy(tries=2, sleep=lambda _: None),
            )
        )
        cache = stack.enter_context(
            RegistryServer(tmp_path / "cache", address="127.0.0.1:0", upstream=Upstream(origin))
        )
        name = "team/model"
        yield Client(upstream.url, name), Client(cache.url, name), tmp_path / "cache"


@pytest.mark.parametrize("size", LIES)
def test_a_blob_of_another_size_is_the_upstream_s_fault(
    clients: tuple[Client, Client, Path], size: int
) -> None:
    """No byte of the blob is sent or kept, and no space is reserved for its claimed size."""
    upstream, cache, root = clients
    layer = upstream.push_blob(WEIGHTS)
    raw = manifest(upstream.push_blob(b"{}"), [layer | {"size": size}])
    assert upstream.put_manifest("v1", raw).status_code == 201
    assert cache.request("GET", "manifests/v1").status_code == 200
    for headers in ({}, {"Range": "bytes=0-0"}):
        response = cache.request("GET", f"blobs/{layer['digest']}", headers=headers)
        assert response.status_code == 502, response.text
        [error] = response.json()["errors"]
        assert f"expected {size} bytes, got" in error["message"]
    kept = sum(path.stat().st_blocks * 512 for path in root.rglob("*.part"))
    assert kept <= len(WEIGHTS)
    true = manifest(upstream.push_blob(b"{}"), [layer])
    other = Client(upstream.base, "team/other")
    assert other.put_manifest("v1", true).status_code == 201
    honest = Client(cache.base, "team/other")
    assert honest.request("GET", "manifests/v1").status_code == 200
    assert honest.request("GET", f"blobs/{layer['digest']}").content == WEIGHTS
