"""Models of other tools, read and converted: KitOps, Ollama and CNAI."""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import modelpack
from modelpack.artifacts import media_types as mt
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.model import Role
from modelpack.errors import (
    DigestMismatchError,
    InvalidDigestError,
    ManifestError,
    NotFoundError,
    PartialModelError,
    UnsafePathError,
    UnsupportedError,
)
from modelpack.operations.archives import archive_of, import_archive
from modelpack.operations.convert import convert
from modelpack.operations.docker import export_to_docker
from modelpack.operations.headers import read_headers
from modelpack.operations.pull import Selection
from modelpack.storage import watching
from modelpack.store.docker_store import DockerStore
from modelpack.store.filesystem import bytes_used
from modelpack.testing import registry
from tests.cli.running import succeed
from tests.conftest import ROOT
from tests.models import FIXTURES
from tests.operations.test_convert import files_of
from tests.unpacking.tars import END, file, gzipped

GGUF = (FIXTURES / "models/tiny-gguf/tiny.gguf").read_bytes()
KITS = ROOT / "tests/interop/kit/kit-1.7.0.tar.gz"  # made by the real kit; see interop/README.md
KIT = "application/vnd.kitops.modelkit."
IN_THE_KIT = {"LICENSE", "README.md", "data/rows.csv", "run.py", "weights/adapter_config.json",
              "weights/tiny.gguf"}  # fmt: skip
Made = tuple[str, bytes]  # media type and content of a layer


def tar_of(name: str, content: bytes) -> bytes:
    return file(name.encode(), content) + END


@pytest.fixture
def store(tmp_path: Path) -> modelpack.Store:
    return modelpack.Store(tmp_path / "store")


@pytest.fixture
def kits(store: modelpack.Store) -> modelpack.Store:
    with gzip.open(KITS) as archive:
        import_archive(store, archive, watching(None))
    return store


def keep(
    store: modelpack.Store,
    config: tuple[str, Mapping[str, Any]],
    layers: Sequence[Made],
    name: str = "x/m:v1",
    media_type: str = mt.OCI_MANIFEST,
) -> Digest:
    """Store a manifest as another tool writes it."""

    def described(kind: str, content: bytes) -> dict[str, Any]:
        written = store.write_bytes(content, kind)
        return {"mediaType": kind, "digest": str(written.digest), "size": written.size}

    value = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": described(config[0], json.dumps(config[1]).encode()),
        "layers": [described(*layer) for layer in layers],
    }
    raw = json.dumps(value, indent=2).encode()
    manifest = Manifest.parse(raw)
    store.write_manifest(manifest.descriptor, raw, str(modelpack.Reference.parse(name)))
    return manifest.digest


# KitOps


@pytest.mark.parametrize("kit", ["plain", "gzip"])
def test_a_modelkit_is_pulled_and_read(kits: modelpack.Store, tmp_path: Path, kit: str) -> None:
    name = f"localhost:5055/made/kit:{kit}"
    mine = modelpack.Store(tmp_path / "mine")
    with registry(tmp_path / "registry") as server:
        pushed = f"{server.host}/made/kit:{kit}"
        push_as(kits, name, pushed)
        pulled = modelpack.pull(pushed, store=mine)
        shown = succeed("inspect", pushed, "--remote").out
    assert pulled.digest == kits.resolve(name).digest
    assert "KitOps ModelKit" in shown
    assert "weights/tiny.gguf" in shown
    model = modelpack.inspect(pushed, store=mine)
    assert [(file.filepath, str(file.role)) for file in model.files()] == [
        ("weights/tiny.gguf", "weight"),
        ("weights/adapter_config.json", "config"),
        ("run.py", "code"),
        ("data", "dataset"),
        ("README.md", "doc"),
        ("LICENSE", "license"),
    ]
    assert model.config.format == "gguf"
    assert model.config.cncf_descriptor["authors"] == ["Modelpack"]
    [weight] = modelpack.resolve(pushed, media_types=["gguf"], store=mine).files
    assert weight.path.read_bytes() == GGUF
    [rows] = modelpack.resolve(pushed, files=["data/rows.csv"], store=mine).files
    assert rows.path.read_text() == "a,b\n"
    layer = modelpack.resolve(pushed, media_types=[f"{KIT}model.*"], store=mine).files[0]
    assert layer.path == mine.blob_path(layer.file.descriptor.digest)
    bundle = modelpack.bundle(pushed, tmp_path / "bundle", store=mine)
    assert bundle.weight.read_bytes() == GGUF
    assert {file.path.removeprefix("model/") for file in bundle.files} == IN_THE_KIT


