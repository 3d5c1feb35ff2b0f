"""What a garbage collection deletes, and what it must keep."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import encode
from modelpack.artifacts.manifest import Index, Manifest
from modelpack.errors import NotFoundError, StoreError
from modelpack.registry_server.uploads import UploadSessions
from modelpack.storage import watching
from modelpack.store.downloads import Partial
from modelpack.store.filesystem import FileLock, draft
from modelpack.store.layout import LayoutStore
from tests.contract.parts import (
    BytesSource,
    SmallModel,
    Watcher,
    blob_of,
    small_model,
    write_blobs,
    write_model,
)

X = "docker.io/ai/x:latest"


def blobs_of(store: LayoutStore) -> set[Digest]:
    return set(store._blobs.digests())


def everything_of(model: SmallModel) -> set[Digest]:
    return {model.digest, *model.contents}


def age(store: LayoutStore, digest: Digest, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(store.root / "blobs" / "sha256" / digest.encoded, (then, then))


def about(subject: SmallModel, note: bytes) -> SmallModel:
    """Return a manifest with a subject."""
    model = small_model(note, artifact_type="application/vnd.example.signature")
    value: dict[str, Any] = json.loads(model.manifest.raw)
    value["subject"] = subject.descriptor.to_json()
    return SmallModel(Manifest.parse(encode(value)), model.contents)


def put(store: LayoutStore, model: SmallModel) -> None:
    """Put a manifest under blobs/ that the index does not list, as other tools may."""
    write_blobs(store, model)
    store.write_bytes(model.manifest.raw, model.descriptor.media_type)


def test_only_what_no_model_needs_goes(store: LayoutStore) -> None:
    tagged, untagged, lost = small_model(b"a"), small_model(b"b"), small_model(b"c")
    write_model(store, tagged, X)
    write_model(store, untagged)
    write_blobs(store, lost)

    report = store.gc(grace_seconds=0)

    assert set(report.removed) == set(lost.contents)
    assert report.bytes_freed == sum(map(len, lost.contents.values()))
    assert blobs_of(store) == everything_of(tagged) | everything_of(untagged)
    assert store.gc(grace_seconds=0).removed == ()


def test_a_dry_run_says_the_same_and_does_nothing(store: LayoutStore) -> None:
    write_blobs(store, small_model(b"c"))
    (store.root / "ingest" / "import-dead.tmp").write_bytes(b"12345")
    before = blobs_of(store)
    dry = store.gc(grace_seconds=0, dry_run=True)
    assert dry.dry_run
    assert blobs_of(store) == before
    assert (store.root / "ingest" / "import-dead.tmp").read_bytes() == b"12345"
    wet = store.gc(grace_seconds=0)
    assert not wet.dry_run
    assert (dry.removed, dry.partials, dry.bytes_freed) == (
        wet.removed,
        wet.partials,
        wet.bytes_freed,
    )
    assert blobs_of(store) == set()


def test_the_grace_period(store: LayoutStore) -> None:
    young, old = blob_of(b"young"), blob_of(b"old")
    for blob, content in ((young, b"young"), (old, b"old")):
        store.write_blob(blob, BytesSource(content), Watcher().watch)
    age(store, old.digest, 3700)
    age(store, young.digest, 3500)
    report = store.gc()
    assert report.removed == (old.digest,)
    assert report.kept == (young.digest,)


@pytest.mark.parametrize(
    "use", ["write_blob", "import_file", "write_bytes", "adopt_file", "touch_blob"]
)
def test_finding_a_blob_useful_makes_it_young(store: LayoutStore, tmp_path: Path, use: str) -> None:
    path, watch = tmp_path / "file", Watcher().watch
    path.write_bytes(b"old")
    blob = blob_of(b"old")
    store.write_blob(blob, BytesSource(b"old"), watch)
    age(store, blob.digest, 9999)
    if use == "write_blob":
        store.write_blob(blob, BytesSource(b"old"), watch)
    elif use == "import_file":
        store.import_file(path, watch)
    elif use == "touch_blob":
        assert store.touch_blob(blob.digest)
        assert not store.touch_blob(Digest("sha256", "0" * 64))
    elif use == "write_bytes":
        store.write_bytes(b"old", "text/plain")
    else:
        store.adopt_file(path, blob, watch, link=True)
    assert store.gc().kept == (blob.digest,)


def test_a_linked_file_is_as_old_as_its_import(store: LayoutStore, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.utime(path, (1, 1))
    digest = store.import_file(path, Watcher().watch, link=True).digest
    assert store.gc().kept == (digest,)
    report = store.gc(grace_seconds=0)
    assert report.removed == (digest,)
    assert report.bytes_freed == 0, "the user's file keeps the bytes"
    assert path.read_bytes() == b"old"


def test_a_lease_keeps_what_it_lists_and_what_is_written_under_it(
    store: LayoutStore, tmp_path: Path
) -> None:
    listed = store.write_bytes(b"listed", "text/plain").digest
    (tmp_path / "file").write_bytes(b"imported")
    with store.lease([listed]):
        imported = store.import_file(tmp_path / "file", Watcher().watch).digest
        fetched = blob_of(b"fetched")
        store.write_blob(fetched, BytesSource(b"fetched"), Watcher().watch)
        written = store.write_bytes(b"written", "text/plain").digest
        everything = {listed, imported, fetched.digest, written}
        assert LayoutStore(store.root).gc(grace_seconds=0).removed == ()
        assert blobs_of(store) == everything
        with store.lease([], growing=False):
            pass
        assert store.gc(grace_seconds=0).removed == ()
    assert set(store.gc(grace_seconds=0).removed) == everything


def test_a_lease_that_does_not_grow(store: LayoutStore) -> None:
    with store.lease([], growing=False):
        digest = store.write_bytes(b"x", "text/plain").digest
        assert store.gc(grace_seconds=0).removed == (digest,)


def test_the_children_of_an_index_stay(store: LayoutStore) -> None:
    child = small_model(b"child")
    put(store, child)
    raw = encode(
        {
            "schemaVersion": 2,
            "mediaType": media_types.OCI_INDEX,
            "manifests": [child.descriptor.to_json()],
        }
    )
    store.write_manifest(Index.parse(raw).descriptor, raw, X)
    assert store.gc(grace_seconds=0).removed == ()
    assert store.resolve(str(child.digest)) == child.descriptor


def test_what_is_said_about_a_model_stays_as_long_as_the_model(store: LayoutStore) -> None:
    model, gone = small_model(b"model"), small_model(b"gone")
    signature = about(model, b"signature")
    of_signature = about(signature, b"of the signature")
    orphan = about(gone, b"orphan")
    write_model(store, model, X)
    for manifest in (signature, of_signature, orphan):
        put(store, manifest)
    assert set(store.gc(grace_seconds=0).removed) == everything_of(orphan)
    store.remove("x")
    assert set(store.gc(grace_seconds=0).removed) == (
        everything_of(signature) | everything_of(of_signature)
    )


def test_a_damaged_manifest_stops_the_collection(store: LayoutStore) -> None:
    model, lost = small_model(b"model"), small_model(b"lost")
    write_model(store, model, X)
    write_blobs(store, lost)
    path = store.blob_path(model.digest)
    path.chmod(0o644)
    path.write_bytes(model.manifest.raw.replace(b"gguf", b"GGUF"))
    before = blobs_of(store)
    with pytest.raises(StoreError, match="which blobs are needed") as caught:
        store.gc(grace_seconds=0)
    assert "fsck" in str(caught.value.hint)
    assert blobs_of(store) == before
    # Once it is in quarantine the blobs are still not up for collection.
    assert not store.fsck(watch=Watcher().watch).ok
    with pytest.raises(StoreError, match="quarantine"):
        store.gc(grace_seconds=0)
    store.remove("x", force=True)
    assert set(store.gc(grace_seconds=0).removed) == {*model.contents, *lost.contents}


def test_a_manifest_that_was_never_there_stops_nothing(store: LayoutStore) -> None:
    lost = small_model(b"lost")
    store.change_index(lambda document: document.with_manifest(small_model(b"x").descriptor))
    write_blobs(store, lost)
    assert set(store.gc(grace_seconds=0).removed) == set(lost.contents)


def test_a_manifest_that_only_others_understand_keeps_all_that_it_mentions(
    store: LayoutStore,
) -> None:
    layer = store.write_bytes(b"layer", "text/plain")
    raw = encode({"schemaVersion": 1, "fsLayers": [{"blobSum": str(layer.digest)}]})
    manifest = store.write_bytes(raw, media_types.DOCKER_MANIFEST)
    store.change_index(lambda document: document.with_manifest(manifest))
    assert store.gc(grace_seconds=0).removed == ()


def test_files_that_are_no_blobs_are_left_alone(store: LayoutStore) -> None:
    strays = [
        store.root / "blobs" / "sha256" / "partial.tmp",
        store.root / "blobs" / "sha256" / ("A" * 64),
        store.root / "blobs" / "readme",
        store.root / "notes.txt",
        store.root / "ingest" / "somebody's.part",
    ]
    for path in strays:
        path.write_bytes(b"mine")
        os.utime(path, (1, 1))
    assert store.gc(grace_seconds=0).removed == ()
    assert all(path.read_bytes() == b"mine" for path in strays)


def test_given_up_downloads_are_reclaimed(store: LayoutStore) -> None:
    fresh, old, done, busy = (blob_of(name) for name in (b"fresh", b"old", b"done", b"busy"))
    store.write_blob(done, BytesSource(b"done"), Watcher().watch)
    parts = {}
    for blob in (fresh, old, done, busy):
        path = store.root / "ingest" / f"sha256-{blob.digest.encoded}.part"
        path.write_bytes(b"123")
        path.with_suffix(".json").write_text("{}")
        parts[blob.digest] = path
    for blob in (old, busy):
        then = time.time() - 8 * 24 * 3600
        os.utime(parts[blob.digest], (then, then))

    with Partial.lock(store._tree, busy.digest).held():
        dry = store.gc(dry_run=True)
        report = store.gc()
    assert dry.partials == report.partials
    assert set(report.partials) == {parts[old.digest].name, parts[done.digest].name}
    assert report.bytes_freed == 6
    assert parts[fresh.digest].exists()
    assert parts[busy.digest].exists()
    for blob in (old, done):
        stem = parts[blob.digest].stem
        assert list((store.root / "ingest").glob(f"{stem}.*")) == []


def test_abandoned_uploads_are_reclaimed(store: LayoutStore) -> None:
    """Uploads of the embedded registry that received nothing for a day."""
    sessions = UploadSessions(store.root / "ingest" / "uploads")
    old, young = (sessions.create("docker.io/ai/x", "sha256") for _ in range(2))
    for session in (old, young):
        writer = session.writer(None)
        writer.append(bytes(10_000))
        writer.close()
    uploads = store.root / "ingest" / "uploads"
    (uploads / "half-made").mkdir()
    (uploads / "manifest-1").write_bytes(b"{}")
    then = time.time() - 25 * 3600
    for path in (uploads / old.id / "data", uploads / "half-made", uploads / "manifest-1"):
        os.utime(path, (then, then))

    dry = store.gc(dry_run=True)
    assert (uploads / old.id / "data").exists()
    report = store.gc()
    gone = {f"uploads/{name}" for name in (old.id, "half-made", "manifest-1")}
    assert set(dry.partials) == set(report.partials) == gone
    assert 12_288 <= dry.bytes_freed == report.bytes_freed
    assert [path.name for path in uploads.iterdir()] == [young.id]

    # A server that had the session detects its removal.
    assert sessions.get("docker.io/ai/x", young.id) is young
    with pytest.raises(NotFoundError):
        sessions.get("docker.io/ai/x", old.id)
    with pytest.raises(NotFoundError):
        old.writer(None)


def test_an_empty_store_has_nothing_to_collect(store: LayoutStore) -> None:
    report = store.gc(grace_seconds=0)
    assert (report.removed, report.kept, report.partials, report.bytes_freed) == ((), (), (), 0)


def test_damaged_copies_go_when_nothing_needs_them(store: LayoutStore) -> None:
    """A copy in quarantine is deleted if its blob is stored again or not needed."""
    model, other = small_model(b"weights"), small_model(b"other")
    write_model(store, model, "docker.io/ai/x:latest")
    write_model(store, other, "docker.io/ai/y:latest")
    for one in (model, other):
        path = store.blob_path(one.manifest.layers[0].digest)
        path.chmod(0o644)
        path.write_bytes(b"?" * path.stat().st_size)
    assert not store.fsck(watch=watching(None)).ok
    aside = store.root / "quarantine"
    assert len(list(aside.iterdir())) == 2
    assert store.gc(grace_seconds=0).partials == ()
    write_blobs(store, model)
    assert len(list(aside.iterdir())) == 1, "a blob that is back needs no damaged copy"
    store.remove("y")
    planned = store.gc(grace_seconds=0, dry_run=True)
    assert len(list(aside.iterdir())) == 1
    report = store.gc(grace_seconds=0)
    assert report.partials == planned.partials
    assert report.bytes_freed == planned.bytes_freed == len(b"other")
    assert list(aside.iterdir()) == []


@pytest.mark.parametrize(("days", "stays"), [(6, True), (8, False)])
def test_what_a_kill_left_of_a_small_file(store: LayoutStore, days: int, stays: bool) -> None:
    """`index.json` may have megabytes."""
    left = draft(store.root / "ingest", "index.json")
    left.write_bytes(bytes(5000))
    then = time.time() - days * 24 * 3600
    os.utime(left, (then, then))
    report = store.gc()
    assert left.exists() == stays
    assert report.partials == (() if stays else (left.name,))


def test_a_bundle_that_its_maker_deletes_meanwhile(
    store: LayoutStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = store.root / "ingest" / "bundles" / f"sha256-{'0' * 64}"
    left.mkdir(parents=True)
    held = FileLock.held

    @contextmanager
    def held_late(lock: FileLock, **options: Any) -> Iterator[None]:
        with held(lock, **options):
            if lock.path.parent == left.parent:
                left.rmdir()
            yield

    monkeypatch.setattr(FileLock, "held", held_late)
    assert store.gc().partials == ()
