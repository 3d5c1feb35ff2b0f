"""One store, several commands at once."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

import modelpack
from tests.models import tiny_gguf
from tests.registry.faults import held_until
from tests.scenarios.processes import finish, run, start, wait_until
from tests.scenarios.published import Published

pytestmark = pytest.mark.long


@pytest.mark.scenario(20)
def test_two_pulls_of_one_model(published: Published, tmp_path: Path) -> None:
    """One download on the wire, both end well, one copy."""
    release = threading.Event()
    published.registry.faults.add("GET", published.path, held_until(release))
    store = published.store.root
    both = [start("--store", store, "--json", "pull", published.reference) for _ in range(2)]
    manifests = "/manifests/"
    wait_until(lambda: published.registry.count("GET", manifests) == 2, "both to read the manifest")
    wait_until(lambda: published.registry.count("GET", published.path) == 1, "one download")
    release.set()
    ended = [finish(process) for process in both]
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    for blob in published.manifest.blobs:
        assert published.registry.count("GET", f"/blobs/{blob.digest}") == 1
    published.check_whole()
    assert list((store / "ingest").glob("*.part")) == []


@pytest.mark.scenario(21)
def test_eight_tags_at_once(tmp_path: Path) -> None:
    store = modelpack.Store(tmp_path / "store")
    gguf = modelpack.PackageRequest(gguf=tiny_gguf(tmp_path))
    modelpack.package("team/model:v0", gguf, store=store)
    all_of_them = [
        start("--store", store.root, "tag", "team/model:v0", f"team/model:tag{i}") for i in range(8)
    ]
    index = store.root / "index.json"
    reads = 0
    while any(process.poll() is None for process in all_of_them):
        json.loads(index.read_bytes())
        reads += 1
    assert reads > 0
    assert [finish(process).code for process in all_of_them] == [0] * 8
    [model] = store.models()
    assert {name.tag for name in model.references} == {"v0", *(f"tag{i}" for i in range(8))}


@pytest.mark.scenario(22)
def test_a_collection_while_a_pull_runs(published: Published) -> None:
    release = threading.Event()
    published.registry.faults.add("GET", published.path, held_until(release))
    store = published.store
    lost = store.write_bytes(b"rubbish", "text/plain")
    pulling = start("--store", store.root, "pull", published.reference)
    config = store.root / "blobs" / "sha256" / published.manifest.config.digest.encoded
    wait_until(config.exists, "the config to be stored")
    collected = run("--store", store.root, "gc", "--grace", "0", "--json")
    assert collected.code == 0, collected.err
    assert not store.root.joinpath("blobs", "sha256", lost.digest.encoded).exists()
    assert config.exists()
    release.set()
    ended = finish(pulling)
    assert ended.code == 0, ended.err
    published.check_whole()
