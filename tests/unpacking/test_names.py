"""Paths of files in a bundle: the rules of each generation, and conflicts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.digest import Digest
from modelpack.bundles.names import Arrangement, arrange
from modelpack.errors import UnsafePathError
from tests.unpacking.stored import CNCF, Layer, Stored

V01, V02 = media_types.DOCKER_CONFIG_V01, media_types.DOCKER_CONFIG_V02
RAW, CONFIG_RAW, DOC_RAW = (
    media_types.CNCF_WEIGHT_RAW,
    media_types.CNCF_WEIGHT_CONFIG_RAW,
    media_types.CNCF_DOC_RAW,
)


def hexes(content: bytes) -> str:
    return Digest.of(content).encoded


def arranged(
    stored: Stored, config_type: str, layers: Sequence[Layer], *, format: str = ""
) -> Arrangement:
    kind = media_types.CNCF_MANIFEST if config_type == media_types.CNCF_CONFIG else None
    config = ModelConfig(config_type, format=format)
    return arrange(stored.model(layers, config, artifact_type=kind))


def paths(arrangement: Arrangement) -> list[str]:
    return [placed.path for placed in arrangement.files]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([(media_types.DOCKER_GGUF, "tiny.gguf", b"w")], ["model.gguf"]),
        ([(media_types.DOCKER_GGUF, None, b"w")], ["model.gguf"]),
        ([(media_types.CNCF_WEIGHT_GGUF, "sub/tiny.gguf", b"w")], ["model.gguf"]),
        (
            [(media_types.DOCKER_GGUF, f"{n}.gguf", b"w%d" % n) for n in (1, 2, 3)],
            [f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)],
        ),
        (  # the numbers of a complete set take precedence over the order of layers
            [(media_types.DOCKER_GGUF, f"t-0000{n}-of-00003.gguf", b"w%d" % n) for n in (2, 3, 1)],
            [f"model-0000{n}-of-00003.gguf" for n in (2, 3, 1)],
        ),
        (  # those of an incomplete set do not
            [(media_types.DOCKER_GGUF, f"t-0000{n}-of-00003.gguf", b"w%d" % n) for n in (3, 1)],
            ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"],
        ),
        (  # and neither do those of two sets
            [
                (media_types.DOCKER_GGUF, "t-00002-of-00002.gguf", b"w1"),
                (media_types.DOCKER_GGUF, "u-00002-of-00002.gguf", b"w2"),
            ],
            ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"],
        ),
        (
            [
                (media_types.DOCKER_GGUF, "tiny.gguf", b"w"),
                (media_types.DOCKER_LICENSE, "LICENSE.txt", b"MIT"),
                (media_types.DOCKER_CHAT_TEMPLATE, "chat_template.jinja", b"{{}}"),
                (media_types.DOCKER_MMPROJ, "mmproj-f16.gguf", b"p"),
                (media_types.DOCKER_MODEL_FILE, "sub/params.json", b"{}"),
            ],
            ["model.gguf", "LICENSE.txt", "template.jinja", "model.mmproj", "sub/params.json"],
        ),
        (  # a projector packaged from a directory has the type of a weight
            [
                (media_types.DOCKER_GGUF, "a.gguf", b"w"),
                (media_types.DOCKER_GGUF, "mmproj-a.gguf", b"p"),
            ],
            ["model.gguf", "model.mmproj"],
        ),
        ([(media_types.DOCKER_SAFETENSORS, "sub/x.safetensors", b"w")], ["sub/x.safetensors"]),
        ([(media_types.DOCKER_SAFETENSORS, None, b"w")], ["model.safetensors"]),
        (
            [
                (media_types.DOCKER_SAFETENSORS, None, b"w1"),
                (media_types.DOCKER_SAFETENSORS, None, b"w2"),
            ],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (
            [
                (media_types.DOCKER_SAFETENSORS, "a.safetensors", b"w1"),
                (media_types.DOCKER_SAFETENSORS, None, b"w2"),
            ],
            ["a.safetensors", "model-00002-of-00002.safetensors"],
        ),
        ([(media_types.DOCKER_DDUF, "tiny.dduf", b"w")], [f"{hexes(b'w')}.dduf"]),
        (
            [
                (media_types.DOCKER_SAFETENSORS, "x", b"w"),
                (media_types.DOCKER_CHAT_TEMPLATE, "c.json", b"{}"),
            ],
            ["x", "c.json"],  # chat_template.json is not Jinja, so it is not renamed
        ),
    ],
)
def test_docker_v01(stored: Stored, layers: list[Layer], expected: list[str]) -> None:
    arrangement = arranged(stored, V01, layers)
    assert paths(arrangement) == expected
    assert arrangement.notes == ()


@pytest.mark.parametrize("config_type", [V02, media_types.CNCF_CONFIG])
@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (
            [
                (media_types.DOCKER_GGUF, "tiny.gguf", b"w"),
                (media_types.DOCKER_LICENSE, "LICENSE", b"MIT"),
                (media_types.DOCKER_CHAT_TEMPLATE, "sub/chat_template.jinja", b"{{}}"),
                (media_types.DOCKER_MMPROJ, "mmproj-f16.gguf", b"p"),
                (media_types.DOCKER_DDUF, "x.dduf", b"d"),
                (media_types.DOCKER_MODEL_FILE, "config.json", b"{}"),
            ],
            [
                "tiny.gguf",
                "LICENSE",
                "sub/chat_template.jinja",
                "mmproj-f16.gguf",
                "x.dduf",
                "config.json",
            ],
        ),
        (
            [
                (RAW, "t-00002-of-00002.gguf", b"w2"),
                (RAW, "t-00001-of-00002.gguf", b"w1"),
                (CONFIG_RAW, "a/b/tokenizer.json", b"{}"),
                (DOC_RAW, "README.md", b"#"),
                (f"{CNCF}code.v1.raw", "x.py", b""),
                (f"{CNCF}dataset.v1.raw", "x.csv", b","),
                ("application/x-unheard-of", "y", b"y"),
            ],
            [
                "t-00002-of-00002.gguf",
                "t-00001-of-00002.gguf",
                "a/b/tokenizer.json",
                "README.md",
                "x.py",
                "x.csv",
                "y",
            ],
        ),
        (  # without paths, files get the names that runtimes look for
            [
                (media_types.CNCF_WEIGHT_GGUF, None, b"w"),
                (media_types.CNCF_WEIGHT_SAFETENSORS, None, b"s"),
                (media_types.DOCKER_DDUF, None, b"d"),
                (media_types.DOCKER_MMPROJ, None, b"p"),
                (media_types.DOCKER_CHAT_TEMPLATE, None, b"{{}}"),
            ],
            [
                "model.gguf",
                "model.safetensors",
                f"{hexes(b'd')}.dduf",
                "model.mmproj",
                "template.jinja",
            ],
        ),
        (  # two templates and two projectors keep their paths
            [
                (media_types.DOCKER_CHAT_TEMPLATE, "a.jinja", b"1"),
                (media_types.DOCKER_CHAT_TEMPLATE, "b.jinja", b"2"),
                (media_types.DOCKER_MMPROJ, "a.mmproj", b"3"),
                (media_types.DOCKER_MMPROJ, "b.mmproj", b"4"),
            ],
            ["a.jinja", "b.jinja", "a.mmproj", "b.mmproj"],
        ),
    ],
)
def test_by_path(
    stored: Stored, config_type: str, layers: list[Layer], expected: list[str]
) -> None:
    arrangement = arranged(stored, config_type, layers)
    assert paths(arrangement) == expected
    assert arrangement.notes == ()


def test_older_key_of_the_path(stored: Stored) -> None:
    model = stored.model([(RAW, None, b"w")], media_types.CNCF_CONFIG)
    model.manifest.layers[0].annotations["org.cnai.model.filepath"] = "old.gguf"  # type: ignore[index]
    assert paths(arrange(model)) == ["old.gguf"]


def test_a_cncf_manifest_with_dockers_config_keeps_its_paths(stored: Stored) -> None:
    """Docker Model Runner also uses the manifest's artifact type."""
    layers = [(media_types.DOCKER_GGUF, "tiny.gguf", b"w")]
    model = stored.model(layers, V01, artifact_type=media_types.CNCF_MANIFEST)
    assert paths(arrange(model)) == ["tiny.gguf"]