def push_as(store: modelpack.Store, name: str, pushed: str) -> str:
    descriptor = store.resolve(name)
    store.write_manifest(descriptor, store.fetch_manifest(descriptor), pushed)
    modelpack.push(pushed, store=store)
    return pushed


def test_a_modelkit_becomes_any_form(kits: modelpack.Store) -> None:
    """A compressed and an uncompressed kit give the same model, with the same bytes."""
    digests = {
        to: {
            convert(f"localhost:5055/made/kit:{kit}", f"x/{to}-{kit}:v1", to=to, store=kits).digest
            for kit in ("plain", "gzip")
        }
        for to in ("docker", "cncf")
    }
    assert all(len(found) == 1 for found in digests.values())
    docker = modelpack.inspect("x/docker-gzip:v1", store=kits)
    assert {file.filepath for file in docker.files()} == IN_THE_KIT
    assert docker.config.media_type == mt.DOCKER_CONFIG_V02
    assert (docker.config.format, docker.config.context_size) == ("gguf", 2048)
    cncf = modelpack.inspect("x/cncf-plain:v1", store=kits)
    assert cncf.manifest.is_cncf
    assert cncf.config.cncf_descriptor == {
        "authors": ["Modelpack"],
        "family": "llama",
        "name": "tiny",
        "version": "1.0.0",
        "licenses": ["Apache-2.0"],
        "description": "A tiny model",
    }
    assert cncf.manifest.annotations == {}
    [weight] = modelpack.resolve("x/cncf-plain:v1", media_types=["gguf"], store=kits).files
    assert weight.path.read_bytes() == GGUF
    convert("localhost:5055/made/kit:gzip", "x/image:v1", to="image", store=kits)
    files = files_of(kits, "x/image:v1")
    assert set(files) == {f"models/{path}" for path in IN_THE_KIT}
    assert files["models/weights/tiny.gguf"] == GGUF


def test_a_converted_modelkit_survives_gc(kits: modelpack.Store) -> None:
    convert("localhost:5055/made/kit:gzip", "x/docker:v1", to="docker", store=kits)
    kits.gc(grace_seconds=0)
    assert kits.missing(kits.resolve("docker.io/x/docker:v1")) == ()
    assert not [*(kits.root / "ingest/uploads").glob("files-*")]


def test_what_was_unpacked_goes_with_the_kit(kits: modelpack.Store) -> None:
    name = "localhost:5055/made/kit:gzip"
    [weight] = modelpack.resolve(name, media_types=["gguf"], store=kits).files
    assert kits.gc(grace_seconds=0).partials == ()
    (kits.root / "bundles" / ".modelpack-0.partial").mkdir()  # as in earlier versions
    assert kits.gc().partials == ("bundles/.modelpack-0.partial",)
    before = bytes_used(kits.root)
    removal = kits.remove(name)
    assert not weight.path.exists()
    assert kits.bundles.all() == {}
    freed = before - bytes_used(kits.root)
    # `freed` includes index.json.
    assert len(GGUF) < removal.bytes_freed <= freed < removal.bytes_freed + 8192
    assert kits.gc(grace_seconds=0).bytes_freed == 0


def kit_of(model: Mapping[str, Any], **more: Any) -> tuple[str, dict[str, Any]]:
    return mt.KITOPS_CONFIG, {"manifestVersion": "1.0", "model": dict(model), **more}


def packed(name: str, content: bytes = GGUF) -> Made:
    return f"{KIT}model.v1.tar", tar_of(name, content)


def digest_of(layer: Made) -> dict[str, str]:
    digest = str(Digest.of(layer[1]))
    return {"digest": digest, "diffId": digest}


def test_weights_of_a_directory_are_found_without_a_format(store: modelpack.Store) -> None:
    layer = f"{KIT}model.v1.tar+gzip", gzipped(tar_of("m/tiny.gguf", GGUF))
    keep(store, kit_of({"path": "m/", "digest": str(Digest.of(layer[1]))}), [layer])
    [found] = modelpack.resolve("x/m:v1", media_types=["gguf"], store=store).files
    assert (found.file.filepath, found.path.read_bytes()) == ("m/tiny.gguf", GGUF)
    with pytest.raises(NotFoundError, match=r"m/tiny\.gguf"):
        modelpack.resolve("x/m:v1", media_types=["safetensors"], store=store)


