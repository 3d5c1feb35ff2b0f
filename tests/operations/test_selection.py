"""Partial pulls: the fetched files, the state in the store, and how the model is completed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts import media_types as mediatypes
from modelpack.errors import NotFoundError, PartialModelError
from modelpack.operations.model_list import summarize_models
from modelpack.operations.pull import Part, Selection
from tests.contract.parts import Watcher
from tests.operations.conftest import Published

CONFIGURATION = {"config.json", "chat_template.jinja"}
WEIGHTS = {"model.safetensors"}


def paths_here(published: Published) -> set[str]:
    """Return the paths of the files that the store has."""
    held = published.store.has_blob
    return {layer.filepath or "" for layer in published.manifest.layers if held(layer)}


def all_paths(published: Published) -> set[str]:
    return {layer.filepath or "" for layer in published.manifest.layers}


def pull(published: Published, selection: Selection | None = None) -> int:
    done = modelpack.pull(published.reference, selection=selection, store=published.store)
    return done.transfer.bytes_written


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("selection", "want"),
    [
        (Selection(include=("config.json",)), {"config.json"}),
        (Selection(include=("*.safetensors",)), WEIGHTS),
        (Selection(include=("*.json",), exclude=("tok*",)), {"config.json"}),
        (Selection(media_types=("weight",)), WEIGHTS),
        (Selection(media_types=("license",)), {"LICENSE"}),
        (Selection(media_types=(mediatypes.DOCKER_SAFETENSORS,)), WEIGHTS),
        (Selection(only=Part.WEIGHTS), WEIGHTS),
    ],
    ids=str,
)
def test_only_what_is_selected_is_fetched(
    published: Published, selection: Selection, want: set[str]
) -> None:
    pull(published, selection)
    assert paths_here(published) == want
    config = str(published.manifest.config.digest)
    assert published.blobs_fetched() == {*map(published.path_digest, want), config}


def test_only_config_leaves_out_all_but_configuration(published: Published) -> None:
    pull(published, Selection(only=Part.CONFIG))
    here = paths_here(published)
    assert here >= CONFIGURATION
    assert not here & WEIGHTS
    assert "LICENSE" not in here


@pytest.mark.parametrize(
    "selection",
    [
        Selection(include=("nothing.txt",)),
        Selection(include=("config.json", "nothing.txt")),
        Selection(media_types=("gguf",)),
        Selection(include=("config.json",), exclude=("config.*",)),
    ],
    ids=str,
)
def test_a_selection_of_nothing_is_refused(published: Published, selection: Selection) -> None:
    with pytest.raises(NotFoundError):
        pull(published, selection)
    assert published.store.models() == ()


def test_excluding_what_is_not_there_pulls_everything(published: Published) -> None:
    pull(published, Selection(exclude=("nothing.txt",)))
    assert paths_here(published) == all_paths(published)
    assert published.store.missing(published.reference) == ()
    assert not published.store.get(published.reference).is_partial


def test_the_store_says_what_is_missing(published: Published) -> None:
    pull(published, Selection(only=Part.CONFIG))
    [listed] = summarize_models(published.store)
    missing = {blob.filepath for blob in listed.missing}
    assert missing == all_paths(published) - paths_here(published)
    assert modelpack.inspect(published.reference, store=published.store).digest == published.digest
    index = json.loads((published.store.root / "index.json").read_text())
    [entry] = index["manifests"]
    assert entry["annotations"]["org.modelpack.partial"] == "true"
    assert entry["annotations"]["org.modelpack.origin"] == published.reference.rpartition(":")[0]


def test_a_full_pull_fetches_the_rest_only(published: Published) -> None:
    first = pull(published, Selection(only=Part.CONFIG))
    published.records.forget(published.server)
    second = pull(published)
    sizes = {blob.digest: blob.size for blob in published.manifest.unique_blobs}
    assert first + second == sum(sizes.values())
    assert not published.blobs_fetched() & {published.path_digest("config.json")}
    assert not published.store.get(published.reference).is_partial
    text = (published.store.root / "index.json").read_text()
    assert "org.modelpack.partial" not in text


def test_parts_add_up(published: Published) -> None:
    pull(published, Selection(only=Part.CONFIG))
    pull(published, Selection(only=Part.WEIGHTS))
    assert published.store.get(published.reference).is_partial
    rest = tuple(blob.filepath or "" for blob in published.store.missing(published.reference))
    pull(published, Selection(include=rest))
    assert published.store.missing(published.reference) == ()
    assert not published.store.get(published.reference).is_partial


@pytest.mark.parametrize("verb", ["bundle", "push", "export"])
def test_a_part_is_refused_with_the_command_that_completes_it(
    published: Published, verb: str, tmp_path: Path
) -> None:
    pull(published, Selection(only=Part.CONFIG))
    name, store = published.reference, published.store
    docker = modelpack.DockerStore(tmp_path / "docker", create=True)
    target = f"{published.server.host}/other/m:v1"
    call = {
        "bundle": lambda: modelpack.bundle(name, tmp_path / "run", store=store),
        "push": lambda: modelpack.push(name, to=target, store=store),
        "export": lambda: modelpack.export_to_docker([name], docker=docker, store=store),
    }[verb]
    with pytest.raises(PartialModelError) as caught:
        call()
    assert "model.safetensors" in str(caught.value)
    assert published.path_digest(min(WEIGHTS)) in caught.value.missing
    assert f"modelpack pull {published.by_digest}" in (caught.value.hint or "")
    assert caught.value.exit_code == 3
    # The command in the hint completes the model under every name.
    modelpack.pull(published.by_digest, store=store)
    modelpack.bundle(name, tmp_path / "run", store=store)


def test_bundle_with_pull_completes_exactly_this_model(
    published: Published, tmp_path: Path
) -> None:
    pull(published, Selection(only=Part.CONFIG))
    # The tag moves to another model in the meantime.
    modelpack.package(
        published.reference,
        modelpack.PackageRequest(context_size=77),
        from_model=published.reference,
        push=True,
        store=published.origin,
    )
    made = modelpack.bundle(published.reference, tmp_path / "run", pull=True, store=published.store)
    assert made.weight.is_file()
    assert published.store.resolve(published.reference).digest == published.digest


def test_resolve_pulls_what_it_is_asked_for(published: Published) -> None:
    found = modelpack.resolve(
        published.reference, media_types=["config"], pull=True, store=published.store
    )
    assert {file.file.filepath for file in found.files} <= paths_here(published)
    assert not paths_here(published) & WEIGHTS
    with pytest.raises(PartialModelError):
        modelpack.resolve(published.reference, store=published.store)
    [license_] = modelpack.resolve(
        published.reference, files=["LICENSE"], pull=True, store=published.store
    ).files
    assert license_.path.is_file()
    assert not paths_here(published) & WEIGHTS
    assert len(modelpack.resolve(published.reference, pull=True, store=published.store).files) == 1


def test_fsck_and_gc_know_a_part(published: Published) -> None:
    pull(published, Selection(only=Part.CONFIG))
    store, watch = published.store, Watcher().watch
    report = store.fsck(watch=watch)
    assert report.ok
    assert report.partial == (published.reference,)
    held = {blob.digest for blob in published.manifest.blobs if store.has_blob(blob)}
    assert store.gc(grace_seconds=0).removed == ()
    assert {blob.digest for blob in published.manifest.blobs if store.has_blob(blob)} == held
    # The config must exist, and a damaged layer does not count as left out.
    path = store.blob_path(published.manifest.config.digest)
    path.unlink()
    [problem] = store.fsck(watch=watch).problems
    assert problem.digest == published.manifest.config.digest


def test_a_tag_that_moves_to_a_part_and_removal(published: Published) -> None:
    pull(published, Selection(only=Part.CONFIG))
    other = modelpack.Reference.parse("team/other:v2")
    published.store.tag(published.reference, other)
    assert published.store.get(str(other)).is_partial
    modelpack.pull(published.by_digest, store=published.store)
    assert not published.store.get(str(other)).is_partial
    published.store.remove(str(other))
    removal = published.store.remove(published.reference)
    assert removal.deleted == (published.digest,)
    assert published.store.models() == ()
