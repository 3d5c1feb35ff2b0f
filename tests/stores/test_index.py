"""`index.json`: tags, and entries of other tools."""

from __future__ import annotations

import json
import os
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.reference import Reference
from modelpack.errors import (
    AmbiguousError,
    DigestMismatchError,
    NotFoundError,
    StoreError,
    UsageError,
)
from modelpack.store import index
from modelpack.store.index import IndexDocument
from modelpack.store.layout import LayoutStore
from modelpack.store.manifests import Manifests
from tests.contract.parts import small_model, write_blobs, write_model

X, Y = "docker.io/ai/x:latest", "docker.io/ai/y:latest"


def index_of(store: LayoutStore) -> Any:
    return json.loads((store.root / "index.json").read_bytes())


def add_to_index(store: LayoutStore, *entries: Any, **fields: Any) -> None:
    value = index_of(store)
    value["manifests"] += entries
    (store.root / "index.json").write_text(json.dumps({**value, **fields}))


def test_an_entry_holds_the_full_reference_and_the_artifact_type(store: LayoutStore) -> None:
    model = small_model(b"weights", artifact_type=media_types.CNCF_MANIFEST)
    write_model(store, model, X)
    assert index_of(store) == {
        "schemaVersion": 2,
        "mediaType": media_types.OCI_INDEX,
        "manifests": [
            {
                "mediaType": media_types.OCI_MANIFEST,
                "size": len(model.manifest.raw),
                "digest": str(model.digest),
                "annotations": {media_types.REF_NAME: X},
                "artifactType": media_types.CNCF_MANIFEST,
            }
        ],
    }
    assert store.resolve("x").artifact_type == media_types.CNCF_MANIFEST
    assert store.resolve("x").annotations == {}


def test_one_entry_for_each_tag_and_one_without_when_there_is_none(store: LayoutStore) -> None:
    model, other = small_model(b"weights"), small_model(b"other")
    write_model(store, model)
    assert len(index_of(store)["manifests"]) == 1
    store.tag(str(model.digest), Reference.parse("x"))
    store.tag("x", Reference.parse("y"))
    store.tag("x", Reference.parse("y"))
    assert len(index_of(store)["manifests"]) == 2
    write_model(store, other, X)
    store.tag("x", Reference.parse("y"))

    assert [e.get("annotations") for e in index_of(store)["manifests"]] == [
        None,
        {media_types.REF_NAME: X},
        {media_types.REF_NAME: Y},
    ]
    assert store.get(str(model.digest)).names == ()
    assert store.get("x").names == (X, Y)


def test_what_other_tools_wrote_stays(store: LayoutStore) -> None:
    foreign = [
        {"mediaType": "application/x-unknown", "digest": "md5:0", "size": 1, "annotations": {}},
        "not even an object",
        {
            "mediaType": media_types.OCI_INDEX,
            "digest": "sha256:" + "5" * 64,
            "size": 7,
            "platform": {"architecture": "arm64", "os": "linux"},
            "annotations": {media_types.REF_NAME: "v1", "x": "<&>"},
            "extra": [1.5, None],
        },
    ]
    add_to_index(store, *foreign, annotations={"a": "b"}, unknown={"deep": [1]})
    model = small_model(b"weights")
    write_model(store, model, X)
    store.tag("x", Reference.parse("y"))
    store.remove("x")

    value = index_of(store)
    assert value["manifests"][:3] == foreign
    assert (value["annotations"], value["unknown"]) == ({"a": "b"}, {"deep": [1]})
    assert [e["digest"] for e in value["manifests"][3:]] == [str(model.digest)]


def test_short_names_of_other_tools_are_found(store: LayoutStore) -> None:
    model = small_model(b"weights")
    write_model(store, model)
    value = index_of(store)
    value["manifests"][0]["annotations"] = {media_types.REF_NAME: "v1"}
    (store.root / "index.json").write_text(json.dumps(value))
    assert store.resolve("v1").digest == model.digest
    store.tag("v1", Reference.parse("x"))
    assert store.get("x").names == (X, "v1")
    assert store.remove("v1").untagged == ("v1",)
    assert store.resolve("x").digest == model.digest


