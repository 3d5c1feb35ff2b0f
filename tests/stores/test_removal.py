"""Removal of names, models, and blobs that nothing else needs."""

from __future__ import annotations

import pytest

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Index
from modelpack.artifacts.reference import Reference
from modelpack.errors import ConflictError, LockedError, NotFoundError, StoreError
from modelpack.store.layout import LayoutStore
from tests.contract.parts import BytesSource, SmallModel, Watcher, small_model, write_model
from tests.stores.test_gc import about, blobs_of, everything_of

X, Y = "docker.io/ai/x:latest", "docker.io/ai/y:latest"


def test_the_last_name_takes_the_model_with_it(store: LayoutStore) -> None:
    model = small_model(b"weights")
    write_model(store, model, X)
    store.tag("x", Reference.parse("y"))

    first = store.remove("x")
    assert (first.untagged, first.deleted, first.bytes_freed) == ((X,), (), 0)
    assert store.resolve("y").digest == model.digest

    second = store.remove("y")
    assert (second.untagged, second.deleted) == ((Y,), (model.digest,))
    assert set(second.freed) == set(model.contents)
    assert second.bytes_freed == len(model.manifest.raw) + sum(map(len, model.contents.values()))
    assert blobs_of(store) == set()
    assert store.models() == ()
    with pytest.raises(NotFoundError):
        store.remove("y")


def ids(model_digest: str) -> list[str]:
    encoded = model_digest.removeprefix("sha256:")
    return [model_digest, encoded, encoded[:12], encoded[:7], f"x@{model_digest}"]


@pytest.mark.parametrize("number", range(5))
def test_an_id_with_several_names_needs_force(store: LayoutStore, number: int) -> None:
    model = small_model(b"weights")
    write_model(store, model, X)
    write_model(store, model, Y)
    name = ids(str(model.digest))[number]
    with pytest.raises(ConflictError, match="several names") as caught:
        store.remove(name)
    assert caught.value.exit_code == 7
    assert X in str(caught.value)
    assert Y in str(caught.value)
    assert len(store.get("x").names) == 2

    removal = store.remove(name, force=True)
    assert (removal.untagged, removal.deleted) == ((X, Y), (model.digest,))
    assert blobs_of(store) == set()


@pytest.mark.parametrize("name", [X, None])
def test_an_id_with_one_name_or_none_needs_no_force(store: LayoutStore, name: str | None) -> None:
    model = small_model(b"weights")
    write_model(store, model, name)
    removal = store.remove(model.digest.short)
    assert removal.untagged == ((X,) if name else ())
    assert removal.deleted == (model.digest,)
    assert blobs_of(store) == set()


def test_a_name_removed_by_force_is_still_only_a_name(store: LayoutStore) -> None:
    model = small_model(b"weights")
    write_model(store, model, X)
    write_model(store, model, Y)
    assert store.remove("x", force=True).deleted == ()
    assert store.resolve("y").digest == model.digest


def test_shared_blobs_go_with_the_last_model_in_any_order(store: LayoutStore) -> None:
    one, two = small_model(b"shared", b"one"), small_model(b"shared", b"two")
    for first, second in (("x", "y"), ("y", "x")):
        write_model(store, one, X)
        write_model(store, two, Y)
        gone, left = (one, two) if first == "x" else (two, one)
        removal = store.remove(first)
        assert set(removal.freed) == set(gone.contents) - set(left.contents)
        assert blobs_of(store) == everything_of(left)
        store.remove(second)
        assert blobs_of(store) == set()


def test_what_was_said_about_a_model_goes_with_it(store: LayoutStore) -> None:
    model, other = small_model(b"weights"), small_model(b"other")
    write_model(store, model, X)
    write_model(store, other, Y)
    signature = about(model, b"signature")
    write_model(store, signature)
    write_model(store, about(signature, b"of the signature"))
    write_model(store, about(other, b"another signature"))
    named = about(model, b"a named one")
    write_model(store, named, "docker.io/ai/signature:v1")

    removal = store.remove("x")
    assert removal.deleted[0] == model.digest
    assert len(removal.deleted) == 3
    assert store.resolve("signature:v1").digest == named.digest
    assert len(store.index().entries) == 3


