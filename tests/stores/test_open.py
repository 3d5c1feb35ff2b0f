"""The directories that may be a store, and files that opening one does not change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.reference import Reference
from modelpack.errors import NotFoundError, StoreError, UnsafePathError
from modelpack.store.layout import LayoutStore, default_store_root
from tests.contract.parts import Watcher, blob_of, small_model, write_model


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("before", [None, [], ["lost+found"], [".DS_Store", ".lock"]])
def test_an_absent_or_empty_directory_becomes_a_store(
    tmp_path: Path, before: list[str] | None
) -> None:
    root = tmp_path / "deep" / "store"
    if before is not None:
        root.mkdir(parents=True)
        for name in before:
            (root / name).touch()
    store = LayoutStore(root)
    assert json.loads((root / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    assert json.loads((root / "index.json").read_bytes())["manifests"] == []
    assert store.models() == ()


@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": b"mine"},
        {"index.json": b'{"schemaVersion":2,"manifests":[]}'},
        {"blobs/sha256/x": b""},
        {"models.json": b"{}", "layout.json": b"{}"},
    ],
    ids=["a home", "no oci-layout", "blobs only", "Docker's"],
)
@pytest.mark.parametrize("create", [True, False])
def test_another_directory_is_refused_and_left_alone(
    tmp_path: Path, files: dict[str, bytes], create: bool
) -> None:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    before = snapshot(tmp_path)
    with pytest.raises(StoreError, match="not a model store") as caught:
        LayoutStore(tmp_path, create=create)
    assert snapshot(tmp_path) == before
    if "models.json" in files:
        assert "--docker-store" in str(caught.value.hint)


def test_without_create_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no model store"):
        LayoutStore(tmp_path / "absent", create=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("first", ["model", "lease", "tag", "gc", "fsck", "change"])
def test_a_lazy_store_is_made_by_its_first_use_for_writing(tmp_path: Path, first: str) -> None:
    store = LayoutStore(tmp_path / "deep" / "store", lazy=True)
    assert store.models() == store.indexes() == ()
    assert not store.index().entries
    assert store.listing_cache.read() == {}
    store.listing_cache.write({"x": []})
    assert not store.touch_blob(Digest.of(b""))
    store.note_links([])
    with pytest.raises(NotFoundError):
        store.resolve("x")
    assert list(tmp_path.iterdir()) == []

    match first:
        case "model":
            write_model(store, small_model(b"weights"), "docker.io/ai/x:latest")
        case "lease":
            with store.lease([]):
                pass
        case "tag":
            with pytest.raises(NotFoundError):
                store.tag("x", Reference.parse("y"))
        case "gc":
            store.gc()
        case "fsck":
            store.fsck(watch=Watcher().watch)
        case "change":
            store.change_index(lambda document: document)
    reopened = LayoutStore(store.root, create=False)
    assert reopened.index().value == store.index().value
    assert len(reopened.models()) == (first == "model")


def test_a_lazy_store_is_no_other_directory(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(StoreError, match="not a model store"):
        LayoutStore(tmp_path, lazy=True)


def test_a_file_is_no_store(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"mine")
    with pytest.raises(StoreError, match="not a directory"):
        LayoutStore(path)
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "content",
    [b'{"imageLayoutVersion":"1.1.0"}', b'{"imageLayoutVersion":1}', b"{}", b"[]", b"", b"\xff"],
)
def test_another_layout_version_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "oci-layout").write_bytes(content)
    before = snapshot(tmp_path)
    with pytest.raises(StoreError):
        LayoutStore(tmp_path)
    assert snapshot(tmp_path) == before


def test_a_layout_without_index_is_empty_and_can_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "oci-layout").write_bytes(b'{"imageLayoutVersion":"1.0.0"}')
    store = LayoutStore(tmp_path)
    assert store.models() == ()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["oci-layout"], "reading writes nothing"
    model = small_model(b"weights")
    write_model(store, model, "docker.io/ai/x:latest")
    assert store.resolve("x").digest == model.digest


@pytest.mark.parametrize(
    "linked", ["blobs", "blobs/sha256", "ingest", "ingest/leases", "bundles", "ingest/bundles"]
)
def test_directories_that_lead_out_are_refused(tmp_path: Path, linked: str) -> None:
    store = LayoutStore(tmp_path / "store")
    outside = tmp_path / "outside"
    outside.mkdir()
    precious = outside / ("0" * 64)
    precious.write_bytes(b"mine")
    folder = store.root / linked
    folder.mkdir(exist_ok=True)
    for child in sorted(folder.rglob("*"), reverse=True):
        child.rmdir() if child.is_dir() else child.unlink()
    folder.rmdir()
    folder.symlink_to(outside)

    for attempt in (
        lambda: LayoutStore(store.root),
        lambda: store.gc(grace_seconds=0),
        lambda: store.write_bytes(b"x", "text/plain"),
        lambda: store.fsck(watch=Watcher().watch),
        lambda: store.remove("x"),
    ):
        with pytest.raises(UnsafePathError, match="points outside the store"):
            attempt()
    assert precious.read_bytes() == b"mine"
    assert list(outside.iterdir()) == [precious]


def test_a_blob_that_leads_out_is_not_read_and_only_its_link_is_deleted(
    store: LayoutStore, tmp_path: Path
) -> None:
    outside = tmp_path / "secret"
    outside.write_bytes(b"secret")
    blob = blob_of(b"secret")
    (store.root / "blobs" / "sha256" / blob.digest.encoded).symlink_to(outside)
    with pytest.raises(UnsafePathError):
        store.has_blob(blob)
    with pytest.raises(UnsafePathError), store.blob(blob).open():
        pass
    assert not store.fsck(watch=Watcher().watch).ok
    store.gc(grace_seconds=0)
    assert outside.read_bytes() == b"secret"


def test_a_blob_that_is_a_link_inside_the_store_is_read(store: LayoutStore) -> None:
    blob = blob_of(b"weights")
    kept = store.root / "elsewhere"
    kept.write_bytes(b"weights")
    (store.root / "blobs" / "sha256" / blob.digest.encoded).symlink_to("../../elsewhere")
    assert store.has_blob(blob)
    assert store.blob_path(blob.digest).read_bytes() == b"weights"


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    real = LayoutStore(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    linked = LayoutStore(tmp_path / "link")
    digest = linked.write_bytes(b"x", "text/plain").digest
    assert real.blob_path(digest).read_bytes() == b"x"


def test_the_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MODELPACK_STORE", "~/models")
    assert default_store_root() == tmp_path / "models"
    monkeypatch.setenv("MODELPACK_STORE", "")
    place = default_store_root()
    assert place.is_relative_to(tmp_path)
    assert place.parts[-2:] == ("modelpack", "store")
    assert LayoutStore().root == place


def test_digests_become_paths_only_after_they_were_parsed(store: LayoutStore) -> None:
    for text in ("sha256:../../etc/passwd", "md5:" + "0" * 32, "sha256:" + "A" * 64, "sha256:"):
        with pytest.raises(ValueError, match="not a digest"):
            Digest.parse(text)