@pytest.mark.parametrize(
    ("kitfile", "place"),
    [
        ({"model": []}, "model"),
        ({"model": {"path": 1}}, "'path'"),
        ({"model": {"digest": "md5:1"}}, "model.digest"),
        ({"model": {"parts": {}}}, "'parts'"),
        ({"code": ["x"]}, r"code\[0\]"),
        ({"package": {"authors": [1]}}, "'authors'"),
    ],
)
def test_a_kitfile_that_is_none(store: modelpack.Store, kitfile: Any, place: str) -> None:
    keep(store, (mt.KITOPS_CONFIG, kitfile), [packed("a.gguf")])
    with pytest.raises((ManifestError, InvalidDigestError), match=place):
        modelpack.inspect("x/m:v1", store=store)


def test_a_kit_whose_model_is_another_kit(store: modelpack.Store, tmp_path: Path) -> None:
    docs = f"{KIT}docs.v1.tar", tar_of("README.md", b"#")
    keep(store, kit_of({"path": "ghcr.io/x/base:v1"}), [docs])
    with pytest.raises(UnsupportedError, match="no weights") as caught:
        modelpack.bundle("x/m:v1", tmp_path / "bundle", store=store)
    assert "another" in (caught.value.hint or "")


def test_hostile_kits_stay_inside(store: modelpack.Store, tmp_path: Path) -> None:
    outside = packed("../../evil.gguf")
    keep(store, kit_of({"path": "a.gguf", **digest_of(outside)}), [outside])
    other = packed("a.gguf")
    keep(store, kit_of({"path": "../a.gguf", **digest_of(other)}), [other], "x/path:v1")
    lies = {"path": "a.gguf", "digest": str(Digest.of(other[1])), "diffId": f"sha256:{'0' * 64}"}
    keep(store, kit_of(lies), [other], "x/lies:v1")
    twice = packed("a.gguf", GGUF + b"\0")
    keep(store, kit_of({"path": "a.gguf"}), [other, twice], "x/twice:v1")
    cases: list[tuple[str, type[Exception]]] = [
        ("x/m:v1", UnsafePathError),
        ("x/path:v1", UnsafePathError),
        ("x/lies:v1", DigestMismatchError),
        ("x/twice:v1", UnsafePathError),
    ]
    for name, error in cases:
        for act in _acts(store, name, tmp_path):
            with pytest.raises(error):
                act()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
    assert store.bundles.all() == {}
    assert not [*(store.root / "ingest/bundles").iterdir()]


def _acts(store: modelpack.Store, name: str, tmp_path: Path) -> list[Callable[[], object]]:
    return [
        lambda: convert(name, "x/made:v1", to="docker", store=store),
        lambda: convert(name, "x/made:v1", to="image", store=store),
        lambda: modelpack.resolve(name, media_types=["gguf"], store=store),
        lambda: modelpack.bundle(name, tmp_path / "bundle", store=store),
    ]


def test_a_kit_of_pickles_is_refused(store: modelpack.Store) -> None:
    layer = packed("model.pkl", b"\x80\x04.")
    keep(store, kit_of({"path": "model.pkl", **digest_of(layer)}), [layer])
    with pytest.raises(modelpack.errors.ModelpackError, match="no weight"):
        convert("x/m:v1", "x/made:v1", to="docker", store=store)


def test_a_kit_pulled_in_part_is_completed(kits: modelpack.Store, tmp_path: Path) -> None:
    """The files of an archive are known only after the whole kit is unpacked."""
    mine = modelpack.Store(tmp_path / "mine")
    with registry(tmp_path / "registry") as server:
        name = push_as(kits, "localhost:5055/made/kit:gzip", f"{server.host}/made/kit:v1")
        modelpack.pull(name, selection=Selection(media_types=("gguf",)), store=mine)
        with pytest.raises(PartialModelError):
            modelpack.resolve(name, media_types=["gguf"], store=mine)
        [weight] = modelpack.resolve(name, media_types=["gguf"], pull=True, store=mine).files
    assert weight.path.read_bytes() == GGUF