def test_dockers_full_name_counts_before_its_bare_tag(store: LayoutStore) -> None:
    one, two = small_model(b"one"), small_model(b"two")
    for model in (one, two):
        write_model(store, model)
    value = index_of(store)
    for entry, name in zip(value["manifests"], (X, Y), strict=True):
        entry["annotations"] = {media_types.REF_NAME: "latest", media_types.CONTAINERD_NAME: name}
    (store.root / "index.json").write_text(json.dumps(value))
    assert store.resolve("x").digest == one.digest
    assert store.resolve("y").digest == two.digest
    store.tag("x", Reference.parse("y"))
    assert store.get(str(two.digest)).names == ()
    assert media_types.CONTAINERD_NAME not in json.dumps(index_of(store)["manifests"][1])


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"manifests":{}}', b'{"manifests":[],"manifests":[]}', b"\xff\xfe"],
)
def test_a_damaged_index_is_an_error_and_never_overwritten(
    store: LayoutStore, content: bytes
) -> None:
    model = small_model(b"weights")
    write_model(store, model, X)
    path = store.root / "index.json"
    path.write_bytes(content)
    for attempt in (
        store.models,
        lambda: store.resolve("x"),
        lambda: store.tag("x", Reference.parse("y")),
        lambda: store.remove("x"),
        lambda: store.gc(grace_seconds=0),
        lambda: store.write_manifest(model.descriptor, model.manifest.raw, Y),
    ):
        with pytest.raises(StoreError, match=r"index\.json"):
            attempt()
    assert path.read_bytes() == content
    assert store.has_blob(model.manifest.layers[0])


def test_changes_of_the_file_are_seen_at_once(store: LayoutStore) -> None:
    other = LayoutStore(store.root)
    for number in range(20):
        model = small_model(bytes([number]))
        write_model(store, model, X)
        assert other.resolve("x").digest == model.digest
        assert len(other.models()) == number + 1


def test_names_with_a_digest_must_have_the_right_one(store: LayoutStore) -> None:
    model, other = small_model(b"weights"), small_model(b"other")
    write_model(store, model, f"{X}@{model.digest}")
    assert store.get("x").names == (X,)
    with pytest.raises(DigestMismatchError):
        write_model(store, other, f"{Y}@{model.digest}")
    with pytest.raises(DigestMismatchError):
        store.tag("x", Reference.parse(f"y:v1@{other.digest}"))
    with pytest.raises(UsageError):
        store.tag("x", Reference.parse(f"y@{model.digest}"))
    write_model(store, other, f"docker.io/ai/y@{other.digest}")
    assert store.get(str(other.digest)).names == ()


def test_tagging_what_is_not_there(store: LayoutStore) -> None:
    with pytest.raises(NotFoundError):
        store.tag("x", Reference.parse("y"))


def test_a_changed_index_is_written_and_an_unchanged_one_is_not(store: LayoutStore) -> None:
    model = small_model(b"weights")
    write_model(store, model)
    before = (store.root / "index.json").stat().st_ino
    store.change_index(lambda document: document)
    assert (store.root / "index.json").stat().st_ino == before
    store.change_index(lambda d: d.with_tag(model.descriptor, Reference.parse("x")))
    assert store.index().entries[0].name == X


# After random changes, the index must equal a model of two dictionaries.

DIGESTS = [Digest("sha256", f"{number}" * 64) for number in range(3)]
NAMES = [Reference.parse(name) for name in ("a", "b", "c:v1")]
changes = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from(DIGESTS)),
        st.tuples(st.just("tag"), st.sampled_from(DIGESTS), st.sampled_from(NAMES)),
        st.tuples(st.just("untag"), st.sampled_from(NAMES)),
        st.tuples(st.just("remove"), st.sampled_from(DIGESTS)),
    ),
    max_size=25,
)


@given(changes)
def test_any_series_of_changes(series: list[tuple[Any, ...]]) -> None:
    foreign = {"mediaType": "x", "custom": True}
    document = IndexDocument.parse(json.dumps({"manifests": [foreign]}).encode(), "index")
    present: set[Digest] = set()
    tags: dict[Reference, Digest] = {}
    for change in series:
        if change[0] in ("add", "tag"):
            descriptor = Descriptor(media_types.OCI_MANIFEST, change[1], 5)
            present.add(change[1])
            if change[0] == "add":
                document = document.with_manifest(descriptor)
            else:
                document = document.with_tag(descriptor, change[2])
                tags[change[2]] = change[1]
        elif change[0] == "untag":
            document = document.untagged(lambda e, wanted=change[1]: e.reference == wanted)
            tags.pop(change[1], None)
        else:
            document = document.without_manifest(change[1])
            present.discard(change[1])
            tags = {name: digest for name, digest in tags.items() if digest != change[1]}
        document = IndexDocument.parse(document.encoded(), "index")

        entries = document.entries
        assert {e.digest for e in entries} == present
        assert {e.reference: e.digest for e in entries if e.reference} == tags
        assert len([e for e in entries if e.reference]) == len(tags)
        untagged = [e.digest for e in entries if e.reference is None]
        assert sorted(untagged) == sorted(present - set(tags.values()))
        assert document.items[0].raw == foreign