def test_blobs_under_a_lease_stay_for_a_collection(store: LayoutStore) -> None:
    model = small_model(b"shared", b"own")
    write_model(store, model, X)
    shared = model.manifest.layers[0]
    with LayoutStore(store.root).lease([shared.digest]):
        removal = store.remove("x")
        assert shared.digest not in removal.freed
        assert blobs_of(store) == {shared.digest}


def test_a_new_model_is_safe_from_the_removal_of_one_that_shares_its_blobs(
    store: LayoutStore,
) -> None:
    old, new = small_model(b"shared", b"old"), small_model(b"shared", b"new")
    write_model(store, old, X)
    other = LayoutStore(store.root)
    with other.lease([]):
        for blob in new.manifest.unique_blobs:
            other.write_blob(blob, BytesSource(new.contents[blob.digest]), Watcher().watch)
        store.remove("x")
        other.write_manifest(new.descriptor, new.manifest.raw, Y)
    assert store.fsck(watch=Watcher().watch).ok
    assert blobs_of(store) == everything_of(new)


def test_a_model_under_a_lease_needs_force(store: LayoutStore) -> None:
    model = small_model(b"weights")
    write_model(store, model, X)
    with store.lease([model.digest]):
        with pytest.raises(LockedError):
            store.remove("x")
        assert store.resolve("x").digest == model.digest
        assert store.remove("x", force=True).deleted == (model.digest,)


def test_a_broken_model_can_be_removed(store: LayoutStore) -> None:
    model, other = small_model(b"weights"), small_model(b"other")
    write_model(store, model, X)
    write_model(store, other, Y)
    store.blob_path(model.digest).unlink()
    assert store.remove("x").deleted == (model.digest,)
    assert set(store.gc(grace_seconds=0).removed) == set(model.contents)
    assert store.fsck(watch=Watcher().watch).ok


def test_nothing_is_freed_while_another_model_hides_what_it_needs(store: LayoutStore) -> None:
    model, other = small_model(b"weights"), small_model(b"other")
    write_model(store, model, X)
    write_model(store, other, Y)
    path = store.blob_path(other.digest)
    path.chmod(0o644)
    path.write_bytes(b"{}")
    removal = store.remove("x")
    assert removal.deleted == (model.digest,)
    assert removal.freed == ()
    assert set(model.contents) <= blobs_of(store)
    with pytest.raises(NotFoundError):
        store.resolve("x")


def test_a_single_blob_is_deleted_only_if_nothing_needs_it(store: LayoutStore) -> None:
    model = small_model(b"weights")
    write_model(store, model, X)
    lost = store.write_bytes(b"lost", "text/plain").digest
    for needed in everything_of(model):
        with pytest.raises(ConflictError):
            store.delete_blob(needed)
    with LayoutStore(store.root).lease([lost]), pytest.raises(LockedError):
        store.delete_blob(lost)
    assert store.delete_blob(lost)
    assert not store.delete_blob(lost)
    assert blobs_of(store) == everything_of(model)


def write_index(store: LayoutStore, *models: SmallModel, name: str) -> Index:
    for model in models:
        write_model(store, model)
    index = Index.build([model.descriptor for model in models])
    store.write_manifest(index.descriptor, index.raw, name)
    return index


def list_again(store: LayoutStore, *models: SmallModel) -> None:
    """List models without a name, as earlier versions did with those in an index."""
    for model in models:
        store.change_index(lambda document, model=model: document.with_manifest(model.descriptor))


def listed(store: LayoutStore) -> set[Digest]:
    return {entry.digest for entry in store.index().entries}


