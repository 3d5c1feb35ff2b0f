"""Other tools with our store, and Modelpack with theirs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from oras.layout import Layout

from modelpack.artifacts import media_types
from modelpack.store.layout import LayoutStore
from tests.contract.parts import (
    SmallModel,
    Watcher,
    content_of,
    small_model,
    write_blobs,
    write_model,
)
from tests.peers import require

pytestmark = pytest.mark.long

NAME = "docker.io/ai/x:latest"

MODELS = {
    "docker": lambda: small_model(b"weights", b"license"),
    "cncf": lambda: small_model(b"weights", artifact_type=media_types.CNCF_MANIFEST),
}


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> SmallModel:
    return MODELS[request.param]()


@pytest.fixture
def filled(store: LayoutStore, model: SmallModel) -> LayoutStore:
    """A store with all files that Modelpack adds to the layout."""
    write_model(store, model, NAME)
    write_model(store, small_model(b"untagged"))
    source = store.root.parent / "file"
    source.write_bytes(b"imported")
    store.import_file(source, Watcher().watch)
    (store.root / "ingest" / ("sha256-" + "0" * 64 + ".part")).write_bytes(b"half")
    assert (store.root / ".lock").exists()
    assert store.gc(dry_run=True).partials == ()
    return store


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def skopeo(*arguments: str | Path) -> str:
    return run(require("skopeo"), "--insecure-policy", *arguments)


def umoci(*arguments: str | Path) -> str:
    return run(require("umoci"), *arguments)


@pytest.mark.peer("skopeo")
@pytest.mark.scenario(33)
def test_skopeo_reads_our_store_in_place(filled: LayoutStore, model: SmallModel) -> None:
    raw = skopeo("inspect", "--raw", f"oci:{filled.root}:{NAME}")
    assert raw.encode() == model.manifest.raw


@pytest.mark.peer("skopeo")
@pytest.mark.scenario(33)
def test_a_store_that_skopeo_copied_opens_in_ours(
    filled: LayoutStore, model: SmallModel, tmp_path: Path
) -> None:
    copied = tmp_path / "copied"
    skopeo("copy", f"oci:{filled.root}:{NAME}", f"oci:{copied}:v1")
    theirs = LayoutStore(copied)
    descriptor = theirs.resolve("v1")
    assert descriptor.digest == model.digest
    assert theirs.fetch_manifest(descriptor) == model.manifest.raw
    for blob in model.manifest.blobs:
        assert content_of(theirs, blob) == model.contents[blob.digest]
    assert theirs.fsck(watch=Watcher().watch).ok
    assert [stored.names for stored in theirs.models()] == [("v1",)]

    write_model(theirs, small_model(b"ours"), NAME)
    for name, made in (("v1", model), (NAME, small_model(b"ours"))):
        raw = skopeo("inspect", "--raw", f"oci:{copied}:{name}")
        assert raw.encode() == made.manifest.raw


@pytest.mark.peer("skopeo")
def test_skopeo_adds_to_our_store_and_we_read_it(filled: LayoutStore, tmp_path: Path) -> None:
    other = LayoutStore(tmp_path / "other")
    added = small_model(b"added")
    write_model(other, added, NAME)
    skopeo("copy", f"oci:{other.root}:{NAME}", f"oci:{filled.root}:docker.io/ai/added:v2")
    assert filled.resolve("added:v2").digest == added.digest
    assert filled.fsck(watch=Watcher().watch).ok
    filled.remove("added:v2")
    assert not filled.has_blob(added.manifest.layers[0])


@pytest.mark.peer("skopeo")
def test_a_registry_keeps_the_digest(
    filled: LayoutStore, model: SmallModel, registry_host: str, tmp_path: Path
) -> None:
    there, back = f"docker://{registry_host}/ai/x-{model.digest.short}:v1", tmp_path / "back"
    skopeo("copy", "--dest-tls-verify=false", f"oci:{filled.root}:{NAME}", there)
    skopeo("copy", "--src-tls-verify=false", there, f"oci:{back}:v1")
    assert LayoutStore(back).resolve("v1").digest == model.digest


@pytest.mark.peer("umoci")
@pytest.mark.scenario(33)
def test_umoci_lists_our_tags(filled: LayoutStore) -> None:
    assert umoci("ls", "--layout", filled.root).split() == [NAME]


@pytest.mark.peer("umoci")
def test_umoci_collects_in_our_store_and_leaves_what_is_listed(
    filled: LayoutStore, model: SmallModel
) -> None:
    lost = small_model(b"lost")
    write_blobs(filled, lost)
    # It takes an untagged model for one, too: both stay listed.
    umoci("gc", "--layout", filled.root)
    assert not any(filled.has_blob(blob) for blob in lost.manifest.blobs)
    assert filled.fsck(watch=Watcher().watch).ok
    assert filled.resolve("x").digest == model.digest
    assert len(filled.models()) == 2


@pytest.mark.peer("umoci")
def test_a_store_that_umoci_made_opens_in_ours(tmp_path: Path, model: SmallModel) -> None:
    made = tmp_path / "made"
    umoci("init", "--layout", made)
    umoci("new", "--image", f"{made}:base")
    theirs = LayoutStore(made)
    assert theirs.resolve("base").media_type == media_types.OCI_MANIFEST
    assert theirs.fsck(watch=Watcher().watch).ok
    write_model(theirs, model, NAME)
    assert sorted(umoci("ls", "--layout", made).split()) == ["base", NAME]
    umoci("tag", "--image", f"{made}:{NAME}", "again")
    assert theirs.resolve("again").digest == model.digest
    assert theirs.get("again").names == ("again", NAME)


@pytest.mark.peer("umoci")
def test_a_stray_file_is_what_our_check_says_that_others_choke_on(filled: LayoutStore) -> None:
    stray = filled.root / "blobs" / "sha256" / "partial.tmp"
    stray.write_bytes(b"")
    done = subprocess.run([require("umoci"), "gc", "--layout", filled.root], capture_output=True)
    assert done.returncode != 0
    assert [p.kind for p in filled.fsck(watch=Watcher().watch).problems] == ["stray"]


@pytest.mark.scenario(33)
def test_oras_validates_our_store(filled: LayoutStore, model: SmallModel) -> None:
    layout = Layout(str(filled.root))
    layout.validate()
    blobs = layout.get_ordered_blobs(NAME)
    assert str(model.digest) in json.dumps(blobs)
    for blob in model.manifest.blobs:
        assert str(blob.digest) in json.dumps(blobs)


def test_the_layout_file_is_exactly_the_specifications(store: LayoutStore) -> None:
    value: Any = json.loads((store.root / "oci-layout").read_bytes())
    assert value == {"imageLayoutVersion": "1.0.0"}
