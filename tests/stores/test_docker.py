"""Docker Model Runner's own store: byte for byte what its code writes, verified when read."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.reference import Reference
from modelpack.errors import (
    DigestMismatchError,
    IntegrityError,
    ManifestError,
    NotFoundError,
    SizeMismatchError,
    StoreError,
    UnsafePathError,
)
from modelpack.storage import Source
from modelpack.store import docker_store as docker_index
from modelpack.store import docker_store as docker_module
from modelpack.store.docker_store import DockerIndex, DockerStore, default_docker_root, go_indented
from modelpack.store.layout import LayoutStore
from tests.contract.parts import SmallModel, Watcher, content_of, small_model, write_model
from tests.interop.go_tool import build_go_tool
from tests.models import tiny_gguf
from tests.peers import require

X, Y = "docker.io/ai/x:latest", "docker.io/ai/y:latest"
PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def docker(tmp_path: Path) -> DockerStore:
    return DockerStore(tmp_path / "docker", create=True)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


def write(
    docker: DockerStore, files: Path, model: SmallModel, name: str | None, *, link: bool = True
) -> None:
    """Write a model from files in a directory."""
    for digest, content in model.contents.items():
        (files / digest.encoded).write_bytes(content)
    docker.write_model(
        model.manifest.raw,
        lambda blob: files / blob.digest.encoded,
        Reference.parse(name) if name else None,
        link=link,
    )


def models_json(docker: DockerStore) -> Any:
    return json.loads((docker.root / "models.json").read_bytes())


def tags(docker: DockerStore) -> dict[str, list[str] | None]:
    return {model["id"]: model["tags"] for model in models_json(docker)["models"]}


def all_files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_the_bytes_of_a_new_store(docker: DockerStore) -> None:
    assert all_files(docker.root) == {
        "layout.json": b'{\n  "version": "1.0.0"\n}',
        "models.json": b'{\n  "models": []\n}',
    }
    assert docker.models() == ()


def test_the_bytes_of_a_store_with_models(docker: DockerStore, files: Path) -> None:
    model, other = small_model(b"a", b"b", b"a"), small_model(b"c")
    write(docker, files, model, X)
    write(docker, files, other, None)
    write(docker, files, model, "registry.example.com/m:v1")
    a, b, _ = model.manifest.layers
    expected = f"""\
{{
  "models": [
    {{
      "id": "{model.digest}",
      "tags": [
        "docker.io/ai/x:latest",
        "registry.example.com/m:v1"
      ],
      "files": [
        "{a.digest}",
        "{b.digest}",
        "{a.digest}",
        "{model.manifest.config.digest}"
      ]
    }},
    {{
      "id": "{other.digest}",
      "tags": null,
      "files": [
        "{other.manifest.layers[0].digest}",
        "{other.manifest.config.digest}"
      ]
    }}
  ]
}}"""
    assert (docker.root / "models.json").read_bytes() == expected.encode()
    assert stat.S_IMODE((docker.root / "models.json").stat().st_mode) == 0o644
    stored = all_files(docker.root)
    for made in (model, other):
        assert stored[f"manifests/sha256/{made.digest.encoded}"] == made.manifest.raw
        for digest, content in made.contents.items():
            assert stored[f"blobs/sha256/{digest.encoded}"] == content
    assert len(stored) == 2 + 2 + 5


def test_a_tag_moves_and_the_other_model_stays(docker: DockerStore, files: Path) -> None:
    one, two = small_model(b"one"), small_model(b"two")
    write(docker, files, one, X)
    write(docker, files, two, X)
    assert tags(docker) == {str(one.digest): None, str(two.digest): [X]}
    write(docker, files, one, Y)
    write(docker, files, two, Y)
    assert tags(docker) == {str(one.digest): None, str(two.digest): [X, Y]}
    write(docker, files, two, Y)
    assert tags(docker)[str(two.digest)] == [X, Y]


def test_tags_are_recognised_however_they_are_written(docker: DockerStore, files: Path) -> None:
    one, two = small_model(b"one"), small_model(b"two")
    write(docker, files, one, None)
    value = models_json(docker)
    value["models"][0]["tags"] = ["x", "hf.co/Org/Model:Q4", "not a tag!"]
    (docker.root / "models.json").write_bytes(go_indented(value))
    assert docker.resolve("x").digest == one.digest
    assert docker.resolve("huggingface.co/org/model:Q4").digest == one.digest
    write(docker, files, two, X)
    assert tags(docker)[str(one.digest)] == ["hf.co/Org/Model:Q4", "not a tag!"]


def test_what_is_not_understood_stays(docker: DockerStore, files: Path) -> None:
    strange = [{"id": "sha256:short", "tags": ["<&>\u2028"], "more": {"x": 1}}, "text", None]
    (docker.root / "models.json").write_bytes(go_indented({"models": strange, "new": "<field>"}))
    write(docker, files, small_model(b"a"), X)
    value = models_json(docker)
    assert value["models"][:3] == strange
    assert value["new"] == "<field>"
    raw = (docker.root / "models.json").read_bytes()
    assert b'"\\u003c\\u0026\\u003e\\u2028"' in raw


@pytest.mark.parametrize("content", [b'{"models":null}', b"{}"])
def test_an_index_without_models(docker: DockerStore, files: Path, content: bytes) -> None:
    (docker.root / "models.json").write_bytes(content)
    assert docker.models() == ()
    write(docker, files, small_model(b"a"), X)
    assert len(docker.models()) == 1


@pytest.mark.parametrize("content", [b"", b"[]", b'{"models":{}}', b"{"])
def test_a_damaged_index_is_an_error_and_stays(
    docker: DockerStore, files: Path, content: bytes
) -> None:
    (docker.root / "models.json").write_bytes(content)
    before = all_files(docker.root)
    with pytest.raises(ManifestError):
        docker.models()
    with pytest.raises(ManifestError):
        write(docker, files, small_model(b"a"), X)
    assert all_files(docker.root) == before


def test_it_is_a_source(docker: DockerStore, files: Path) -> None:
    model = small_model(b"weights", b"license")
    write(docker, files, model, X)
    assert isinstance(docker, Source)
    for name in ("x", X, str(model.digest), model.digest.short, model.digest.encoded[:6]):
        assert docker.resolve(name) == model.descriptor
    assert docker.fetch_manifest(model.descriptor) == model.manifest.raw
    for blob in model.manifest.blobs:
        assert docker.blob_path(blob.digest).is_file()
        with docker.blob(blob).open(1) as reader:
            buffer = memoryview(bytearray(1000))
            read = bytes(buffer[: reader.readinto(buffer)])
        assert read == model.contents[blob.digest][1:]
    (listed,) = docker.models()
    assert listed.references == (Reference.parse("x"),)
    for name in ("y", "f" * 12, "sha256:" + "f" * 64):
        with pytest.raises(NotFoundError):
            docker.resolve(name)
    with pytest.raises(NotFoundError):
        docker.blob_path(Digest("sha256", "f" * 64))


@pytest.mark.parametrize("link", [True, False])
def test_files_are_linked_or_copied(docker: DockerStore, files: Path, link: bool) -> None:
    model = small_model(b"weights" * 2_000_000)
    write(docker, files, model, X, link=link)
    for digest, content in model.contents.items():
        path = docker.blob_path(digest)
        assert path.samefile(files / digest.encoded) is link
        assert path.read_bytes() == content


def test_where_links_are_impossible_files_are_copied(
    docker: DockerStore, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(docker_module.os, "link", refuse)
    model = small_model(b"weights")
    write(docker, files, model, X)
    assert docker.blob_path(model.manifest.layers[0].digest).read_bytes() == b"weights"


@pytest.mark.parametrize("link", [True, False])
def test_a_file_that_is_not_the_blob_is_refused_and_nothing_is_left(
    docker: DockerStore, files: Path, link: bool
) -> None:
    model = small_model(b"license", b"weights")
    before = all_files(docker.root)
    for digest, content in model.contents.items():
        (files / digest.encoded).write_bytes(content)
    (files / model.manifest.layers[1].digest.encoded).write_bytes(b"Weights")
    with pytest.raises(DigestMismatchError):
        docker.write_model(
            model.manifest.raw,
            lambda blob: files / blob.digest.encoded,
            Reference.parse("x"),
            link=link,
        )
    assert all_files(docker.root) == before


def test_a_blob_of_another_size_is_replaced(docker: DockerStore, files: Path) -> None:
    model = small_model(b"weights")
    place = docker.root / "blobs" / "sha256" / model.manifest.layers[0].digest.encoded
    place.write_bytes(b"half")
    write(docker, files, model, X)
    assert place.read_bytes() == b"weights"


def test_a_damaged_manifest_hides_no_other_model(docker: DockerStore, files: Path) -> None:
    one, two = small_model(b"one"), small_model(b"two")
    write(docker, files, one, X)
    write(docker, files, two, Y)
    (docker.root / "manifests" / "sha256" / one.digest.encoded).write_bytes(b"{}")
    assert [model.digest for model in docker.models()] == [two.digest]
    with pytest.raises(NotFoundError):
        docker.resolve("x")
    with pytest.raises(IntegrityError):
        docker.fetch_manifest(one.descriptor)


def test_files_too_large_to_read_are_not_read(docker: DockerStore) -> None:
    """Sparse files of a terabyte, which take no space on the disk."""
    os.truncate(docker.root / "models.json", 1 << 40)
    with pytest.raises(StoreError, match=r"models\.json: it has more than 67108864 bytes"):
        docker.models()
    os.truncate(docker.root / "layout.json", 1 << 40)
    with pytest.raises(StoreError, match=r"layout\.json: it has more than"):
        DockerStore(docker.root)


def test_a_manifest_too_large_to_read_hides_no_other_model(
    docker: DockerStore, files: Path
) -> None:
    one, two = small_model(b"one"), small_model(b"two")
    write(docker, files, one, X)
    write(docker, files, two, Y)
    os.truncate(docker.root / "manifests" / "sha256" / one.digest.encoded, 1 << 40)
    assert [model.digest for model in docker.models()] == [two.digest]
    with pytest.raises(SizeMismatchError, match="more than the limit"):
        docker.fetch_manifest(one.descriptor)


def test_a_fifo_in_place_of_a_file_is_not_waited_for(docker: DockerStore, files: Path) -> None:
    one, two = small_model(b"one"), small_model(b"two")
    write(docker, files, one, X)
    write(docker, files, two, Y)
    manifest = docker.root / "manifests" / "sha256" / one.digest.encoded
    manifest.unlink()
    os.mkfifo(manifest)
    assert [model.digest for model in docker.models()] == [two.digest]
    (docker.root / "models.json").unlink()
    os.mkfifo(docker.root / "models.json")
    with pytest.raises(StoreError, match="not a regular file"):
        docker.models()


@pytest.mark.long
def test_a_model_that_is_listed_30_000_times(docker: DockerStore, files: Path) -> None:
    """The tags of a model are not copied for each tag, which would take minutes."""
    model = small_model(b"a")
    write(docker, files, model, X)
    elements = [{"id": str(model.digest), "tags": [f"ai/x:{number}"]} for number in range(30_000)]
    (docker.root / "models.json").write_text(json.dumps({"models": elements}))
    [found] = docker.models()
    assert len(found.names) == 30_000


def test_a_blob_that_leads_out_is_not_read(docker: DockerStore, files: Path) -> None:
    (files / "secret").write_bytes(b"secret")
    digest = Digest.of(b"secret")
    (docker.root / "blobs" / "sha256" / digest.encoded).symlink_to(files / "secret")
    with pytest.raises(UnsafePathError):
        docker.blob_path(digest)


@pytest.mark.parametrize(
    ("names", "create"),
    [([], False), (["notes.txt"], False), (["notes.txt"], True), (["oci-layout"], True)],
)
def test_another_directory_is_refused_and_left_alone(
    tmp_path: Path, names: list[str], create: bool
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(StoreError, match="no Docker Model Runner store"):
        DockerStore(tmp_path, create=create)
    assert all_files(tmp_path) == dict.fromkeys(names, b"mine")


def test_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "layout.json").write_bytes(b'{"version":"2.0.0"}')
    with pytest.raises(StoreError, match=r"2\.0\.0"):
        DockerStore(tmp_path, create=True)


def test_the_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MODELS_PATH", raising=False)
    assert default_docker_root() == tmp_path / ".docker" / "models"
    monkeypatch.setenv("MODELS_PATH", "/models")
    assert default_docker_root() == Path("/models")


def test_models_go_from_store_to_store_by_link(
    docker: DockerStore, store: LayoutStore, files: Path
) -> None:
    model, watch = small_model(b"weights"), Watcher().watch
    write(docker, files, model, X, link=False)
    for blob in model.manifest.unique_blobs:
        store.adopt_file(docker.blob_path(blob.digest), blob, watch, link=True)
    store.write_manifest(model.descriptor, docker.fetch_manifest(model.descriptor), X)
    assert store.resolve("x") == model.descriptor
    for blob in model.manifest.blobs:
        assert store.blob_path(blob.digest).samefile(docker.blob_path(blob.digest))
        assert content_of(store, blob) == model.contents[blob.digest]

    other = small_model(b"other")
    write_model(store, other, Y)
    raw = store.fetch_manifest(store.resolve("y"))
    docker.write_model(raw, lambda blob: store.blob_path(blob.digest), Reference.parse("y"))
    assert docker.resolve("y") == other.descriptor
    for blob in other.manifest.blobs:
        assert docker.blob_path(blob.digest).samefile(store.blob_path(blob.digest))
    assert store.remove("y").bytes_freed == len(raw), "Docker's store keeps the blobs"
    assert docker.blob_path(other.manifest.layers[0].digest).read_bytes() == b"other"


def test_any_tags_and_moves_keep_each_tag_on_one_model() -> None:
    digests = [Digest("sha256", f"{n}" * 64) for n in range(3)]
    index = DockerIndex({})
    owner: dict[str, str] = {}
    for step in range(40):
        digest, tag = digests[step * 7 % 3], f"t{step * 5 % 4}"
        index = index.with_model(digest, [], Reference.parse(f"x:{tag}"))
        index = DockerIndex.parse(index.encoded(), "models.json")
        owner[f"docker.io/ai/x:{tag}"] = str(digest)
        listed = [(t, m["id"]) for m in index.elements for t in m["tags"] or []]
        assert dict(listed) == owner
        assert len(listed) == len(owner)


@pytest.mark.peer("go")
def test_model_runners_own_code_writes_the_same_files(tmp_path: Path) -> None:
    require("go")
    peer = build_go_tool(PROJECT / "tests" / "interop" / "modelrunner", PROJECT / ".cache")

    def run(*arguments: str | Path) -> Any:
        environment = {"TZ": "UTC", "HOME": os.environ["HOME"]}
        done = subprocess.run([peer, *arguments], env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    theirs, gguf = tmp_path / "theirs", tiny_gguf(tmp_path)
    licence = tmp_path / "LICENSE"
    licence.write_text("MIT\n")
    run("package", "--gguf", gguf, "--store", theirs, "--tag", "team/one:v1")
    run("package", "--gguf", gguf, "--license", licence, "--store", theirs, "--tag", "team/two")
    run("tag", "--store", theirs, "team/two", "team/one:v1")
    run("tag", "--store", theirs, "team/two", "registry.example.com/x:v3")

    source, ours = DockerStore(theirs), DockerStore(tmp_path / "ours", create=True)
    one, two = (Digest.parse(model["id"]) for model in models_json(source)["models"])
    for digest, name in (
        (one, "team/one:v1"),
        (two, "team/two"),
        (two, "team/one:v1"),
        (two, "registry.example.com/x:v3"),
    ):
        raw = source.fetch_manifest(source.resolve(str(digest)))
        ours.write_model(raw, lambda blob: source.blob_path(blob.digest), Reference.parse(name))
    assert all_files(ours.root) == all_files(theirs)
    listed = run("list", "--store", ours.root)["models"]
    assert {model["digest"]: model.get("tags") for model in listed} == {
        str(one): None,
        str(two): [
            "docker.io/team/two:latest",
            "docker.io/team/one:v1",
            "registry.example.com/x:v3",
        ],
    }


def test_an_index_too_large_to_read_is_not_written(
    docker: DockerStore, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(docker, files, small_model(b"one"), X)
    before = (docker.root / "models.json").read_bytes()
    monkeypatch.setattr(docker_index, "MAX_BYTES", len(before))
    with pytest.raises(StoreError, match=r"models\.json would have"):
        write(docker, files, small_model(b"two"), Y)
    assert (docker.root / "models.json").read_bytes() == before
    assert tags(docker) == {str(small_model(b"one").digest): [X]}
