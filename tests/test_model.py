"""Model: roles and formats across the generations of the format, and selection."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from modelpack.artifacts import media_types as mediatypes
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.model import SHORT_NAMES, Archive, Model, Role, archive_of, role_of
from modelpack.artifacts.reference import Reference
from modelpack.errors import NotFoundError, UnsafePathError

CNCF = "application/vnd.cncf.model."
Layer = tuple[str, str | None]  # media type, file path

V01: tuple[Layer, ...] = (
    (mediatypes.DOCKER_GGUF, "tiny.gguf"),
    (mediatypes.DOCKER_LICENSE, "LICENSE.txt"),
    (mediatypes.DOCKER_CHAT_TEMPLATE, "chat_template.jinja"),
    (mediatypes.DOCKER_MMPROJ, "mmproj-tiny.gguf"),
    (mediatypes.DOCKER_MODEL_FILE, "config.json"),
    (mediatypes.DOCKER_DIR_TAR, None),
)
CNCF_RAW: tuple[Layer, ...] = (
    (f"{CNCF}weight.v1.raw", "tiny.gguf"),
    (f"{CNCF}doc.v1.raw", "LICENSE.txt"),
    (f"{CNCF}weight.config.v1.raw", "chat_template.jinja"),
    (f"{CNCF}weight.v1.raw", "mmproj-tiny.gguf"),
    (f"{CNCF}weight.config.v1.raw", "config.json"),
    (f"{CNCF}dataset.v1.tar", None),
)


def model_of(
    layers: Sequence[Layer],
    config_type: str = mediatypes.DOCKER_CONFIG_V01,
    *,
    format: str = "gguf",
    diff_ids: int | None = None,
) -> Model:
    descriptors = [
        Descriptor(
            media_type,
            Digest.of(bytes([i])),
            1,
            {} if path is None else {mediatypes.FILEPATH: path},
        )
        for i, (media_type, path) in enumerate(layers)
    ]
    digests = tuple(layer.digest for layer in descriptors)[:diff_ids]
    config = ModelConfig(config_type, format=format, diff_ids=digests)
    raw = config.encode()
    manifest = Manifest.build(Descriptor(config_type, Digest.of(raw), len(raw)), descriptors)
    return Model(Reference.parse("ai/tiny:v1"), manifest.descriptor, manifest, config)


def test_identity() -> None:
    model = model_of(V01)
    assert model.digest == model.manifest.digest
    assert model.short_id == model.digest.encoded[:12]


@pytest.mark.parametrize("layers", [V01, CNCF_RAW], ids=["docker", "cncf"])
def test_the_same_files_have_the_same_roles_in_every_generation(layers: Sequence[Layer]) -> None:
    files = model_of(layers).files()
    assert [file.role for file in files[:5]] == [
        Role.WEIGHT,
        Role.LICENSE,
        Role.CHAT_TEMPLATE,
        Role.PROJECTOR,
        Role.CONFIG,
    ]
    assert [file.format for file in files[:5]] == ["gguf", "", "", "gguf", ""]
    assert [file.filepath for file in files] == [path for _, path in layers]
    assert [file.archive for file in files] == [None] * 5 + [Archive.TAR]
    assert [file.descriptor for file in files] == list(model_of(layers).manifest.layers)
    assert [file.diff_id for file in files] == [file.descriptor.digest for file in files]


@pytest.mark.parametrize(
    ("media_type", "path", "role"),
    [
        (mediatypes.DOCKER_GGUF, None, Role.WEIGHT),
        (mediatypes.DOCKER_GGUF, "sub/mmproj-BF16.gguf", Role.PROJECTOR),
        (mediatypes.DOCKER_GGUF, "mmproj/tiny.gguf", Role.WEIGHT),
        (mediatypes.CNCF_WEIGHT_GGUF, "x.gguf", Role.WEIGHT),
        (mediatypes.DOCKER_SAFETENSORS, "mmproj.safetensors", Role.WEIGHT),
        (mediatypes.DOCKER_DDUF, None, Role.WEIGHT),
        (mediatypes.DOCKER_MMPROJ, None, Role.PROJECTOR),
        (mediatypes.DOCKER_LICENSE, "notice_me.py", Role.LICENSE),
        (mediatypes.DOCKER_CHAT_TEMPLATE, None, Role.CHAT_TEMPLATE),
        (mediatypes.DOCKER_CHAT_TEMPLATE, "chat_template.json", Role.CONFIG),
        (mediatypes.DOCKER_VLLM_CONFIG_TAR, None, Role.CONFIG),
        (mediatypes.DOCKER_VLLM_CONFIG_TAR, "chat.jinja", Role.CHAT_TEMPLATE),
        (mediatypes.DOCKER_DIR_TAR, None, Role.FILE),
        (mediatypes.DOCKER_DIR_TAR, "a/b.gguf", Role.WEIGHT),
        (mediatypes.DOCKER_MODEL_FILE, None, Role.FILE),
        (mediatypes.DOCKER_MODEL_FILE, "README.md", Role.DOC),
        (mediatypes.DOCKER_MODEL_FILE, "tool_use.jinja", Role.CHAT_TEMPLATE),
        (mediatypes.DOCKER_MODEL_FILE, "adapter.gguf", Role.FILE),
        (mediatypes.DOCKER_MODEL_FILE, "mmproj.gguf", Role.FILE),
        (mediatypes.DOCKER_MODEL_FILE, "tokenizer.model", Role.CONFIG),
        (mediatypes.DOCKER_MODEL_FILE, "modeling.py", Role.CODE),
        (mediatypes.DOCKER_MODEL_FILE, "training_args.bin", Role.FILE),
        (mediatypes.DOCKER_MODEL_FILE, "LICENSE-MIT", Role.LICENSE),
        (mediatypes.DOCKER_MODEL_FILE, "third_party_licenses.txt", Role.LICENSE),
        (mediatypes.DOCKER_MODEL_FILE, "license_head.bin", Role.FILE),
        (mediatypes.DOCKER_MODEL_FILE, "notice_me.py", Role.CODE),
        (mediatypes.DOCKER_MODEL_FILE, "license.json", Role.CONFIG),
        (mediatypes.DOCKER_MODEL_FILE, "licensed-data.txt", Role.CONFIG),
        (mediatypes.DOCKER_MODEL_FILE, "LICENSE/config.json", Role.CONFIG),
        (f"{CNCF}weight.v1.raw", None, Role.WEIGHT),
        (f"{CNCF}weight.v1.raw", "model.bin", Role.WEIGHT),
        (f"{CNCF}weight.v1.raw", "license_head.bin", Role.WEIGHT),
        (f"{CNCF}weight.v1.raw", "MMPROJ-f16.gguf", Role.PROJECTOR),
        (f"{CNCF}weight.v1.raw", "model.safetensors.index.json", Role.CONFIG),
        (f"{CNCF}weight.v1.tar+zstd", "weights", Role.WEIGHT),
        (f"{CNCF}weight.config.v1.raw", "merges", Role.CONFIG),
        (f"{CNCF}weight.config.v1.raw", "README.md", Role.DOC),
        (f"{CNCF}weight.config.v1.raw", "adapter.safetensors", Role.CONFIG),
        (f"{CNCF}doc.v1.raw", None, Role.LICENSE),
        (f"{CNCF}doc.v1.raw", "docs/COPYING", Role.LICENSE),
        (f"{CNCF}doc.v1.raw", "README.md", Role.DOC),
        (f"{CNCF}doc.v1.tar+gzip", "docs", Role.DOC),
        (f"{CNCF}code.v1.raw", "config.json", Role.CODE),
        (f"{CNCF}dataset.v1.raw", "x.gguf", Role.DATASET),
        ("application/x-unheard-of", "blob.xyz", Role.FILE),
        ("application/x-unheard-of", "blob.safetensors", Role.WEIGHT),
    ],
)
def test_role(media_type: str, path: str | None, role: Role) -> None:
    assert role_of(media_type, path) is role


@pytest.mark.parametrize(
    ("media_type", "archive"),
    [
        (mediatypes.DOCKER_VLLM_CONFIG_TAR, Archive.TAR),
        (mediatypes.DOCKER_DIR_TAR, Archive.TAR),
        (f"{CNCF}weight.v1.tar", Archive.TAR),
        (f"{CNCF}weight.config.v1.tar+gzip", Archive.TAR_GZIP),
        (f"{CNCF}dataset.v1.tar+zstd", Archive.TAR_ZSTD),
        (f"{CNCF}weight.v1.raw", None),
        (f"{CNCF}weight.v1.tar+bz2", None),
        (f"{CNCF}weights.v1.tar", None),
        (mediatypes.DOCKER_GGUF, None),
    ],
)
def test_archive(media_type: str, archive: Archive | None) -> None:
    assert archive_of(media_type) is archive


@pytest.mark.parametrize(
    ("config_format", "path", "expected"),
    [
        ("gguf", None, "gguf"),
        ("GGUF", None, "gguf"),
        ("diffusers", None, "dduf"),
        ("gguf", "x.safetensors", "safetensors"),
        ("", "x.bin", ""),
        ("safetensors", "weights", "safetensors"),
    ],
)
def test_format_of_a_coarse_type(config_format: str, path: str | None, expected: str) -> None:
    model = model_of([(f"{CNCF}weight.v1.raw", path)], mediatypes.CNCF_CONFIG, format=config_format)
    assert model.files()[0].format == expected


def test_diff_ids_that_do_not_pair_with_the_layers_are_ignored() -> None:
    assert [file.diff_id for file in model_of(V01, diff_ids=2).files()] == [None] * len(V01)


@pytest.mark.parametrize("path", ["../../x", "/abs", "a\0b", "C:\\x", "C:/x", "", ".", "a/", "./a"])
def test_unsafe_path_is_refused(path: str) -> None:
    with pytest.raises(UnsafePathError):
        model_of([(mediatypes.DOCKER_MODEL_FILE, path)]).files()


@pytest.mark.parametrize(
    ("path", "expected"), [(".", None), ("./", None), ("sub/", "sub"), ("sub/a.tar", "sub/a.tar")]
)
def test_path_of_an_archive_may_be_a_directory(path: str, expected: str | None) -> None:
    assert model_of([(f"{CNCF}code.v1.tar", path)]).files()[0].filepath == expected


@pytest.mark.parametrize("path", ["..", "/", "", "a/../b", "../a/"])
def test_path_of_an_archive_may_not_leave(path: str) -> None:
    with pytest.raises(UnsafePathError):
        model_of([(f"{CNCF}code.v1.tar", path)]).files()


SELECTIONS = [
    ("gguf", ["tiny.gguf"]),
    ("GGUF", ["tiny.gguf"]),
    ("weight", ["tiny.gguf"]),
    ("weights", ["tiny.gguf"]),
    ("mmproj", ["mmproj-tiny.gguf"]),
    ("projector", ["mmproj-tiny.gguf"]),
    ("license", ["LICENSE.txt"]),
    ("chat-template", ["chat_template.jinja"]),
    ("chat_template", ["chat_template.jinja"]),
    ("config", ["config.json"]),
]


@pytest.mark.parametrize("layers", [V01, CNCF_RAW], ids=["docker", "cncf"])
@pytest.mark.parametrize(("text", "expected"), SELECTIONS, ids=[text for text, _ in SELECTIONS])
def test_short_names_mean_the_same_everywhere(
    layers: Sequence[Layer], text: str, expected: list[str]
) -> None:
    assert [file.filepath for file in model_of(layers).select([text])] == expected


def test_every_short_name_is_a_name_of_something() -> None:
    layers = [
        *V01,
        (mediatypes.DOCKER_SAFETENSORS, "x.safetensors"),
        (mediatypes.DOCKER_DDUF, "x.dduf"),
        (mediatypes.ADAPTER_SAFETENSORS, "adapter_model.safetensors"),
        (f"{CNCF}doc.v1.raw", "README.md"),
        (f"{CNCF}code.v1.raw", "x.py"),
        (f"{CNCF}dataset.v1.raw", "x.csv"),
    ]
    model = model_of(layers)
    for name in SHORT_NAMES:
        assert model.select([name]), name
    assert len(model.select(["file"])) == 5  # config.json, the tar, README.md, x.py, x.csv


@pytest.mark.parametrize(
    ("media_types", "paths", "expected"),
    [
        ((), (), ["a.gguf", "sub/a.gguf", "sub/c.json", "c.json", "sub/[x].txt"]),
        ((mediatypes.DOCKER_GGUF,), (), ["a.gguf", "sub/a.gguf"]),
        ((mediatypes.DOCKER_GGUF.upper(),), (), ["a.gguf", "sub/a.gguf"]),
        (("*gguf*",), (), ["a.gguf", "sub/a.gguf"]),
        (("*.file", "nothing-like-it"), (), ["sub/c.json", "c.json", "sub/[x].txt"]),
        (("gguf", "config"), (), ["a.gguf", "sub/a.gguf", "sub/c.json", "c.json", "sub/[x].txt"]),
        ((), ("sub/a.gguf",), ["sub/a.gguf"]),
        ((), ("a.gguf",), ["a.gguf"]),  # the whole path wins over the file name
        ((), ("[x].txt",), ["sub/[x].txt"]),  # and the file name over the glob
        ((), ("sub/[x].txt",), ["sub/[x].txt"]),
        ((), ("*.json", "a.gguf"), ["a.gguf", "sub/c.json", "c.json"]),
        ((), ("sub/*",), ["sub/a.gguf", "sub/c.json", "sub/[x].txt"]),
        (("gguf",), ("sub/*",), ["sub/a.gguf"]),
    ],
)
def test_select(media_types: Sequence[str], paths: Sequence[str], expected: list[str]) -> None:
    model = model_of(
        [
            (mediatypes.DOCKER_GGUF, "a.gguf"),
            (mediatypes.DOCKER_GGUF, "sub/a.gguf"),
            (mediatypes.DOCKER_MODEL_FILE, "sub/c.json"),
            (mediatypes.DOCKER_MODEL_FILE, "c.json"),
            (mediatypes.DOCKER_MODEL_FILE, "sub/[x].txt"),
        ]
    )
    assert [file.filepath for file in model.select(media_types, paths)] == expected


@pytest.mark.parametrize(
    ("media_types", "paths", "wanted"),
    [
        (["safetensors"], [], "'safetensors'"),
        (["dduf", "*onnx*"], [], "'dduf' or '*onnx*'"),
        ([], ["nothing.gguf"], "'nothing.gguf'"),
        ([], ["tiny.gguf", "nothing.gguf"], "'nothing.gguf'"),  # every path must match
        (["license"], ["tiny.gguf"], "'tiny.gguf'"),
    ],
)
def test_no_match_lists_what_there_is(
    media_types: list[str], paths: list[str], wanted: str
) -> None:
    with pytest.raises(NotFoundError) as caught:
        model_of(V01).select(media_types, paths)
    assert wanted in str(caught.value)
    assert "docker.io/ai/tiny:v1" in str(caught.value)
    assert "LICENSE.txt (application/vnd.docker.ai.license)" in str(caught.value)
    by_type = "no file with type" in str(caught.value)
    assert ("chat-template" if by_type else "a file name or a glob") in (caught.value.hint or "")


def test_list_of_what_there_is_stays_short() -> None:
    model = model_of([(mediatypes.DOCKER_MODEL_FILE, f"{i}.txt") for i in range(60)])
    with pytest.raises(NotFoundError) as caught:
        model.select(["gguf"])
    assert str(caught.value).endswith("; and 10 more")
