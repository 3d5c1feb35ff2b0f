"""Conversion from Docker's format to the CNCF format and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.builder.build import Built, assemble, repackage
from modelpack.builder.conversion import (
    cncf_config,
    cncf_layers,
    cncf_media_type,
    docker_config_type,
    docker_layers,
)
from modelpack.builder.description import Description
from modelpack.builder.plan import plan
from modelpack.builder.request import Format, PackageRequest
from modelpack.errors import UnsupportedError
from tests.packaging.trees import (
    DDUF,
    MIT,
    MODELS,
    PROJECTOR,
    SHARDS,
    TEMPLATE,
    TINY,
    TINY_DIRECTORY,
    package,
    write,
)


def converted(
    built: Built,
    format: Format,
    *,
    preserve: bool = False,
    description: Description | None = None,
) -> Built:
    request = PackageRequest(format=format, preserve=preserve)
    # A model from a store has been parsed.
    manifest = Manifest.parse(built.manifest.raw)
    config = ModelConfig.parse(built.config_bytes, manifest.config.media_type)
    return repackage(manifest, config, request, None, (), description=description, environ={})


def layer(media_type: str, filepath: str | None = None, content: str = "") -> Descriptor:
    digest = Digest.of(f"{filepath}{content}".encode())
    return Descriptor(media_type, digest, 1, {media_types.FILEPATH: filepath} if filepath else {})


# The table of Docker Model Runner.
@pytest.mark.parametrize(
    ("given_type", "filepath", "expected"),
    [
        (media_types.DOCKER_GGUF, "m.gguf", media_types.CNCF_WEIGHT_RAW),
        (media_types.DOCKER_GGUF, None, media_types.CNCF_WEIGHT_RAW),
        (media_types.DOCKER_SAFETENSORS, "LICENSE", media_types.CNCF_WEIGHT_RAW),
        (media_types.DOCKER_DDUF, "x.dduf", media_types.CNCF_WEIGHT_RAW),
        (media_types.DOCKER_MMPROJ, "mmproj.gguf", media_types.CNCF_WEIGHT_RAW),
        (media_types.CNCF_WEIGHT_GGUF, None, media_types.CNCF_WEIGHT_RAW),
        (media_types.CNCF_WEIGHT_SAFETENSORS, None, media_types.CNCF_WEIGHT_RAW),
        (media_types.CNCF_WEIGHT_RAW, "README.md", media_types.CNCF_WEIGHT_RAW),
        (media_types.DOCKER_LICENSE, "m.gguf", media_types.CNCF_DOC_RAW),
        (media_types.CNCF_DOC_RAW, None, media_types.CNCF_DOC_RAW),
        (media_types.DOCKER_CHAT_TEMPLATE, "t.jinja", media_types.CNCF_WEIGHT_CONFIG_RAW),
        (media_types.DOCKER_MODEL_FILE, "README.md", media_types.CNCF_WEIGHT_CONFIG_RAW),
        (media_types.DOCKER_MODEL_FILE, "m.gguf", media_types.CNCF_WEIGHT_CONFIG_RAW),
        (media_types.DOCKER_VLLM_CONFIG_TAR, None, media_types.CNCF_WEIGHT_CONFIG_RAW),
        (media_types.CNCF_WEIGHT_CONFIG_RAW, None, media_types.CNCF_WEIGHT_CONFIG_RAW),
        ("application/x-other", None, media_types.CNCF_WEIGHT_CONFIG_RAW),
        ("application/x-other", "a/m.GGUF", media_types.CNCF_WEIGHT_RAW),
        ("application/x-other", "README.md", media_types.CNCF_DOC_RAW),
        ("application/x-other", "README.txt", media_types.CNCF_WEIGHT_CONFIG_RAW),
        ("application/x-other", "COPYING", media_types.CNCF_DOC_RAW),
        ("application/x-other", "chat_template.md", media_types.CNCF_WEIGHT_CONFIG_RAW),
        ("application/x-other", "x.py", media_types.CNCF_WEIGHT_CONFIG_RAW),
        (media_types.DOCKER_DIR_TAR, "docs.md", media_types.CNCF_DOC_RAW),
    ],
)
def test_cncf_types(given_type: str, filepath: str | None, expected: str) -> None:
    assert cncf_media_type(given_type, filepath) == expected


def test_packaging_and_converting_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "d", TINY_DIRECTORY)
    write(tmp_path, {"m.gguf": TINY, "x.dduf": DDUF, "LICENSE": MIT, **SHARDS})
    for request in (
        PackageRequest(safetensors_dir=tmp_path / "d"),
        PackageRequest(gguf=tmp_path / "m.gguf", licenses=(tmp_path / "LICENSE",)),
        PackageRequest(gguf=tmp_path / min(SHARDS), annotations={"k": "v"}),
        PackageRequest(dduf=tmp_path / "x.dduf"),
    ):
        direct = package(replace(request, format="cncf"))
        description = plan(replace(request, format="cncf"), environ={}).description
        by_way_of_docker = converted(package(request), "cncf", description=description)
        assert by_way_of_docker.manifest.raw == direct.manifest.raw
        assert by_way_of_docker.config_bytes == direct.config_bytes
        preserved = replace(request, preserve=True)
        direct = package(replace(preserved, format="cncf"))
        by_way_of_docker = converted(package(preserved), "cncf", preserve=True)
        assert by_way_of_docker.manifest.raw == direct.manifest.raw
        assert direct.config.cncf_descriptor.keys() <= {"family"}
        assert direct.config.cncf_config == {}


def everything(root: Path) -> list[PackageRequest]:
    write(
        root / "d",
        {**TINY_DIRECTORY, "sub/model-2.safetensors": TINY_DIRECTORY["model.safetensors"]},
    )
    write(root / "g", {"m.gguf": TINY, "config.json": b"{}", "mmproj-m.gguf": PROJECTOR})
    write(root, {"m.gguf": TINY, "x.dduf": DDUF, "LICENSE": MIT, "TERMS": MIT, "b.jinja": TEMPLATE})
    write(
        root, {**SHARDS, "mmproj.gguf": PROJECTOR, "vision.gguf": PROJECTOR, "p.mmproj": PROJECTOR}
    )
    extras = {"licenses": (root / "LICENSE", root / "TERMS"), "chat_template": root / "b.jinja"}
    whole = PackageRequest(gguf=root / "m.gguf")
    return [
        whole,
        PackageRequest(gguf=root / "m.gguf", **extras, mmproj=root / "mmproj.gguf"),  # type: ignore[arg-type]
        replace(whole, mmproj=root / "vision.gguf"),
        replace(whole, mmproj=root / "p.mmproj"),
        PackageRequest(gguf=root / min(SHARDS), mmproj=root / "vision.gguf"),
        PackageRequest(dduf=root / "x.dduf", **extras),  # type: ignore[arg-type]
        PackageRequest(safetensors_dir=root / "d"),
        PackageRequest(safetensors_dir=root / "d", **extras, mmproj=root / "mmproj.gguf"),  # type: ignore[arg-type]
        PackageRequest(safetensors_dir=root / "g"),
        PackageRequest(safetensors_dir=MODELS / "tiny-safetensors-sharded"),
    ]


@pytest.mark.parametrize("number", range(10))
def test_there_and_back(number: int, tmp_path: Path) -> None:
    requests = everything(tmp_path)
    assert len(requests) == 10
    first = package(requests[number])
    back = converted(converted(first, "cncf"), "docker")
    assert back.manifest.layers == first.manifest.layers
    assert back.manifest.config.media_type == first.manifest.config.media_type
    assert back.manifest.artifact_type is None
    kept = ("format", "quantization", "parameters", "architecture", "created", "diff_ids")
    for key in kept:
        assert getattr(back.config, key) == getattr(first.config, key), key
    if first.config.format != "gguf":
        assert back.config.size == first.config.size
    # A second conversion loses no more fields.
    assert converted(converted(back, "cncf"), "docker").manifest.raw == back.manifest.raw


@pytest.mark.parametrize("format", ["docker", "cncf"])
def test_a_model_in_its_own_format_stays(tmp_path: Path, format: Format) -> None:
    write(tmp_path, {"m.gguf": TINY})
    first = package(PackageRequest(gguf=tmp_path / "m.gguf", format=format))
    assert converted(first, format).manifest.raw == first.manifest.raw


FULL_CNCF = ModelConfig(
    media_types.CNCF_CONFIG,
    format="safetensors",
    quantization="q4",
    parameters="8b",
    architecture="transformer",
    created="2025-01-02T03:04:05Z",
    cncf_descriptor={"family": "llama", "authors": ["x"], "licenses": ["MIT"]},
    cncf_config={"precision": "bf16", "capabilities": {"reasoning": True}},
)


def foreign(*layers: Descriptor, config: ModelConfig = FULL_CNCF) -> Built:
    ids = tuple(layer.digest for layer in layers)
    return assemble(config.with_changes(diff_ids=ids), layers, {"org.example.k": "v"})


def test_a_model_of_another_tool() -> None:
    first = foreign(
        layer(media_types.CNCF_WEIGHT_RAW, "model-00001-of-00001.safetensors"),
        layer(media_types.CNCF_WEIGHT_CONFIG_RAW, "config.json"),
        layer(media_types.CNCF_WEIGHT_CONFIG_RAW, "chat_template.jinja"),
        layer(media_types.CNCF_DOC_RAW, "README.md"),
        layer(media_types.CNCF_DOC_RAW, "LICENSE"),
        layer(media_types.CNCF_CODE_RAW, "modeling.py"),
        layer(media_types.CNCF_DATASET_RAW, "data/license.gguf"),
    )
    back = converted(first, "docker")
    assert [x.media_type for x in back.manifest.layers] == [
        media_types.DOCKER_SAFETENSORS,
        media_types.DOCKER_MODEL_FILE,
        media_types.DOCKER_CHAT_TEMPLATE,
        media_types.DOCKER_MODEL_FILE,
        media_types.DOCKER_LICENSE,
        media_types.DOCKER_MODEL_FILE,
        media_types.DOCKER_MODEL_FILE,
    ]
    assert back.manifest.config.media_type == media_types.DOCKER_CONFIG_V02
    assert back.manifest.annotations == {"org.example.k": "v"}
    assert back.config.with_changes(diff_ids=()) == ModelConfig(
        media_types.DOCKER_CONFIG_V02,
        format="safetensors",
        quantization="q4",
        parameters="8b",
        architecture="transformer",
        size="1.00B",
        created="2025-01-02T03:04:05Z",
    )


def test_architecture_falls_back_to_the_family() -> None:
    config = FULL_CNCF.with_changes(architecture="")
    back = converted(foreign(layer(media_types.CNCF_WEIGHT_RAW, "m.gguf"), config=config), "docker")
    assert back.config.architecture == "llama"


@pytest.mark.parametrize(
    ("given_layer", "format", "expected"),
    [
        (layer(media_types.CNCF_WEIGHT_RAW, "x.gguf"), "", media_types.DOCKER_GGUF),
        (layer(media_types.CNCF_WEIGHT_RAW, "x.GGUF"), "gguf", media_types.DOCKER_GGUF),
        (layer(media_types.CNCF_WEIGHT_RAW, "x.gguf"), "safetensors", media_types.DOCKER_MMPROJ),
        (layer(media_types.CNCF_WEIGHT_RAW, "weights"), "gguf", media_types.DOCKER_GGUF),
        (
            layer(media_types.CNCF_WEIGHT_RAW, "weights"),
            "safetensors",
            media_types.DOCKER_SAFETENSORS,
        ),
        (layer(media_types.CNCF_WEIGHT_RAW, "weights"), "diffusers", media_types.DOCKER_DDUF),
        (layer(media_types.CNCF_WEIGHT_RAW), "gguf", media_types.DOCKER_GGUF),
        (layer(media_types.CNCF_WEIGHT_GGUF), "", media_types.DOCKER_GGUF),
        (layer(media_types.CNCF_WEIGHT_SAFETENSORS, "x"), "", media_types.DOCKER_SAFETENSORS),
        (layer(media_types.CNCF_DOC_RAW, "TERMS"), "gguf", media_types.DOCKER_LICENSE),
        (layer(media_types.CNCF_DOC_RAW, "terms.txt"), "gguf", media_types.DOCKER_LICENSE),
        (layer(media_types.CNCF_DOC_RAW), "gguf", media_types.DOCKER_LICENSE),
        (layer(media_types.CNCF_DOC_RAW, "license.md"), "gguf", media_types.DOCKER_LICENSE),
        (layer(media_types.CNCF_DOC_RAW, "paper.PDF"), "gguf", media_types.DOCKER_MODEL_FILE),
        (layer(media_types.DOCKER_LICENSE, "x.md"), "gguf", media_types.DOCKER_LICENSE),
        (layer("application/x-other", "x.jinja"), "gguf", media_types.DOCKER_CHAT_TEMPLATE),
        (layer("application/x-other", "x.gguf"), "gguf", media_types.DOCKER_MODEL_FILE),
    ],
)
def test_docker_types(given_layer: Descriptor, format: str, expected: str) -> None:
    # With a plain file, so that the model is not a single-file one.
    config = FULL_CNCF.with_changes(format=format)
    beside = layer(media_types.CNCF_CODE_RAW, "dir/x.py")
    first, _ = docker_layers([given_layer, beside], config)
    assert first == replace(given_layer, media_type=expected)


@pytest.mark.parametrize(
    "given_type",
    [
        "application/vnd.cncf.model.weight.v1.tar",
        "application/vnd.cncf.model.weight.v1.tar+gzip",
        "application/vnd.cncf.model.doc.v1.tar+zstd",
        "application/vnd.cncf.model.weight.config.v1.raw+gzip",
    ],
)
def test_archives_have_no_counterpart(given_type: str) -> None:
    with pytest.raises(UnsupportedError, match="single files") as caught:
        docker_layers([layer(given_type, "weights")], FULL_CNCF)
    assert given_type in str(caught.value)
    assert "bundle" in (caught.value.hint or "")


def test_a_weight_of_unknown_format() -> None:
    with pytest.raises(UnsupportedError, match="'onnx'"):
        docker_layers(
            [layer(media_types.CNCF_WEIGHT_RAW, "m.onnx")], FULL_CNCF.with_changes(format="onnx")
        )


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([layer(media_types.DOCKER_GGUF, "m.gguf")], media_types.DOCKER_CONFIG_V01),
        ([layer(media_types.DOCKER_GGUF)], media_types.DOCKER_CONFIG_V01),
        (
            [layer(media_types.DOCKER_SAFETENSORS), layer(media_types.DOCKER_MODEL_FILE, "a/b")],
            media_types.DOCKER_CONFIG_V01,
        ),
        ([layer(media_types.DOCKER_GGUF, "a/m.gguf")], media_types.DOCKER_CONFIG_V02),
        ([layer(media_types.DOCKER_SAFETENSORS, "m.safetensors")], media_types.DOCKER_CONFIG_V02),
        (
            [layer(media_types.DOCKER_GGUF, "m.gguf"), layer(media_types.DOCKER_MODEL_FILE, "x")],
            media_types.DOCKER_CONFIG_V02,
        ),
        (
            [
                layer(media_types.DOCKER_GGUF, "m.gguf"),
                layer(media_types.DOCKER_CHAT_TEMPLATE, "t.jinja"),
            ],
            media_types.DOCKER_CONFIG_V01,
        ),
        (
            [
                layer(media_types.DOCKER_GGUF, "m.gguf"),
                layer(media_types.DOCKER_CHAT_TEMPLATE, "a.jinja"),
                layer(media_types.DOCKER_CHAT_TEMPLATE, "b.jinja"),
            ],
            media_types.DOCKER_CONFIG_V02,
        ),
    ],
)
def test_config_types(layers: list[Descriptor], expected: str) -> None:
    assert docker_config_type(layers) == expected


def test_shards_without_paths_stay_weights() -> None:
    shards = [layer(media_types.CNCF_WEIGHT_GGUF, content=str(i)) for i in range(3)]
    assert [x.media_type for x in docker_layers(shards, FULL_CNCF)] == [media_types.DOCKER_GGUF] * 3


names = st.text("aL.-_é/", min_size=1, max_size=6)
endings = st.sampled_from(
    [
        ".gguf",
        ".safetensors",
        ".dduf",
        ".jinja",
        ".md",
        ".txt",
        ".json",
        "",
        "LICENSE",
        "-00001-of-00002.gguf",
    ]
)
any_layers = st.lists(
    st.builds(
        layer,
        st.sampled_from(
            [
                media_types.CNCF_WEIGHT_RAW,
                media_types.CNCF_WEIGHT_CONFIG_RAW,
                media_types.CNCF_DOC_RAW,
                media_types.CNCF_CODE_RAW,
            ]
        ),
        st.none() | st.builds(str.__add__, names, endings),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None)
@given(any_layers, st.sampled_from(["gguf", "safetensors", "dduf", "diffusers"]))
def test_conversion_changes_types_only_and_settles(layers: list[Descriptor], format: str) -> None:
    config = FULL_CNCF.with_changes(format=format)
    once = docker_layers(layers, config)
    assert [replace(x, media_type="a/b") for x in once] == [
        replace(x, media_type="a/b") for x in layers
    ]
    assert all(x.media_type.startswith("application/vnd.docker.ai.") for x in once)
    weights = [i for i, x in enumerate(layers) if x.media_type == media_types.CNCF_WEIGHT_RAW]
    assert [
        i
        for i, x in enumerate(cncf_layers(once, titles=True))
        if x.media_type == media_types.CNCF_WEIGHT_RAW
    ] == weights
    again = docker_layers(cncf_layers(once, titles=True), config)
    assert cncf_layers(again, titles=True) == cncf_layers(once, titles=True)


def test_cncf_configs_keep_what_fits() -> None:
    docker = ModelConfig(
        media_types.DOCKER_CONFIG_V01, format="gguf", quantization="Q", parameters="8",
        architecture="llama", size="32B", gguf={"a": "b"}, context_size=5,
        created="2025-01-02T03:04:05Z",
    )  # fmt: skip
    assert cncf_config(docker) == ModelConfig(
        media_types.CNCF_CONFIG, format="gguf", quantization="Q", parameters="8",
        architecture="llama", created="2025-01-02T03:04:05Z", cncf_descriptor={"family": "llama"},
    )  # fmt: skip
    assert cncf_config(docker.with_changes(architecture="")).cncf_descriptor == {}
    assert cncf_config(FULL_CNCF) is FULL_CNCF