@pytest.mark.parametrize("format", ["gguf", "GGUF"])
def test_coarse_weight_without_a_path_is_named_by_the_config(stored: Stored, format: str) -> None:
    assert paths(arranged(stored, media_types.CNCF_CONFIG, [(RAW, None, b"w")], format=format)) == [
        "model.gguf"
    ]


@pytest.mark.parametrize(
    ("config_type", "layers", "expected", "notes"),
    [
        (
            V01,
            [
                (media_types.DOCKER_CHAT_TEMPLATE, "a.jinja", b"1"),
                (media_types.DOCKER_CHAT_TEMPLATE, "b.jinja", b"2"),
            ],
            ["template.jinja"],
            ["b.jinja is left out: a runtime uses one chat template"],
        ),
        (
            V01,
            [(media_types.DOCKER_MMPROJ, "a.gguf", b"1"), (media_types.DOCKER_MMPROJ, None, b"2")],
            ["model.mmproj"],
            [
                f"layer {hexes(b'2')[:12]} ({media_types.DOCKER_MMPROJ}) is left out: "
                "a runtime uses one projector"
            ],
        ),
        (
            V02,
            [(media_types.DOCKER_MODEL_FILE, None, b"1"), (media_types.DOCKER_LICENSE, None, b"2")],
            [],
            [
                f"layer {hexes(b'1')[:12]} ({media_types.DOCKER_MODEL_FILE}) is left out: "
                "it has no file name",
                f"layer {hexes(b'2')[:12]} ({media_types.DOCKER_LICENSE}) is left out: "
                "it has no file name",
            ],
        ),
        (
            media_types.CNCF_CONFIG,
            [(RAW, None, b"w")],
            [],
            [f"layer {hexes(b'w')[:12]} ({RAW}) is left out: it has no file name"],
        ),
        (  # two licenses with one name; files of other kinds are placed first
            V01,
            [
                (media_types.DOCKER_LICENSE, "LICENSE", b"1"),
                (media_types.DOCKER_LICENSE, "LICENSE", b"2"),
                (media_types.DOCKER_LICENSE, "sub/license.txt", b"3"),
                (media_types.DOCKER_LICENSE, "sub/LICENSE.txt", b"4"),
                (media_types.DOCKER_LICENSE, "sub/LICENSE.txt", b"5"),
                (f"{CNCF}code.v1.raw", "LICENSE", b"6"),
            ],
            [
                "LICENSE-2",
                "LICENSE-3",
                "sub/license.txt",
                "sub/LICENSE-2.txt",
                "sub/LICENSE-3.txt",
                "LICENSE",
            ],
            [
                "LICENSE is placed at LICENSE-2: another file is at LICENSE",
                "LICENSE is placed at LICENSE-3: another file is at LICENSE",
                "sub/LICENSE.txt is placed at sub/LICENSE-2.txt: "
                "another file is at sub/license.txt",
                "sub/LICENSE.txt is placed at sub/LICENSE-3.txt: "
                "another file is at sub/license.txt",
            ],
        ),
    ],
)
def test_notes(
    stored: Stored,
    config_type: str,
    layers: list[Layer],
    expected: list[str],
    notes: list[str],
) -> None:
    arrangement = arranged(stored, config_type, layers)
    assert paths(arrangement) == expected
    assert list(arrangement.notes) == notes