def test_the_headers_of_packed_weights(kits: modelpack.Store, tmp_path: Path) -> None:
    name = "localhost:5055/made/kit:gzip"
    [found] = read_headers(name, store=kits)
    assert (found.file.filepath, found.header.metadata["general.architecture"].value) == (
        "weights/tiny.gguf",
        "llama",
    )
    with registry(tmp_path / "registry") as server:
        pushed = push_as(kits, name, f"{server.host}/made/kit:v1")
        with pytest.raises(UnsupportedError, match="inside archives"):
            read_headers(pushed, from_registry=True)


def test_docker_does_not_get_what_it_does_not_take(kits: modelpack.Store, tmp_path: Path) -> None:
    name = "localhost:5055/made/kit:gzip"
    docker = DockerStore(tmp_path / "docker", create=True)
    for export in (
        lambda: archive_of(kits, [name], watching(None), form="docker"),
        lambda: export_to_docker([name], docker=docker, store=kits),
    ):
        with pytest.raises(UnsupportedError, match="cannot load") as caught:
            export()
        assert "--to docker" in (caught.value.hint or "")
    convert(name, "x/docker:v1", to="docker", store=kits)
    notes: list[str] = []
    exported = export_to_docker(
        [], docker=docker, store=kits, progress=lambda event: notes.append(event.message)
    )
    assert [one.references for one in exported] == [("docker.io/x/docker:v1",)]
    assert len([note for note in notes if "cannot load" in note]) == 2


# Ollama

OLLAMA = {"model_format": "gguf", "model_family": "llama", "model_families": ["llama"],
          "model_type": "1.2B", "file_type": "Q8_0", "architecture": "amd64", "os": "linux",
          "rootfs": {"type": "layers", "diff_ids": []}}  # fmt: skip
PARAMS = {"stop": ["<|end|>"], "temperature": 0.5}
OLLAMA_LAYERS: list[Made] = [
    (mt.OLLAMA_MODEL, GGUF),
    (mt.OLLAMA_TEMPLATE, b"{{ .Prompt }}"),
    (mt.OLLAMA_SYSTEM, b"Be brief."),
    (mt.OLLAMA_PARAMS, json.dumps(PARAMS).encode()),
    (mt.OLLAMA_MESSAGES, b'[{"role": "user", "content": "Hi"}]'),
    (mt.OLLAMA_LICENSE, b"MIT License"),
    (mt.OLLAMA_LICENSE, b"And another"),
]


def keep_ollama(
    store: modelpack.Store, layers: Sequence[Made] = OLLAMA_LAYERS, **config: Any
) -> Digest:
    value = (mt.DOCKER_IMAGE_CONFIG, {**OLLAMA, **config})
    return keep(store, value, layers, media_type=mt.DOCKER_MANIFEST)


def test_a_model_of_ollama_is_read(store: modelpack.Store, tmp_path: Path) -> None:
    keep_ollama(store, context_length=4096)
    model = modelpack.inspect("x/m:v1", store=store)
    config = model.config
    assert (config.format, config.parameters, config.quantization) == ("gguf", "1.2B", "Q8_0")
    assert (config.architecture, config.context_size) == ("llama", 4096)
    assert "Ollama" in succeed("inspect", "x/m:v1", "--store", store.root).out
    [weight] = modelpack.resolve("x/m:v1", media_types=["gguf"], store=store).files
    assert weight.path == store.blob_path(Digest.of(GGUF))
    bundle = modelpack.bundle("x/m:v1", tmp_path / "bundle", store=store)
    assert bundle.weight.read_bytes() == GGUF
    assert {file.path for file in bundle.files} == {
        "model/model.gguf",
        "model/template.gotmpl",
        "model/system.txt",
        "model/params.json",
        "model/messages.json",
        "model/LICENSE",
        "model/LICENSE-2",
    }


def test_a_model_of_ollama_becomes_any_form(store: modelpack.Store) -> None:
    keep_ollama(store)
    first = convert("x/m:v1", "x/docker:v1", to="docker", store=store)
    assert convert("x/m:v1", "x/again:v1", to="docker", store=store).digest == first.digest
    docker = modelpack.inspect("x/docker:v1", store=store)
    assert [(str(file.role), file.filepath) for file in docker.files()] == [
        ("weight", "model.gguf"),
        ("license", "LICENSE"),
        ("license", "LICENSE-2"),
    ]
    assert docker.config.media_type == mt.DOCKER_CONFIG_V01
    usage = json.loads(docker.manifest.annotations[mt.DEFAULTS])
    assert usage == {
        "parameters": PARAMS,
        "system": "Be brief.",
        "messages": [{"role": "user", "content": "Hi"}],
    }
    # The weights are reused: nothing is stored twice.
    assert docker.files()[0].descriptor.digest == Digest.of(GGUF)
    convert("x/m:v1", "x/cncf:v1", to="cncf", store=store)
    assert modelpack.inspect("x/cncf:v1", store=store).manifest.is_cncf
    convert("x/m:v1", "x/image:v1", to="image", store=store)
    assert files_of(store, "x/image:v1")["models/model.gguf"] == GGUF


