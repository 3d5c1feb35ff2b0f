"""Conversions between formats and back, and to images that other tools can mount."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts import media_types
from modelpack.artifacts.manifest import Index, Manifest
from modelpack.builder.build import assemble
from modelpack.operations import convert as imaging
from modelpack.operations.convert import convert
from modelpack.storage import read_blob
from modelpack.testing import registry
from tests.cli.running import modelpack as command
from tests.cli.running import succeed
from tests.models import FIXTURES, store_of_two
from tests.peers import require


@pytest.fixture
def store(tmp_path: Path) -> modelpack.Store:
    return store_of_two(tmp_path)


def files_of(store: modelpack.Store, name: str) -> dict[str, bytes]:
    """Return the files of the image's first platform, by path."""
    index = Index.parse(store.fetch_manifest(store.resolve(name)))
    manifest = Manifest.parse(store.fetch_manifest(index.manifests[0]))
    found = {}
    for layer in manifest.layers:
        with tarfile.open(fileobj=io.BytesIO(read_blob(store, layer))) as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is not None:
                    found[member.name] = content.read()
    return found


@pytest.mark.parametrize("name", ["x/gguf:v1", "x/st:v1"])
def test_there_and_back(store: modelpack.Store, name: str) -> None:
    before = modelpack.inspect(name, store=store)
    cncf = succeed("convert", name, "x/cncf:v1", "--to", "cncf", "--store", store.root).out
    assert modelpack.inspect("x/cncf:v1", store=store).manifest.is_cncf
    assert cncf != str(before.digest)
    again = convert("x/cncf:v1", "x/back:v1", to="docker", store=store)
    back = modelpack.inspect(str(again.digest), store=store)
    assert not back.manifest.is_cncf
    assert [f.descriptor.digest for f in back.files()] == [
        f.descriptor.digest for f in before.files()
    ]
    assert convert(name, "x/same:v1", to="docker", store=store).digest == before.digest


