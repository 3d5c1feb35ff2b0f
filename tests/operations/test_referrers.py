"""Referrers of models: in registries with and without the API, and in a store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import encode
from modelpack.artifacts.manifest import Manifest
from modelpack.errors import (
    DigestMismatchError,
    NotFoundError,
    PackagingError,
    UnsupportedError,
    UsageError,
)
from modelpack.operations.referrers import AttachedFile, attach, detach, referrers
from modelpack.registry import Registry
from modelpack.registry.referrers import fallback_tag
from modelpack.testing import registry
from tests.contract.parts import Watcher
from tests.models import tiny_gguf
from tests.peers import docker_registry
from tests.registry.faulty import FaultyRegistry

SBOM = "application/spdx+json"
SIGNATURE = "application/vnd.example.signature"


@dataclass
class Place:
    """A model that can have referrers; `store` is None for a registry."""

    reference: str
    digest: Digest
    store: modelpack.Store | None
    has_api: bool

    def attach(
        self, *files: Path | AttachedFile, to: str = "", kind: str = SBOM, **more: str
    ) -> Digest:
        where = to or self.reference
        return attach(where, files, artifact_type=kind, annotations=more, store=self.store).digest

    def listed(self, of: str = "", kind: str | None = None) -> list[Digest]:
        found = referrers(of or self.reference, artifact_type=kind, store=self.store)
        return [one.digest for one in found]

    def at(self, digest: Digest) -> str:
        return f"{self.reference.rpartition(':')[0]}@{digest}"


@pytest.fixture(params=["embedded", "docker-registry", "faulty", "store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    store = modelpack.Store(tmp_path / "origin")
    with ExitStack() as stack:
        if request.param == "embedded":
            host = stack.enter_context(registry(tmp_path / "registry")).host
        elif request.param == "docker-registry":
            host = stack.enter_context(docker_registry(tmp_path / "registry"))
        elif request.param == "faulty":
            host = stack.enter_context(FaultyRegistry()).host
        else:
            host = "registry.example"
        reference = f"{host}/team/model:v1"
        local = request.param == "store"
        made = modelpack.package(
            reference,
            modelpack.PackageRequest(gguf=tiny_gguf(tmp_path)),
            push=not local,
            store=store,
        )
        has_api = request.param in ("embedded", "store")
        yield Place(reference, made.digest, store if local else None, has_api)


@pytest.fixture
def sbom(tmp_path: Path) -> Path:
    path = tmp_path / "sbom.spdx.json"
    path.write_text("{}\n")
    return path


def test_attach_list_detach(place: Place, sbom: Path) -> None:
    assert place.listed() == []
    first = place.attach(AttachedFile(sbom, SBOM))
    second = place.attach(sbom, kind=SIGNATURE, note="signed")
    assert place.listed() == sorted([first, second])
    assert place.listed(kind=SIGNATURE) == [second]
    assert place.listed(kind="application/x-none") == []
    [found] = referrers(place.reference, artifact_type=SIGNATURE, store=place.store)
    assert found.artifact_type == SIGNATURE
    assert found.annotations == {"note": "signed"}
    # Attaching the same files again gives the same artifact, which is listed once.
    assert place.attach(AttachedFile(sbom, SBOM)) == first
    assert place.listed() == sorted([first, second])
    assert detach(place.at(first), store=place.store) == first
    assert place.listed() == [second]
    assert detach(place.at(second), store=place.store) == second
    assert place.listed() == []


def test_what_is_attached_is_as_the_specification_says(place: Place, sbom: Path) -> None:
    digest = place.attach(AttachedFile(sbom, SBOM), note="n")
    manifest = _manifest(place, digest)
    value = json.loads(manifest.raw)
    assert value["artifactType"] == SBOM
    assert value["config"] == {
        "mediaType": "application/vnd.oci.empty.v1+json",
        "size": 2,
        "digest": "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }
    [layer] = value["layers"]
    assert layer["mediaType"] == SBOM
    assert layer["annotations"] == {"org.opencontainers.image.title": "sbom.spdx.json"}
    assert value["subject"]["digest"] == str(place.digest)
    assert value["subject"]["mediaType"] == media_types.OCI_MANIFEST
    assert value["annotations"] == {"note": "n"}


def test_annotations_alone_can_be_attached(place: Place) -> None:
    digest = place.attach(kind="application/x-note", score="0.9")
    [layer] = _manifest(place, digest).layers
    assert layer.media_type == media_types.OCI_EMPTY
    assert place.listed() == [digest]


def test_things_about_things(place: Place, sbom: Path) -> None:
    first = place.attach(sbom)
    second = place.attach(sbom, to=place.at(first), kind=SIGNATURE)
    assert place.listed() == [first]
    assert place.listed(place.at(first)) == [second]


@pytest.mark.scenario(32)
def test_the_fallback_tag_is_used_where_the_api_is_missing(place: Place, sbom: Path) -> None:
    if place.store is not None:
        return
    digest = place.attach(sbom)
    with Registry(place.reference.partition("/")[0]) as client:
        tags = sorted(client.repository("team/model").tags())
    listed = fallback_tag(place.digest)
    assert tags == (["v1"] if place.has_api else sorted([listed, "v1"]))
    detach(place.at(digest))
    with pytest.raises(NotFoundError):
        modelpack.inspect(place.at(digest), from_registry=True)


@pytest.mark.parametrize(
    ("files", "kind", "annotations", "error"),
    [
        ([], SBOM, {}, UsageError),
        (["sbom.spdx.json", "again/sbom.spdx.json"], SBOM, {}, UsageError),
        (["missing"], SBOM, {}, PackagingError),
        (["."], SBOM, {}, PackagingError),
        (["sbom.spdx.json"], "no type", {}, UsageError),
        (["sbom.spdx.json"], media_types.OCI_EMPTY, {}, UsageError),
        (["sbom.spdx.json:bad type"], SBOM, {}, PackagingError),
    ],
)
def test_what_cannot_be_attached(
    tmp_path: Path,
    sbom: Path,
    files: list[str],
    kind: str,
    annotations: dict[str, str],
    error: type[Exception],
) -> None:
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / sbom.name).write_text("other")
    paths = [tmp_path / file for file in files]
    with pytest.raises(error):
        attach("host.invalid/x:v1", paths, artifact_type=kind, annotations=annotations)


def test_a_file_that_changes_meanwhile_is_not_attached(tmp_path: Path) -> None:
    report = tmp_path / "report"
    report.write_text("before")
    store = modelpack.Store(tmp_path / "store")
    modelpack.package("m:v1", modelpack.PackageRequest(gguf=tiny_gguf(tmp_path)), store=store)

    def change(_: object) -> None:
        report.write_text("later!")

    with pytest.raises(DigestMismatchError):
        attach("m:v1", [report], artifact_type=SBOM, store=store, progress=change)
    assert referrers("m:v1", store=store) == ()


def test_detach_wants_something_attached(place: Place) -> None:
    with pytest.raises(UsageError):
        detach(place.reference, store=place.store)
    with pytest.raises(UnsupportedError, match="no subject"):
        detach(place.at(place.digest), store=place.store)
    with pytest.raises(NotFoundError):
        detach(place.at(Digest.of(b"nothing")), store=place.store)


def test_a_stores_collection_keeps_what_is_attached(tmp_path: Path, sbom: Path) -> None:
    store = modelpack.Store(tmp_path / "store")
    made = modelpack.package(
        "m:v1", modelpack.PackageRequest(gguf=tiny_gguf(tmp_path)), store=store
    )
    digest = attach("m:v1", [sbom], artifact_type=SBOM, store=store).digest
    assert store.gc(grace_seconds=0).removed == ()
    assert [model.digest for model in store.models()] == [made.digest]
    assert store.fsck(watch=Watcher().watch).ok
    removal = store.remove("m:v1")
    assert removal.deleted == (made.digest, digest)
    assert store.gc(grace_seconds=0, dry_run=True).removed == ()
    assert list(store.root.glob("blobs/sha256/*")) == []


def test_a_signature_without_artifact_type_is_no_model(tmp_path: Path) -> None:
    """Older tools state the artifact type only as the config's media type."""
    store = modelpack.Store(tmp_path / "store")
    made = modelpack.package(
        "m:v1", modelpack.PackageRequest(gguf=tiny_gguf(tmp_path)), store=store
    )
    config = store.write_bytes(b'{"a":1}', "application/vnd.example.config+json")
    value = {
        "schemaVersion": 2,
        "mediaType": media_types.OCI_MANIFEST,
        "config": config.to_json(),
        "layers": [],
        "subject": made.manifest.descriptor.to_json(),
    }
    signature = Manifest.parse(encode(value))
    store.write_manifest(signature.descriptor, signature.raw)
    assert [model.digest for model in store.models()] == [made.digest]
    [found] = store.referrers(made.digest)
    assert found.artifact_type == "application/vnd.example.config+json"


def _manifest(place: Place, digest: Digest) -> Manifest:
    if place.store is not None:
        return Manifest.parse(place.store.fetch_manifest(place.store.resolve(str(digest))))
    with Registry(place.reference.partition("/")[0]) as client:
        _, raw = client.repository("team/model").fetch_manifest_by_name(str(digest))
    return Manifest.parse(raw)
