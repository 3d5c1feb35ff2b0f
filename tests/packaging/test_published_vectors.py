"""Vectors A to F of the format's documentation, byte for byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelpack.artifacts.digest import Digest
from modelpack.builder.request import PackageRequest
from tests.packaging.trees import ALIGNED, CREATED, MIT, TINY, TINY_DIRECTORY, package, write

PRESERVED = PackageRequest(created=CREATED, preserve=True)

CONFIG_A = (
    '{"config":{"format":"gguf","quantization":"MOSTLY_F32","parameters":"8","architecture":"llama",'
    '"size":"32B","gguf":{"general.architecture":"llama","general.name":"tiny \\u003c\\u0026\\u003e'
    ' v1","llama.context_length":"2048"},"context_size":2048},"descriptor":{"created":'
    '"2025-01-02T03:04:05Z"},"rootfs":{"type":"rootfs","diff_ids":["sha256:'
    'd1bdb851bdd707d5d2fc1e6dbb3db8a0e4489cdc42616f551c6eb0943e18b14b"]}}'
)
MANIFEST_A = (
    '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType'
    '":"application/vnd.docker.ai.model.config.v0.1+json","size":405,"digest":"sha256:'
    '71c66edccf36d4eee5cbd65a607ea0298b00df48f754ffe918fb5140221688dd"},"layers":[{"mediaType":'
    '"application/vnd.docker.ai.gguf.v3","size":256,"digest":"sha256:'
    'd1bdb851bdd707d5d2fc1e6dbb3db8a0e4489cdc42616f551c6eb0943e18b14b","annotations":{'
    '"org.cncf.model.file.mediatype.untested":"false","org.cncf.model.file.metadata+json":'
    '"{\\"name\\":\\"tiny.gguf\\",\\"mode\\":420,\\"uid\\":0,\\"gid\\":0,\\"size\\":256,\\"mtime\\":'
    '\\"2025-01-02T03:04:05Z\\",\\"typeflag\\":0}","org.cncf.model.filepath":"tiny.gguf"}}]}'
)

# name, request on files below a directory, config size and digest, manifest size and digest
VECTORS: dict[str, tuple[dict[str, Any], tuple[int, str], tuple[int, str]]] = {
    "A": (
        {"gguf": "tiny.gguf"},
        (405, "71c66edccf36d4eee5cbd65a607ea0298b00df48f754ffe918fb5140221688dd"),
        (661, "f9ffc183404b1e3cadd76769ac94a958c702c70b8a56e57179161dfef48efaa7"),
    ),
    "B": (
        {"gguf": "tiny.gguf", "format": "cncf"},
        (276, "af2741f1de0ec60e588ee563c808793ec49bb086b73fb3ba7ecb1f1480dadd9a"),
        (722, "3fa9b1b260745d1d656de46da243a93685b2257e92be39f1f6ff1126f7dd4dab"),
    ),
    "C": (
        {"gguf": "tiny.gguf", "licenses": ("LICENSE.txt",), "context_size": 4096},
        (479, "9f4dfadd9ec2be7b9505e7af998bed104c8c287a49b8468c27029c136281e8b4"),
        (1067, "f22a0022625dd98919bbd0d599a43ba754f10e018b2dc367b71aba685e5cb833"),
    ),
    "D": (
        {"safetensors_dir": "directory"},
        (621, "a77ea763418318ad04af286b036a4c28fcd24d3917c8681f65a7511cad48fbc1"),
        (2335, "e51aad583e4b99c3d1335014fcb4bd64c85cfc58f758610f109f304ca869e625"),
    ),
    "E": (
        {"safetensors_dir": "directory", "format": "cncf"},
        (537, "7e6f133a7234ca64923355fc3a96c2c4afbc538876f2fb99ad09cf957d51f580"),
        (2420, "5abbb3fec8a92446a1cda46581df76efed570c180f2b902408ec0e97a504be3a"),
    ),
}


pytestmark = pytest.mark.usefixtures("utc")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, {"tiny.gguf": TINY, "LICENSE.txt": MIT})
    write(tmp_path / "directory", TINY_DIRECTORY)
    return tmp_path


def request_at(root: Path, **values: Any) -> PackageRequest:
    paths: dict[str, Any] = {
        key: root / value if isinstance(value, str) and key != "format" else value
        for key, value in values.items()
    }
    if "licenses" in values:
        paths["licenses"] = tuple(root / name for name in values["licenses"])
    return replace(PRESERVED, **paths)


@pytest.mark.parametrize("name", VECTORS)
def test_published_digests(name: str, root: Path) -> None:
    values, config, manifest = VECTORS[name]
    built = package(request_at(root, **values))
    assert (len(built.config_bytes), Digest.of(built.config_bytes).encoded) == config
    assert (len(built.manifest.raw), built.manifest.digest.encoded) == manifest


def test_vector_a_in_full(root: Path) -> None:
    built = package(request_at(root, gguf="tiny.gguf"))
    assert built.config_bytes.decode() == CONFIG_A
    assert built.manifest.raw.decode() == MANIFEST_A


def test_vector_f_has_the_odd_size(tmp_path: Path) -> None:
    write(tmp_path, {"tiny.gguf": ALIGNED})
    assert package(request_at(tmp_path, gguf="tiny.gguf")).config.size == "0B"


DESCRIBED_CONFIG = (
    '{"descriptor":{"createdAt":"1970-01-01T00:00:00Z","authors":["Ada"],"family":"llama",'
    '"datasetsURL":["https://huggingface.co/datasets/team/set"],"licenses":["MIT"]},"modelfs":'
    '{"type":"layers","diffIds":[DIFFS]},"config":{"architecture":"llama","format":"safetensors",'
    '"paramSize":"7.00","precision":"bfloat16","quantization":"mixed","capabilities":{"inputTypes":'
    '["text","image"],"outputTypes":["text"],"reasoning":false,"toolUsage":false}}}'
)


def test_cncf_without_preserve(root: Path) -> None:
    """Change these bytes only together with CHANGELOG.md: digests of new artifacts change."""
    built = package(PackageRequest(gguf=root / "tiny.gguf", format="cncf"))
    expected = "6051a9a98d69bbdf0d6c09d4fc848ae7a32f6f72471d8db6a3e7e6dc0a9afbff"
    assert (len(built.config_bytes), Digest.of(built.config_bytes).encoded) == (360, expected)
    expected = "c5ca84de3922c632c2419ab7507852b69ac8bea5da8edbf71206307b62a60e28"
    assert (len(built.manifest.raw), built.manifest.digest.encoded) == (767, expected)
    config = (
        b'{"model_type":"llama","dtype":"bfloat16","vision_config":{},'
        b'"max_position_embeddings":512}'
    )
    card = b"---\nlicense: mit\ndatasets: [team/set]\nauthors: [Ada]\n---\n"
    write(root / "directory", {"config.json": config, "README.md": card})
    built = package(PackageRequest(safetensors_dir=root / "directory", format="cncf"))
    diffs = ",".join(f'"{layer.digest}"' for layer in built.manifest.layers)
    assert built.config_bytes.decode() == DESCRIBED_CONFIG.replace("DIFFS", diffs)