@pytest.mark.parametrize("config_type", [V01, V02, media_types.CNCF_CONFIG])
def test_the_same_file_twice_is_one(stored: Stored, config_type: str) -> None:
    layers = [
        (media_types.DOCKER_MODEL_FILE, "a.json", b"{}"),
        (media_types.DOCKER_MODEL_FILE, "a.json", b"{}"),
        (media_types.DOCKER_LICENSE, "LICENSE", b"MIT"),
        (media_types.DOCKER_LICENSE, "LICENSE", b"MIT"),
    ]
    arrangement = arranged(stored, config_type, layers)
    assert paths(arrangement) == ["a.json", "LICENSE"]
    assert arrangement.notes == ()


def test_the_same_content_on_two_paths_is_two_files(stored: Stored) -> None:
    layers = [
        (media_types.DOCKER_SAFETENSORS, name, b"w") for name in ("a.safetensors", "b.safetensors")
    ]
    assert paths(arranged(stored, V01, layers)) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    ("config_type", "layers"),
    [
        (
            V02,
            [
                (media_types.DOCKER_MODEL_FILE, "a", b"1"),
                (media_types.DOCKER_MODEL_FILE, "a", b"2"),
            ],
        ),
        (
            V02,
            [
                (media_types.DOCKER_MODEL_FILE, "a", b"1"),
                (media_types.DOCKER_MODEL_FILE, "A", b"2"),
            ],
        ),
        (
            V02,
            [
                (media_types.DOCKER_MODEL_FILE, "a", b"1"),
                (media_types.DOCKER_MODEL_FILE, "A", b"1"),
            ],
        ),
        (V02, [(media_types.DOCKER_MODEL_FILE, "e\u0301", b"1"), (RAW, "\u00e9", b"2")]),
        (media_types.CNCF_CONFIG, [(RAW, "x.gguf", b"1"), (RAW, "x.gguf", b"2")]),
        (
            V01,
            [
                (media_types.DOCKER_GGUF, "x.gguf", b"1"),
                (media_types.DOCKER_MODEL_FILE, "model.gguf", b"2"),
            ],
        ),
    ],
)
def test_two_files_on_one_path_are_refused(
    stored: Stored, config_type: str, layers: list[Layer]
) -> None:
    with pytest.raises(UnsafePathError, match="two files") as caught:
        arranged(stored, config_type, layers)
    assert hexes(layers[0][2]) in str(caught.value)
    assert hexes(layers[1][2]) in str(caught.value)


