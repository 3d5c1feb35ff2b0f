"""kill -9 while a bundle is made or deleted: the store stays sound, a collection frees the rest."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts import media_types
from modelpack.artifacts.manifest import Manifest
from modelpack.operations.resolve import kept_bundle
from modelpack.progress import Stop, silent
from modelpack.storage import Watch
from modelpack.store.filesystem import bytes_used
from tests.faults.instants import kills, seeded
from tests.faults.killed import MIB, NEW, Place, died, unchanged
from tests.registry.faulty import FaultyRegistry
from tests.unpacking.tars import by_tarfile
from tests.weights import write_safetensors

KIT_TAR = "application/vnd.kitops.modelkit.model.v1.tar"
FEW = 4


def packed(place: Place) -> None:
    """Keep NEW, a model whose weights are in an archive and have to be unpacked."""
    folder = place.root / "new"
    write_safetensors(folder / "model.safetensors", random.Random(3).randbytes(MIB))
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    store = place.store
    config = store.write_bytes(
        json.dumps({"manifestVersion": "1.0", "model": {"path": "."}}).encode(),
        media_types.KITOPS_CONFIG,
    )
    layer = store.write_bytes(by_tarfile(content), KIT_TAR)
    manifest = Manifest.build(config, [layer])
    name = str(modelpack.Reference.parse(NEW))
    store.write_manifest(manifest.descriptor, manifest.raw, name)


def check(place: Place, *, gone: bool) -> None:
    """Assert that the store is sound, and that a collection leaves what the models need."""
    place.check()
    store = place.store
    store.gc(grace_seconds=0)
    place.check()
    assert list((place.here / "ingest" / "bundles").glob("*")) == []
    assert len(store.bundles.all()) == (0 if gone else 1)
    used = bytes_used(place.here / "blobs", place.here / "bundles")
    assert used < (1.5 * MIB if gone else 3.5 * MIB)


@pytest.mark.parametrize("times", [FEW, pytest.param(None, marks=pytest.mark.long)])
@pytest.mark.parametrize("what", ["resolve", "rm"])
def test_a_killed_bundle(tmp_path: Path, what: str, times: int | None) -> None:
    times = times or kills()
    with seeded() as chance, FaultyRegistry() as registry:
        place = Place(tmp_path, registry)
        place.prepare()
        packed(place)
        if what == "rm":
            kept_bundle(NEW, store=place.store)
        with unchanged(place):
            whole = place.run(what, NEW)
            assert whole.code == 0, whole.out
            check(place, gone=what == "rm")
        killed = 0
        for _ in range(times):
            with unchanged(place):
                killed += died(place.run(what, NEW, last=chance.randint(1, whole.calls)))
                assert place.store.fsck(watch=Watch(silent, Stop())).ok
                if what == "resolve" or place.whole(NEW):
                    assert place.run(what, NEW).code == 0
                check(place, gone=what == "rm")
        assert killed > 0