@pytest.mark.parametrize("earlier", [False, True])
def test_what_an_index_lists_lives_and_dies_with_it(store: LayoutStore, earlier: bool) -> None:
    parts = small_model(b"shared", b"a"), small_model(b"shared", b"b")
    index = write_index(store, *parts, name=X)
    assert listed(store) == {index.digest}
    if earlier:
        list_again(store, *parts)
    write_model(store, about(parts[0], b"signature"))
    before = blobs_of(store)
    store.gc(grace_seconds=0)
    assert blobs_of(store) == before
    assert store.resolve(str(parts[0].digest)) == parts[0].descriptor

    removal = store.remove(X)
    assert removal.deleted[0] == index.digest
    assert listed(store) == set()
    assert blobs_of(store) == set()


@pytest.mark.parametrize("earlier", [False, True])
def test_what_else_is_named_outlives_an_index(store: LayoutStore, earlier: bool) -> None:
    named, both, only = small_model(b"named"), small_model(b"both"), small_model(b"only")
    write_model(store, named, "docker.io/ai/named:latest")
    write_index(store, named, both, only, name=X)
    other = write_index(store, both, small_model(b"other"), name=Y)
    if earlier:
        list_again(store, both, only)
    note = about(named, b"signature")
    write_model(store, note)

    store.remove(X)
    assert blobs_of(store) >= everything_of(named) | everything_of(both) | everything_of(note)
    assert not blobs_of(store) & {only.digest, only.manifest.layers[0].digest}
    assert listed(store) >= {named.digest, note.digest, other.digest}
    assert store.fsck(watch=Watcher().watch).ok
    store.gc(grace_seconds=0)
    assert blobs_of(store) >= everything_of(named) | everything_of(both) | everything_of(note)


def test_a_referrer_stays_listed_though_an_index_lists_it(store: LayoutStore) -> None:
    model = small_model(b"weights")
    write_model(store, model, X)
    note = about(model, b"signature")
    write_index(store, note, name="docker.io/ai/x:sha256-fallback")
    assert [found.digest for found in store.referrers(model.digest)] == [note.digest]


def test_prune_removes_what_no_name_reaches(store: LayoutStore) -> None:
    old, named = small_model(b"shared", b"old"), small_model(b"shared", b"new")
    parts = small_model(b"shared", b"a"), small_model(b"shared", b"b")
    write_model(store, old, X)
    write_model(store, named, X)
    index = write_index(store, *parts, name=Y)
    list_again(store, *parts)
    notes = about(old, b"old's"), about(named, b"named's"), about(parts[0], b"part's")
    for note in (*notes, deep := about(notes[1], b"note's")):
        write_model(store, note)
    before = blobs_of(store)

    planned = store.prune(dry_run=True)
    assert blobs_of(store) == before
    assert store.prune() == planned
    assert set(planned.deleted) == {old.digest, notes[0].digest}
    assert planned.untagged == ()
    gone = (everything_of(old) | everything_of(notes[0])) - everything_of(named)
    assert before - blobs_of(store) == gone
    assert planned.bytes_freed > 0
    kept = (*notes[1:], deep, *parts, named)
    assert listed(store) == {index.digest, *(one.digest for one in kept)}
    assert store.fsck(watch=Watcher().watch).ok
    assert store.prune().deleted == ()


def test_prune_keeps_what_a_lease_reaches(store: LayoutStore) -> None:
    used, other = small_model(b"used"), small_model(b"other")
    note = about(used, b"signature")
    for model in (used, note, other):
        write_model(store, model)
    with LayoutStore(store.root).lease([used.digest]):
        assert store.prune().deleted == (other.digest,)
        assert blobs_of(store) == everything_of(used) | everything_of(note)
    assert set(store.prune().deleted) == {used.digest, note.digest}
    assert blobs_of(store) == set()


def test_a_damaged_manifest_stops_prune(store: LayoutStore) -> None:
    model, other = small_model(b"weights"), small_model(b"other")
    write_model(store, model, X)
    write_model(store, other)
    path = store.blob_path(model.digest)
    path.chmod(0o644)
    path.write_bytes(b"{}")
    with pytest.raises(StoreError, match="damaged"):
        store.prune()
    assert listed(store) == {model.digest, other.digest}
    assert everything_of(other) <= blobs_of(store)