def test_ambiguous_and_missing_ids_say_so(store: LayoutStore) -> None:
    write_model(store, small_model(b"weights"), X)
    add_to_index(
        store,
        {"mediaType": media_types.OCI_MANIFEST, "digest": "sha256:aaaa" + "0" * 60, "size": 1},
        {"mediaType": media_types.OCI_MANIFEST, "digest": "sha256:aaaa" + "1" * 60, "size": 1},
    )
    with pytest.raises(AmbiguousError):
        store.remove("aaaa")


def test_a_change_within_one_tick_of_the_clock_is_seen(store: LayoutStore) -> None:
    """The same inode, size and time: the file may differ because it is so new."""
    model = small_model(b"weights")
    write_model(store, model, "docker.io/ai/x:v1")
    path = store.root / "index.json"
    found = path.stat()
    assert store.resolve("x:v1").digest == model.digest
    content = path.read_bytes()
    with path.open("r+b") as stream:
        stream.write(content.replace(b"x:v1", b"x:v2"))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert store.resolve("x:v2").digest == model.digest


def test_a_blob_that_goes_while_its_manifest_is_written(
    store: LayoutStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = small_model(b"weights"), LayoutStore(store.root)
    write_blobs(store, model)
    real = Manifests._check_complete

    def check_then_lose_one(manifests: Manifests, *arguments: Any) -> None:
        real(manifests, *arguments)
        other.delete_blob(model.manifest.layers[0].digest)
        monkeypatch.setattr(Manifests, "_check_complete", real)

    monkeypatch.setattr(Manifests, "_check_complete", check_then_lose_one)
    with pytest.raises(NotFoundError):
        store.write_manifest(model.descriptor, model.manifest.raw, X)
    assert store.models() == ()


def test_looking_up_every_manifest_goes_through_the_index_a_few_times() -> None:
    class Element(dict[str, Any]):
        looked_at = 0

        def get(self, key: str, default: Any = None) -> Any:
            Element.looked_at += 1
            return super().get(key, default)

    digests = [Digest.of(f"{number}".encode()) for number in range(300)]
    for names in ([str(digest) for digest in digests], [f"ai/m:{n}" for n in range(300)]):
        document = IndexDocument({}, ()).with_elements(
            Element(
                mediaType=media_types.OCI_MANIFEST,
                size=1,
                digest=str(digest),
                annotations={media_types.REF_NAME: f"docker.io/ai/m:{number}"},
            )
            for number, digest in enumerate(digests)
        )
        Element.looked_at = 0
        for digest, name in zip(digests, names, strict=True):
            assert [entry.digest for entry in document.entries_of(digest)] == [digest]
            assert document.find(name).entry.digest == digest
        assert len(digests) <= Element.looked_at < 40 * len(digests)


def test_what_is_too_large_to_read_is_not_written(
    store: LayoutStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading and writing have the same limit: both work at the limit, neither above it."""
    path = store.root / "index.json"
    one, two = small_model(b"one"), small_model(b"two")
    write_model(store, one, X)
    before = path.read_bytes()
    write_model(store, two, Y)
    size = len(path.read_bytes())
    store.remove("y")
    assert path.read_bytes() == before

    monkeypatch.setattr(index, "MAX_BYTES", size - 1)
    with pytest.raises(StoreError, match=f"the store is full: .* {size} bytes") as caught:
        write_model(store, two, Y)
    assert "--store" in (caught.value.hint or "")
    assert path.read_bytes() == before
    assert [model.names for model in LayoutStore(store.root).models()] == [(X,)]
    monkeypatch.setattr(index, "MAX_BYTES", size)
    write_model(store, two, Y)
    assert len(LayoutStore(store.root).models()) == 2
    monkeypatch.setattr(index, "MAX_BYTES", size - 1)
    with pytest.raises(StoreError, match="damaged"):
        LayoutStore(store.root).models()


def test_a_small_index_is_read_in_little_memory(store: LayoutStore) -> None:
    write_model(store, small_model(b"weights"), X)
    tracemalloc.start()
    try:
        assert len(LayoutStore(store.root).models()) == 1
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
