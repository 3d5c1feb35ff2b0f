"""Nested indexes, as a registry or a client may write them: no operation takes long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.errors import UnsupportedError
from modelpack.operations.archives import archive_of
from modelpack.operations.transfer import TransferOptions, transfer_model
from modelpack.store import manifests as reachability
from modelpack.store.layout import LayoutStore
from tests.contract.parts import Watcher, small_model, write_model

NAME = "docker.io/x/nested:v1"


def nested(store: LayoutStore, depth: int, *, times: int) -> Descriptor:
    """Store a model in `depth` nested indexes, each of which lists its content several times."""
    model = small_model(b"weights")
    write_model(store, model)
    inner = Descriptor(model.descriptor.media_type, model.digest, model.descriptor.size)
    for level in range(depth):
        value = {
            "schemaVersion": 2,
            "mediaType": media_types.OCI_INDEX,
            "manifests": [inner.to_json()] * times,
            "annotations": {"level": str(level)},
        }
        raw = json.dumps(value).encode()
        inner = Descriptor(media_types.OCI_INDEX, Digest.of(raw), len(raw))
        store.write_manifest(inner, raw, NAME if level == depth - 1 else None)
    return inner


def test_what_comes_twice_is_exported_once(tmp_path: Path) -> None:
    store = LayoutStore(tmp_path)
    nested(store, 40, times=2)
    archive = archive_of(store, [NAME], Watcher().watch)
    assert archive.size == sum(map(len, archive.pieces)) < 100_000


def test_what_comes_twice_is_brought_once(tmp_path: Path) -> None:
    store, target = LayoutStore(tmp_path / "a"), LayoutStore(tmp_path / "b")
    index = nested(store, 4, times=50)
    raw, watch = store.fetch_manifest(index), Watcher().watch
    done = transfer_model(store, target, index, raw, NAME, TransferOptions(watch))
    assert (done.model.written, target.resolve(NAME).digest) == (2, index.digest)


def test_indexes_that_are_nested_too_deeply_are_not_brought(tmp_path: Path) -> None:
    store, target = LayoutStore(tmp_path / "a"), LayoutStore(tmp_path / "b")
    index = nested(store, 40, times=2)
    raw, watch = store.fetch_manifest(index), Watcher().watch
    with pytest.raises(UnsupportedError, match="4 levels of indexes"):
        transfer_model(store, target, index, raw, NAME, TransferOptions(watch))
    assert target.models() == target.indexes() == ()


@pytest.mark.long
def test_a_chain_of_indexes_is_no_problem_of_the_store(tmp_path: Path) -> None:
    """Anyone who can push to the embedded registry can create such an index."""
    store = LayoutStore(tmp_path)
    nested(store, 400, times=1)
    assert store.fsck(fast=True, watch=Watcher().watch).ok


def test_a_removal_reads_each_manifest_about_another_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LayoutStore(tmp_path)
    model = small_model(b"weights")
    write_model(store, model, NAME)
    config = store.write_bytes(b"{}", "application/vnd.oci.empty.v1+json")
    subject, about = model.descriptor, []
    for number in range(30):
        value = {
            "schemaVersion": 2,
            "mediaType": media_types.OCI_MANIFEST,
            "artifactType": "application/x.test",
            "config": config.to_json(),
            "layers": [config.to_json()],
            "subject": subject.to_json(),
            "annotations": {"number": str(number)},
        }
        raw = json.dumps(value).encode()
        written = Descriptor(media_types.OCI_MANIFEST, Digest.of(raw), len(raw))
        store.write_manifest(written, raw)
        about.append(written.digest)
        subject = written if number % 2 else model.descriptor
    reads: list[Digest] = []
    parsed = reachability._parsed

    def counted(raw: bytes, descriptor: Descriptor) -> object:
        reads.append(descriptor.digest)
        return parsed(raw, descriptor)

    monkeypatch.setattr(reachability, "_parsed", counted)
    removed = store.remove(NAME)
    assert set(removed.deleted) == {model.digest, *about}
    assert len(reads) < 4 * len(about), "or a thousand signatures would hold the lock for minutes"
