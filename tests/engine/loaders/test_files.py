"""The weights and other files of a model, from a store and from a directory."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.model import Model
from modelpack.errors import IntegrityError
from modelpack.store.layout import LayoutStore
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import ModelFiles
from tests.weights import write_safetensors


def layer(
    blobs: dict[Digest, Path], root: Path, kind: str, path: str | None, raw: bytes
) -> Descriptor:
    digest = Digest.of(raw)
    blobs[digest] = root / digest.encoded
    blobs[digest].write_bytes(raw)
    annotations = {} if path is None else {media_types.FILEPATH: path}
    return Descriptor(kind, digest, len(raw), annotations=annotations)


def model_of(*layers: Descriptor, format: str = "") -> Model:
    config = ModelConfig(media_types.DOCKER_CONFIG_V02, format=format)
    raw = config.encode()
    manifest = Manifest.build(
        config=Descriptor(media_types.DOCKER_CONFIG_V02, Digest.of(raw), len(raw)), layers=layers
    )
    return Model(None, manifest.descriptor, manifest, config)


def tar_of(**files: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def test_packaged_directory_is_read_from_blobs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_safetensors(source / "model.safetensors", b"w" * 64)
    (source / "config.json").write_text('{"model_type": "llama"}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    store = LayoutStore(tmp_path / "store")
    modelpack.package("m", modelpack.PackageRequest(safetensors_dir=source), store=store)
    model = modelpack.resolve("m", store=store).model
    files = ModelFiles.from_model(model, store.blob_path)
    assert files.format == "safetensors"
    (weight,) = files.weights
    assert weight.is_relative_to(store.root)
    assert weight.suffix == ""
    assert files.json("config.json") == {"model_type": "llama"}
    assert files.text("chat_template.jinja") == "{{ messages }}"
    assert files.read("tokenizer.json") is None


def test_roles_of_layers(tmp_path: Path) -> None:
    blobs: dict[Digest, Path] = {}

    def add(kind: str, path: str | None, raw: bytes) -> Descriptor:
        return layer(blobs, tmp_path, kind, path, raw)

    archive = tar_of(config__json=b'{"a": 1}', tokenizer__json=b"{}")
    model = model_of(
        add(media_types.DOCKER_GGUF, None, b"GGUF"),
        add(media_types.DOCKER_MMPROJ, "mmproj.gguf", b"GGUF2"),
        add(media_types.DOCKER_CHAT_TEMPLATE, "template.txt", b"first"),
        add(media_types.DOCKER_LICENSE, "LICENSE", b"free"),
        add(media_types.DOCKER_VLLM_CONFIG_TAR, "vllm.tar", archive),
        format="gguf",
    )
    files = ModelFiles.from_model(model, blobs.__getitem__)
    assert [path.read_bytes() for path in files.weights] == [b"GGUF"]
    assert files.text("chat_template.jinja") == "first"
    assert files.json("config.json") == {"a": 1}
    assert files.projector is not None
    assert files.projector.read_bytes() == b"GGUF2"
    assert files.notes == ()


def test_archives_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelpack_engine.models.files.MAX_FILE_BYTES", 1000)
    blobs: dict[Digest, Path] = {}
    raw = gzip.compress(tar_of(config__json=b" " * 2000))
    kind = "application/vnd.cncf.model.weight.config.v1.tar+gzip"
    model = model_of(
        layer(blobs, tmp_path, media_types.DOCKER_GGUF, None, b"GGUF"),
        layer(blobs, tmp_path, kind, "config.tar.gz", raw),
    )
    with pytest.raises(
        IntegrityError, match="the archive exceeds 100000 files or 1000 bytes per file"
    ):
        ModelFiles.from_model(model, blobs.__getitem__)


def test_archives_of_one_model_share_their_limits(tmp_path: Path) -> None:
    """Each archive is small and unpacks to 64 MiB; together they would unpack to any size."""
    blobs: dict[Digest, Path] = {}
    kind = "application/vnd.cncf.model.weight.config.v1.tar+gzip"
    layers = [layer(blobs, tmp_path, media_types.DOCKER_GGUF, None, b"GGUF")]
    for number in range(3):
        raw = gzip.compress(tar_of(**{f"{number}__json": bytes(40 << 20)}))
        layers.append(layer(blobs, tmp_path, kind, f"{number}.tar.gz", raw))
    with pytest.raises(IntegrityError, match=r"1\.tar\.gz"):
        ModelFiles.from_model(model_of(*layers), blobs.__getitem__)


def test_documents_are_bounded(tmp_path: Path) -> None:
    """Parsing JSON takes 25 times its size in memory, and blocks all threads."""
    files = ModelFiles((), "safetensors", archived={"config.json": b"[]," * 6_000_000})
    with pytest.raises(ModelLoadError, match=r"config\.json: 18000000 bytes of JSON"):
        files.json("config.json")


def test_weights_in_an_archive_are_refused(tmp_path: Path) -> None:
    blobs: dict[Digest, Path] = {}
    kind = "application/vnd.cncf.model.weight.v1.tar"
    model = model_of(layer(blobs, tmp_path, kind, "model.safetensors", tar_of(a=b"b")))
    with pytest.raises(ModelLoadError, match="weights in a tar archive cannot be loaded") as caught:
        ModelFiles.from_model(model, blobs.__getitem__)
    assert "modelpack bundle" in (caught.value.hint or "")


def test_the_index_says_which_safetensors_count(tmp_path: Path) -> None:
    for name in ("model-00001-of-00002", "model-00002-of-00002", "consolidated"):
        write_safetensors(tmp_path / f"{name}.safetensors", name.encode())
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    files = ModelFiles.from_directory(tmp_path)
    assert [path.name for path in files.weights] == shards
    (tmp_path / shards[1]).unlink()
    with pytest.raises(ModelLoadError, match=f"missing {shards[1]}"):
        ModelFiles.from_directory(tmp_path)


def test_safetensors_in_folders_are_other_models(tmp_path: Path) -> None:
    blobs: dict[Digest, Path] = {}
    kind = media_types.DOCKER_SAFETENSORS
    own = layer(blobs, tmp_path, kind, "model.safetensors", b"own")
    other = layer(blobs, tmp_path, kind, "lora/adapter_model.safetensors", b"other")
    files = ModelFiles.from_model(model_of(other, own), blobs.__getitem__)
    assert [path.read_bytes() for path in files.weights] == [b"own"]
    assert files.notes == ("weights in folders are left out: lora/adapter_model.safetensors",)
    alone = ModelFiles.from_model(model_of(other), blobs.__getitem__)
    assert [path.read_bytes() for path in alone.weights] == [b"other"]
    assert alone.notes == ()


def test_directories(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="has no weights"):
        ModelFiles.from_directory(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "template.jinja").write_text("t")
    files = ModelFiles.from_directory(tmp_path)
    assert (files.format, files.text("chat_template.jinja")) == ("gguf", "t")
    write_safetensors(tmp_path / "model.safetensors", b"w")
    files = ModelFiles.from_directory(tmp_path)
    assert files.format == "gguf"
    assert files.notes == ("the weights are in several formats; gguf is loaded",)
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        ModelLoadError, match=r"has the weights of several models: a\.gguf, b\.gguf"
    ):
        ModelFiles.from_directory(tmp_path)
    assert ModelFiles.from_directory(tmp_path / "b.gguf").weights == (tmp_path / "b.gguf",)
    with pytest.raises(ModelLoadError, match="cannot be listed"):
        ModelFiles.from_directory(tmp_path / "nothing")


def test_only_other_formats(tmp_path: Path) -> None:
    (tmp_path / "m.dduf").write_bytes(b"PK")
    with pytest.raises(ModelLoadError, match="DDUF file, a model that generates images") as caught:
        ModelFiles.from_directory(tmp_path)
    assert caught.value.hint is not None
    assert "diffusers" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not JSON"), (b"[]", "is not a JSON object"), (b'"\xff"', "is not JSON")],
)
def test_broken_documents(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    files = ModelFiles((), "gguf", {"config.json": path})
    with pytest.raises(ModelLoadError, match=rf"config\.json: {message}"):
        files.json("config.json")


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    files = ModelFiles((), "gguf", {"a": path})
    with pytest.raises(ModelLoadError, match="a: cannot be read"):
        files.read("a")
    path.write_bytes(b"\xff12")
    with pytest.raises(ModelLoadError, match="a: is not UTF-8 at byte 0"):
        files.text("a")
    monkeypatch.setattr("modelpack_engine.models.files.MAX_FILE_BYTES", 2)
    with pytest.raises(ModelLoadError, match="a: 3 bytes, the limit is 2"):
        files.read("a")