def test_what_of_ollama_cannot_be_used(store: modelpack.Store, tmp_path: Path) -> None:
    keep_ollama(store, [*OLLAMA_LAYERS, (mt.OLLAMA_ADAPTER, b"GGUF")])
    for act in [_acts(store, "x/m:v1", tmp_path)[at] for at in (0, 1, 3)]:
        with pytest.raises(UnsupportedError, match="adapter"):
            act()
    keep_ollama(store, remote_host="https://ollama.com", remote_model="big")
    with pytest.raises(UnsupportedError, match=r"served by https://ollama\.com"):
        modelpack.inspect("x/m:v1", store=store)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ((mt.OLLAMA_PARAMS, b"[1]"), "expected an object"),
        ((mt.OLLAMA_PARAMS, b"{"), "JSON"),
        ((mt.OLLAMA_SYSTEM, b"\xff"), "not UTF-8"),
        ((mt.OLLAMA_MESSAGES, b'{"role": "user"}'), "not an array of messages"),
        ((mt.OLLAMA_MESSAGES, b'[{"role": 1}]'), "'role'"),
    ],
)
def test_layers_of_ollama_that_are_something_else(
    store: modelpack.Store, layer: Made, message: str
) -> None:
    keep_ollama(store, [(mt.OLLAMA_MODEL, GGUF), layer])
    with pytest.raises(ManifestError, match=message):
        convert("x/m:v1", "x/made:v1", to="docker", store=store)


def test_an_image_of_docker_is_no_model(store: modelpack.Store) -> None:
    tar = "application/vnd.docker.image.rootfs.diff.tar.gzip"
    keep(store, (mt.DOCKER_IMAGE_CONFIG, OLLAMA), [(tar, b"x")], media_type=mt.DOCKER_MANIFEST)
    with pytest.raises(UnsupportedError, match="not a supported model"):
        modelpack.inspect("x/m:v1", store=store)


# CNAI, the predecessor of CNCF ModelPack


def test_cnai_models_are_read(store: modelpack.Store) -> None:
    kind = "application/vnd.cnai.model."
    config = {
        "descriptor": {"name": "tiny"},
        "modelfs": {"type": "layers", "diff_ids": [str(Digest.of(GGUF))]},
        "config": {"format": "gguf", "capabilities": {"input_types": ["text"]}},
    }
    keep(store, (mt.CNAI_CONFIG, config), [(f"{kind}weight.v1.raw", GGUF)])
    model = modelpack.inspect("x/m:v1", store=store)
    assert model.files()[0].role is Role.WEIGHT
    convert("x/m:v1", "x/cncf:v1", to="cncf", store=store)
    cncf = modelpack.inspect("x/cncf:v1", store=store).config
    assert cncf.cncf_descriptor["name"] == "tiny"
    assert cncf.cncf_config["capabilities"] == {"inputTypes": ["text"]}


def test_archives_of_cncf_models_are_unpacked(store: modelpack.Store, tmp_path: Path) -> None:
    path = tmp_path / "weights.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(FIXTURES / "models/tiny-gguf/tiny.gguf", "m/tiny.gguf")
    raw = path.read_bytes()
    config = {
        "descriptor": {},
        "modelfs": {"type": "layers", "diffIds": [str(Digest.of(raw))]},
        "config": {"format": "gguf"},
    }
    layer = "application/vnd.cncf.model.weight.v1.tar", raw
    keep(store, (mt.CNCF_CONFIG, config), [layer])
    [found] = modelpack.resolve("x/m:v1", store=store).files
    assert found.path.read_bytes() == GGUF
    convert("x/m:v1", "x/docker:v1", to="docker", store=store)
    convert("x/m:v1", "x/image:v1", to="image", store=store)
    assert files_of(store, "x/image:v1") == {"models/m/tiny.gguf": GGUF}