@pytest.mark.parametrize("config_type", [V01, V02, media_types.CNCF_CONFIG])
@pytest.mark.parametrize(
    "media_type",
    [
        media_types.DOCKER_GGUF,
        media_types.DOCKER_LICENSE,
        media_types.DOCKER_MODEL_FILE,
        media_types.DOCKER_DIR_TAR,
        RAW,
    ],
)
@pytest.mark.parametrize("path", ["../../x", "/abs", "a\0b", "C:\\x", "", ".."])
def test_unsafe_path_is_refused_even_if_it_would_not_be_used(
    stored: Stored, config_type: str, media_type: str, path: str
) -> None:
    with pytest.raises(UnsafePathError):
        arranged(stored, config_type, [(media_type, path, b"x")])


def test_archives_are_kept_apart(stored: Stored) -> None:
    layers = [
        (media_types.DOCKER_SAFETENSORS, "x.safetensors", b"w"),
        (media_types.DOCKER_VLLM_CONFIG_TAR, None, b"1"),
        (media_types.DOCKER_DIR_TAR, None, b"2"),
        (f"{CNCF}weight.config.v1.tar+gzip", "sub", b"3"),
    ]
    arrangement = arranged(stored, V01, layers)
    assert paths(arrangement) == ["x.safetensors"]
    assert [file.media_type for file in arrangement.archives] == [layer[0] for layer in layers[1:]]
