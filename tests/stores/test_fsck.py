"""The problems that a check finds, and its repairs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import encode
from modelpack.artifacts.manifest import Manifest
from modelpack.errors import InterruptedTransferError
from modelpack.store import blobs, fsck
from modelpack.store.file_copy import hash_file
from modelpack.store.filesystem import open_own
from modelpack.store.fsck import Fault, Problem
from modelpack.store.layout import LayoutStore
from modelpack.store.tree import label
from tests.contract.parts import SmallModel, Watcher, blob_of, small_model, write_blobs, write_model
from tests.stores.test_gc import about

X, Y = "docker.io/ai/x:latest", "docker.io/ai/y:latest"


@pytest.fixture
def model(store: LayoutStore) -> SmallModel:
    """A model x, and a model y that shares its first layer."""
    made = small_model(b"shared", b"weights")
    write_model(store, made, X)
    write_model(store, small_model(b"shared", b"other"), Y)
    return made


def overwrite(store: LayoutStore, digest: Digest, content: bytes) -> Path:
    path = store.root / "blobs" / "sha256" / digest.encoded
    path.chmod(0o644)
    path.write_bytes(content)
    return path


def problems(store: LayoutStore, *, fast: bool = False) -> tuple[Problem, ...]:
    return store.fsck(fast=fast, watch=Watcher().watch).problems


def test_a_sound_store(store: LayoutStore, model: SmallModel, watcher: Watcher) -> None:
    report = store.fsck(watch=watcher.watch)
    assert report.ok
    assert report.checked == 7
    sizes = [path.stat().st_size for path in (store.root / "blobs" / "sha256").iterdir()]
    assert report.bytes_checked == sum(sizes)
    assert {r.digest for r in watcher.of("verify")} == set(store._blobs.digests())


def test_a_fast_check_reads_manifests_only(store: LayoutStore, model: SmallModel) -> None:
    report = store.fsck(fast=True, watch=Watcher().watch)
    assert report.ok
    assert report.checked == 7
    assert report.bytes_checked == 2 * len(model.manifest.raw)


def test_a_flipped_bit(store: LayoutStore, model: SmallModel) -> None:
    shared = model.manifest.layers[0]
    overwrite(store, shared.digest, b"sharee")
    assert problems(store, fast=True) == ()
    (problem,) = problems(store)
    assert (problem.kind, problem.digest) == (Fault.CONTENT, shared.digest)
    assert problem.models == (X, Y)
    assert (store.root / "quarantine" / label(shared.digest)).read_bytes() == b"sharee"
    assert not store.has_blob(shared)
    # From now on it is missing, until it is stored again.
    assert [p.kind for p in problems(store)] == [Fault.MISSING]
    write_blobs(store, model)
    assert problems(store) == ()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("content", [b"", b"shar", b"shared and more"])
def test_a_wrong_size(store: LayoutStore, model: SmallModel, fast: bool, content: bytes) -> None:
    overwrite(store, model.manifest.layers[0].digest, content)
    (problem,) = problems(store, fast=fast)
    assert (problem.kind, problem.models) == (Fault.CONTENT, (X, Y))
    assert (store.root / "quarantine").is_dir()


@pytest.mark.parametrize("fast", [True, False])
def test_a_missing_blob(store: LayoutStore, model: SmallModel, fast: bool) -> None:
    store.blob_path(model.manifest.layers[1].digest).unlink()
    store.blob_path(small_model(b"shared", b"other").digest).unlink()
    found = problems(store, fast=fast)
    assert sorted((p.kind, p.models) for p in found) == [
        (Fault.MISSING, (X,)),
        (Fault.MISSING, (Y,)),
    ]


@pytest.mark.parametrize("fast", [True, False])
def test_a_damaged_manifest(store: LayoutStore, model: SmallModel, fast: bool) -> None:
    overwrite(store, model.digest, model.manifest.raw.replace(b"gguf", b"GGUF"))
    (problem,) = problems(store, fast=fast)
    assert (problem.kind, problem.digest, problem.models) == (Fault.CONTENT, model.digest, (X,))


def test_a_descriptor_that_lies_is_no_reason_for_quarantine(store: LayoutStore) -> None:
    model = small_model(b"weights")
    value = json.loads(model.manifest.raw)
    value["layers"][0]["size"] = 8
    raw = encode(value)
    write_blobs(store, model)
    listed = store.write_bytes(raw, media_types.OCI_MANIFEST)
    store.change_index(lambda document: document.with_manifest(listed))
    (problem,) = problems(store, fast=True)
    assert (problem.kind, problem.digest) == (Fault.SIZE, model.manifest.layers[0].digest)
    assert problem.models == (listed.digest.short,)
    assert store.blob_path(model.manifest.layers[0].digest).exists()


def test_a_manifest_that_does_not_parse(store: LayoutStore) -> None:
    listed = store.write_bytes(b'{"schemaVersion":1}', media_types.OCI_MANIFEST)
    store.change_index(lambda document: document.with_manifest(listed))
    for fast in (True, False):
        (problem,) = problems(store, fast=fast)
        assert (problem.kind, problem.digest) == (Fault.MANIFEST, listed.digest)
        assert "schemaVersion" in problem.message
    assert store.blob_path(listed.digest).exists()


def test_files_that_are_no_blobs(store: LayoutStore, model: SmallModel) -> None:
    (store.root / "blobs" / "sha256" / "partial.tmp").write_bytes(b"")
    (problem,) = problems(store)
    assert (problem.kind, problem.digest) == (Fault.STRAY, None)
    assert "partial.tmp" in problem.message


def test_an_index_that_does_not_parse(store: LayoutStore, model: SmallModel) -> None:
    (store.root / "index.json").write_bytes(b"{")
    overwrite(store, model.manifest.layers[0].digest, b"sharee")
    found = problems(store)
    assert [p.kind for p in found] == [Fault.INDEX, Fault.CONTENT], "blobs are checked all the same"


def test_an_entry_that_is_no_descriptor(store: LayoutStore, model: SmallModel) -> None:
    index = store.root / "index.json"
    value = json.loads(index.read_bytes())
    value["manifests"].insert(0, {"mediaType": "x"})
    index.write_text(json.dumps(value))
    (problem,) = problems(store)
    assert problem.kind is Fault.INDEX
    assert "manifests[0]" in problem.message


def test_unreferenced_blobs_are_checked_too(store: LayoutStore) -> None:
    store.write_bytes(b"lost", "text/plain")
    overwrite(store, blob_of(b"lost").digest, b"Lost")
    (problem,) = problems(store)
    assert (problem.kind, problem.models) == (Fault.CONTENT, ())


def test_a_model_removed_meanwhile_misses_nothing(store: LayoutStore, model: SmallModel) -> None:
    watcher = Watcher()

    def remove_once(_: object) -> None:
        if any(stored.digest == model.digest for stored in store.models()):
            LayoutStore(store.root).remove("x")

    watch = replace(watcher.watch, report=remove_once)
    assert store.fsck(watch=watch).ok


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("which", range(2))
def test_a_model_removed_while_a_blob_is_opened(
    store: LayoutStore, model: SmallModel, monkeypatch: pytest.MonkeyPatch, which: int, fast: bool
) -> None:
    opened = []

    def removed(path: Path, *arguments: Any) -> Digest:
        opened.append(path)
        if len(opened) == which + 1:
            LayoutStore(store.root).remove("x")
            store.gc(grace_seconds=0)
        return hash_file(path, *arguments)

    monkeypatch.setattr(fsck, "hash_file", removed)
    assert store.fsck(fast=fast, watch=Watcher().watch).ok
    assert opened


@pytest.mark.parametrize("which", range(2))
def test_a_model_removed_before_a_manifest_is_read(
    store: LayoutStore, model: SmallModel, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    opened = []

    def removed(path: Path, *, follow: bool) -> int:
        opened.append(path)
        if len(opened) == which + 1:
            for name in ("x", "y"):
                LayoutStore(store.root).remove(name)
            store.gc(grace_seconds=0)
        return open_own(path, follow=follow)

    monkeypatch.setattr(blobs, "open_own", removed)
    assert store.fsck(watch=Watcher().watch).ok
    assert opened


def test_a_stop_request_ends_a_check(store: LayoutStore, model: SmallModel) -> None:
    watcher = Watcher()
    watcher.stop.request()
    with pytest.raises(InterruptedTransferError):
        store.fsck(watch=watcher.watch)


def test_a_manifest_of_many_models_is_read_once(store: LayoutStore) -> None:
    model = small_model(b"weights")
    for number in range(5):
        write_model(store, model, f"docker.io/ai/x:v{number}")
    report = store.fsck(fast=True, watch=Watcher().watch)
    assert report.bytes_checked == len(model.manifest.raw)
    assert Manifest.parse(store.fetch_manifest(model.descriptor)) == model.manifest


def test_what_nothing_names_is_reported(store: LayoutStore, model: SmallModel) -> None:
    lost, origin = small_model(b"lost"), small_model(b"by digest")
    write_model(store, lost)
    write_model(store, about(model, b"signature"))
    write_blobs(store, origin)
    store.write_manifest(origin.descriptor, origin.manifest.raw, origin="docker.io/ai/x")
    report = store.fsck(watch=Watcher().watch)
    assert report.ok
    assert report.unnamed == (lost.digest,)
    store.remove(lost.digest.short)
    assert store.fsck(watch=Watcher().watch).unnamed == ()