def test_an_image_holds_the_files_under_models(store: modelpack.Store, tmp_path: Path) -> None:
    result = succeed("convert", "x/st:v1", "--to", "image", "--store", store.root, "--json").json
    assert result["reference"] == "docker.io/x/st:v1-image"
    root = FIXTURES / "models/tiny-safetensors"
    expected = {
        f"models/{path.relative_to(root)}": path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    assert files_of(store, "x/st:v1-image") == expected
    index = Index.parse(store.fetch_manifest(store.resolve("x/st:v1-image")))
    assert [m.platform for m in index.manifests] == ["linux/amd64", "linux/arm64"]
    manifests = [Manifest.parse(store.fetch_manifest(m)) for m in index.manifests]
    assert manifests[0].layers == manifests[1].layers
    for manifest, platform in zip(manifests, ("amd64", "arm64"), strict=True):
        assert {layer.media_type for layer in manifest.layers} == {media_types.OCI_TAR_LAYER}
        config = json.loads(read_blob(store, manifest.config))
        assert (config["os"], config["architecture"]) == ("linux", platform)
        assert config["rootfs"]["diff_ids"] == [str(layer.digest) for layer in manifest.layers]
    model = modelpack.inspect("x/st:v1", store=store)
    assert index.annotations[media_types.MODEL] == str(model.digest)
    # An image is not a model, and is not accepted as one.
    listed = succeed("list", "--json", "--store", store.root)
    assert [item["tags"] for item in listed.json["models"]] == [
        ["docker.io/x/gguf:v1"],
        ["docker.io/x/st:v1"],
    ]
    assert "note" not in listed.err
    [image] = listed.json["images"]
    assert (image["tags"], image["model"]) == (["docker.io/x/st:v1-image"], str(model.digest))


def test_an_image_is_shown_and_removed_by_name(store: modelpack.Store) -> None:
    place = ("--store", store.root)
    before = {path for path in (store.root / "blobs").rglob("*") if path.is_file()}
    made = succeed("convert", "x/st:v1", "x/i:1", "--to", "image", *place).out.strip()
    short = made.removeprefix("sha256:")[:12]
    [row] = [row for row in succeed("list", *place).out.splitlines() if "x/i:1" in row]
    assert {"image", short} <= set(row.split())
    assert short in succeed("list", "-q", *place).out.split()
    shown = succeed("inspect", "x/i:1", *place).out
    assert "docker.io/x/i:1" in shown
    assert "linux/arm64" in shown
    value = succeed("inspect", "--json", made, *place).json
    assert value["references"] == ["docker.io/x/i:1"]
    assert [one["platform"] for one in value["manifests"]] == ["linux/amd64", "linux/arm64"]
    assert value["size"] == image_size(store, made)

    succeed("rm", "x/i:1", *place)
    after = {path for path in (store.root / "blobs").rglob("*") if path.is_file()}
    assert after == before


def image_size(store: modelpack.Store, digest: str) -> int:
    index = Index.parse(store.fetch_manifest(store.resolve(digest)))
    manifests = [Manifest.parse(store.fetch_manifest(m)) for m in index.manifests]
    return sum({blob.digest: blob.size for m in manifests for blob in m.blobs}.values())


def test_fsck_names_what_an_image_of_an_earlier_version_left(store: modelpack.Store) -> None:
    convert("x/st:v1", "x/i:1", to="image", store=store)
    index = Index.parse(store.fetch_manifest(store.resolve("x/i:1")))
    store.change_index(
        lambda document: (
            document.without_manifest(index.digest)
            .with_manifest(index.manifests[0])
            .with_manifest(index.manifests[1])
        )
    )
    said = succeed("fsck", "--store", store.root).err
    command = said[said.index("modelpack rm ") :].partition("`")[0].split()[1:]
    succeed(*command, "--store", store.root)
    assert "modelpack rm" not in succeed("fsck", "--store", store.root).err
    assert not [one for one in index.manifests if store.has_file(one.digest)]


def test_an_image_has_one_digest(store: modelpack.Store, tmp_path: Path) -> None:
    here = convert("x/st:v1", "x/i:1", to="image", store=store).digest
    other = modelpack.Store(tmp_path / "other")
    directory = modelpack.PackageRequest(safetensors_dir=tmp_path / "tiny-safetensors")
    modelpack.package("y/z:v1", directory, store=other)
    with registry() as server:
        name = f"{server.host}/y/z:image"
        assert convert("y/z:v1", name, to="image", push=True, store=other).digest == here
        assert not other.indexes()
        assert modelpack.copy(name, f"{server.host}/y/copy:1").digest == here


def test_a_gguf_of_docker_keeps_its_name(store: modelpack.Store) -> None:
    convert("x/gguf:v1", "x/i:1", to="image", store=store)
    assert list(files_of(store, "x/i:1")) == ["models/tiny.gguf"]


def test_many_weights_share_layers(
    tmp_path: Path, store: modelpack.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imaging, "MAX_WEIGHT_LAYERS", 2)
    request = modelpack.PackageRequest(
        gguf=FIXTURES / "models/tiny-gguf-sharded/tiny-00001-of-00003.gguf"
    )
    modelpack.package("x/s:1", request, store=store)
    convert("x/s:1", "x/i:1", to="image", store=store)
    index = Index.parse(store.fetch_manifest(store.resolve("x/i:1")))
    assert len(Manifest.parse(store.fetch_manifest(index.manifests[0])).layers) == 2
    assert len(files_of(store, "x/i:1")) == 3


@pytest.mark.peer("umoci")
@pytest.mark.peer("skopeo")
def test_others_unpack_the_image(store: modelpack.Store, tmp_path: Path) -> None:
    program, skopeo = require("umoci"), require("skopeo")
    succeed("convert", "x/st:v1", "x/i:1", "--to", "image", "--platform", "linux/amd64",
            "--store", store.root)  # fmt: skip
    bundle = tmp_path / "bundle"
    source = f"oci:{store.root}:docker.io/x/i:1"
    subprocess.run([skopeo, "inspect", source], check=True, capture_output=True)
    layout = tmp_path / "layout"
    subprocess.run([skopeo, "copy", source, f"oci:{layout}:i"], check=True, capture_output=True)
    subprocess.run([program, "unpack", "--rootless", "--image", f"{layout}:i", bundle],
                   check=True, capture_output=True)  # fmt: skip
    config = FIXTURES / "models/tiny-safetensors/config.json"
    assert (bundle / "rootfs/models/config.json").read_bytes() == config.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("x/st:v1",), 2, "Missing option '--to'"),
        (("x/st:v1", "--to", "gguf"), 2, "'gguf' is not one of"),
        (("x/none:v1@sha256:" + "0" * 64, "x/y", "--to", "image"), None, "x/none"),
        (("x/st:v1", "--to", "cncf", "--platform", "linux/amd64"), 2, "requires --to image"),
        (("x/st:v1", "--to", "image", "--platform", "linux"), 1, "'linux' is not a platform"),
        (("x/st:v1", "--to", "image", *("--platform", "linux/amd64") * 2), 2, "each given once"),
        (("x/st:v1", "x/y@sha256:" + "0" * 64, "--to", "image"), 2, "a digest cannot be chosen"),
    ],
)
def test_wrong_conversions(
    store: modelpack.Store, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...],
    code: int | None, said: str,
) -> None:  # fmt: skip
    if "x/none" in said:
        arguments = ("127.0.0.1:9/x/none:v1", "x/y", "--to", "image")
        monkeypatch.setattr("modelpack.registry.limits.RetryPolicy.wait", lambda *_: None)
        code = 6
    result = command("convert", *arguments, "--store", store.root)
    assert result.code == code
    assert said in result.err


@pytest.mark.parametrize("name", ["x/gguf:v1", "x/st:v1"])
def test_no_field_is_lost_that_the_target_has(
    store: modelpack.Store, name: str, tmp_path: Path
) -> None:
    to_cncf = convert(name, "x/cncf:v1", to="cncf", store=store)
    files = {"x/gguf:v1": "tiny-gguf/tiny.gguf", "x/st:v1": "tiny-safetensors"}[name]
    source = "gguf" if files.endswith(".gguf") else "safetensors_dir"
    request = modelpack.PackageRequest(**{source: FIXTURES / "models" / files}, format="cncf")  # type: ignore[arg-type]
    # The description is read from the files, as when they are packaged.
    assert to_cncf.digest == modelpack.package("x/direct:v1", request, store=store).digest
    # So are the context size and the header values, which CNCF has no place for.
    assert convert("x/cncf:v1", "x/back:v1", to="docker", store=store).digest == (
        modelpack.inspect(name, store=store).digest
    )


def test_fields_of_other_tools_stay(store: modelpack.Store, tmp_path: Path) -> None:
    kit = modelpack.package(
        "x/own:v1",
        modelpack.PackageRequest(gguf=FIXTURES / "models/tiny-gguf/tiny.gguf", format="cncf"),
        store=store,
    )
    config = kit.config.with_changes(
        cncf_descriptor={**kit.config.cncf_descriptor, "authors": ["Ada"], "version": "3"}
    )
    built = assemble(config, kit.manifest.layers, {"k": "v"})
    store.write_bytes(built.config_bytes, built.manifest.config.media_type)
    store.write_manifest(built.manifest.descriptor, built.manifest.raw, "docker.io/x/own:v2")
    same = convert("x/own:v2", "x/same:v1", to="cncf", store=store)
    assert same.digest == built.manifest.digest


def test_weights_that_cannot_be_read_are_converted_without_their_values(
    store: modelpack.Store, tmp_path: Path
) -> None:
    before = convert("x/gguf:v1", "x/cncf:v1", to="cncf", store=store)
    assert before.notes == ()
    [weights] = modelpack.inspect("x/cncf:v1", store=store).files()
    path = store.blob_path(weights.descriptor.digest)
    path.chmod(0o644)
    path.write_bytes(b"x" * weights.descriptor.size)
    made = convert("x/cncf:v1", "x/back:v1", to="docker", store=store)
    assert made.digest != before.digest
    assert "values of the weights, which cannot be read" in made.notes[0]
    config = modelpack.inspect("x/back:v1", store=store).config
    assert (config.gguf, config.context_size, config.architecture) == (None, None, "llama")
    made = convert("x/gguf:v1", "x/again:v1", to="cncf", store=store)
    assert "says no more of the files, which cannot be read" in made.notes[0]
    config = modelpack.inspect("x/again:v1", store=store).config
    assert (config.capabilities, config.cncf_config, config.format) == ((), {}, "gguf")
