"""Bundles of whole models of every generation: their files and roles."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.model import Role
from modelpack.bundles.bundle import runtime_config
from modelpack.bundles.links import LinkMode, Placement
from modelpack.errors import UnsupportedError
from modelpack.progress import Action, Progress, Stop
from modelpack.storage import Watch
from tests.unpacking.laid_out import DIRECTORY, WEIGHT, bundle_of
from tests.unpacking.stored import Layer, Stored, contents, everything

V01, V02, CNCF = (
    media_types.DOCKER_CONFIG_V01,
    media_types.DOCKER_CONFIG_V02,
    media_types.CNCF_CONFIG,
)


def test_docker_v01(stored: Stored, directory: Path) -> None:
    layers = [
        WEIGHT,
        (media_types.DOCKER_LICENSE, "LICENSE.txt", b"MIT"),
        (media_types.DOCKER_CHAT_TEMPLATE, "chat_template.jinja", b"{{ messages }}"),
        (media_types.DOCKER_MMPROJ, "mmproj-f16.gguf", b"projector"),
        (media_types.DOCKER_MODEL_FILE, "sub/params.json", b"{}"),
    ]
    bundle = bundle_of(stored, directory, layers, ModelConfig(V01, format="gguf"))
    assert contents(directory) == {
        "config.json": b'{"format":"gguf"}\n',
        "model/model.gguf": b"weights",
        "model/LICENSE.txt": b"MIT",
        "model/template.jinja": b"{{ messages }}",
        "model/model.mmproj": b"projector",
        "model/sub/params.json": b"{}",
    }
    assert bundle.directory == directory
    assert bundle.weight == directory / "model/model.gguf"
    assert bundle.chat_template == directory / "model/template.jinja"
    assert bundle.mmproj == directory / "model/model.mmproj"
    assert bundle.config == directory / "config.json"
    assert bundle.notes == ()
    assert [(file.path, file.role, file.digest, file.linked) for file in bundle.files] == [
        ("model/model.gguf", Role.WEIGHT, Digest.of(b"weights"), Placement.HARDLINK),
        ("model/LICENSE.txt", Role.LICENSE, Digest.of(b"MIT"), Placement.HARDLINK),
        (
            "model/template.jinja",
            Role.CHAT_TEMPLATE,
            Digest.of(b"{{ messages }}"),
            Placement.HARDLINK,
        ),
        ("model/model.mmproj", Role.PROJECTOR, Digest.of(b"projector"), Placement.HARDLINK),
        ("model/sub/params.json", Role.CONFIG, Digest.of(b"{}"), Placement.HARDLINK),
    ]
    assert (directory / "model/model.gguf").samefile(stored.root / Digest.of(b"weights").encoded)


AS_CNCF = [
    (type_, path, content)
    for type_, (_, path, content) in zip(
        (
            media_types.CNCF_DOC_RAW,
            media_types.CNCF_WEIGHT_CONFIG_RAW,
            media_types.CNCF_WEIGHT_CONFIG_RAW,
            media_types.CNCF_WEIGHT_RAW,
            media_types.CNCF_WEIGHT_CONFIG_RAW,
        ),
        DIRECTORY,
        strict=True,
    )
]


@pytest.mark.parametrize(
    ("layers", "config"),
    [
        (DIRECTORY, ModelConfig(V02, format="safetensors")),
        (AS_CNCF, ModelConfig(CNCF, format="safetensors", diff_ids=(Digest.of(b""),))),
        (AS_CNCF, ModelConfig(CNCF, diff_ids=(Digest.of(b""),))),
    ],
    ids=["v0.2", "cncf", "cncf without a format"],
)
def test_by_path(stored: Stored, directory: Path, layers: list[Layer], config: ModelConfig) -> None:
    bundle = bundle_of(stored, directory, layers, config)
    assert contents(directory / "model") == {path: content for _, path, content in DIRECTORY}
    assert (directory / "config.json").read_bytes() == runtime_config(config)
    assert bundle.weight == directory / "model/model.safetensors"
    assert bundle.chat_template == directory / "model/chat_template.jinja"
    assert bundle.mmproj is None
    assert [file.role for file in bundle.files] == [
        Role.LICENSE,
        Role.CHAT_TEMPLATE,
        Role.CONFIG,
        Role.WEIGHT,
        Role.DOC,
    ]


DIFF = Digest.of(b"x")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ModelConfig(V01), b"{}\n"),
        (
            ModelConfig(
                V01,
                format="gguf",
                quantization="MOSTLY_F32",
                parameters="8",
                architecture="llama",
                size="32B",
                gguf={"general.name": "tiny <&> v1", "general.architecture": "llama"},
                context_size=0,
                created="2025-01-02T03:04:05Z",
                diff_ids=(DIFF,),
            ),
            b'{"format":"gguf","quantization":"MOSTLY_F32","parameters":"8",'
            b'"architecture":"llama","size":"32B","gguf":{"general.architecture":"llama",'
            b'"general.name":"tiny \\u003c\\u0026\\u003e v1"},"context_size":0}\n',
        ),
        (
            ModelConfig(V02, format="dduf", diffusers={"dduf_file": "x", "layout": "dduf"}),
            b'{"format":"dduf","diffusers":{"dduf_file":"x","layout":"dduf"}}\n',
        ),
        (
            ModelConfig(
                CNCF,
                format="gguf",
                architecture="llama",
                created="2025-01-02T03:04:05Z",
                diff_ids=(DIFF,),
                cncf_descriptor={"family": "llama", "licenses": ["MIT"]},
                cncf_config={"precision": "f32"},
            ),
            b'{"descriptor":{"createdAt":"2025-01-02T03:04:05Z","family":"llama",'
            b'"licenses":["MIT"]},"modelfs":{"type":"layers","diffIds":["%s"]},'
            b'"config":{"architecture":"llama","format":"gguf","precision":"f32"}}\n'
            % str(DIFF).encode(),
        ),
        (  # fields missing in the model are not invented
            ModelConfig(CNCF, architecture="llama", diff_ids=(DIFF,)),
            b'{"descriptor":{},"modelfs":{"type":"layers","diffIds":["%s"]},'
            b'"config":{"architecture":"llama"}}\n' % str(DIFF).encode(),
        ),
    ],
)
def test_runtime_config(config: ModelConfig, expected: bytes) -> None:
    assert runtime_config(config) == expected


@pytest.mark.parametrize(
    ("config", "layers", "expected"),
    [
        (
            ModelConfig(V01, format="gguf"),
            [(media_types.DOCKER_GGUF, f"t-0000{n}-of-00003.gguf", b"w%d" % n) for n in (3, 1, 2)],
            "model-00001-of-00003.gguf",
        ),
        (
            V02,
            [(media_types.DOCKER_GGUF, f"t-0000{n}-of-00003.gguf", b"w%d" % n) for n in (3, 2, 1)],
            "t-00001-of-00003.gguf",
        ),
        (  # the top level is searched first
            V02,
            [
                (media_types.DOCKER_SAFETENSORS, f"{n}.safetensors", b"%d" % i)
                for i, n in enumerate("ab")
            ]
            + [(media_types.DOCKER_SAFETENSORS, "A/a.safetensors", b"9")],
            "a.safetensors",
        ),
        (  # then each directory, in the order of a walk
            V02,
            [
                (media_types.DOCKER_SAFETENSORS, name, name.encode())
                for name in ("vae/m.safetensors", "unet/m.safetensors", "unet-b/m.safetensors")
            ],
            "unet/m.safetensors",
        ),
        (  # no runtime uses a hidden file, and a projector is not a weight
            V02,
            [
                (media_types.DOCKER_GGUF, ".a.gguf", b"1"),
                (media_types.DOCKER_GGUF, "a-mmproj.gguf", b"2"),
                (media_types.DOCKER_GGUF, "b.gguf", b"3"),
            ],
            "b.gguf",
        ),
        (  # the format in the config, otherwise GGUF first
            ModelConfig(V02, format="safetensors"),
            [WEIGHT, (media_types.DOCKER_SAFETENSORS, "x.safetensors", b"s")],
            "x.safetensors",
        ),
        (V02, [(media_types.DOCKER_SAFETENSORS, "x.safetensors", b"s"), WEIGHT], "tiny.gguf"),
        (
            ModelConfig(V02, format="gguf"),
            [
                (media_types.DOCKER_SAFETENSORS, "x.safetensors", b"s"),
                (media_types.DOCKER_DDUF, "x.dduf", b"d"),
            ],
            "x.safetensors",
        ),
        (
            ModelConfig(V01, format="diffusers"),
            [
                (media_types.DOCKER_SAFETENSORS, "x.safetensors", b"s"),
                (media_types.DOCKER_DDUF, None, b"d"),
            ],
            f"{Digest.of(b'd').encoded}.dduf",
        ),
        (CNCF, [(media_types.CNCF_WEIGHT_RAW, "pytorch_model.bin", b"w")], "pytorch_model.bin"),
    ],
)
def test_weight(
    stored: Stored,
    directory: Path,
    config: ModelConfig | str,
    layers: list[Layer],
    expected: str,
) -> None:
    if config == CNCF:
        config = ModelConfig(CNCF, diff_ids=(DIFF,))
    bundle = bundle_of(stored, directory, layers, config)
    assert bundle.weight == directory / "model" / expected
    assert bundle.weight.is_file()


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [(media_types.DOCKER_LICENSE, "LICENSE", b"MIT")],
        [(media_types.DOCKER_MMPROJ, "p.gguf", b"p")],
    ],
)
def test_nothing_to_run(stored: Stored, directory: Path, layers: list[Layer]) -> None:
    with pytest.raises(UnsupportedError, match="no weights"):
        bundle_of(stored, directory, layers)
    assert not directory.exists()


def test_several_templates_and_projectors(stored: Stored, directory: Path) -> None:
    layers = [
        WEIGHT,
        (media_types.DOCKER_CHAT_TEMPLATE, "additional_chat_templates/tool_use.jinja", b"1"),
        (media_types.DOCKER_CHAT_TEMPLATE, "another.jinja", b"3"),
        (media_types.DOCKER_CHAT_TEMPLATE, "chat_template.jinja", b"2"),
        (media_types.DOCKER_MMPROJ, "b.mmproj", b"4"),
        (media_types.DOCKER_MMPROJ, "a.mmproj", b"5"),
    ]
    reports: list[Progress] = []
    bundle = bundle_of(stored, directory, layers, watch=Watch(reports.append, Stop()))
    assert bundle.chat_template == directory / "model/chat_template.jinja"
    assert bundle.mmproj == directory / "model/b.mmproj"
    assert bundle.notes == (
        "model/chat_template.jinja is used as the chat template; the model has 3",
        "model/b.mmproj is used as the projector; the model has 2",
    )
    noted = [report.message for report in reports if report.action is Action.NOTE]
    assert tuple(noted) == bundle.notes


@pytest.mark.parametrize("mode", [LinkMode.HARDLINK, LinkMode.SYMLINK, LinkMode.COPY])
def test_link_modes(stored: Stored, directory: Path, mode: LinkMode) -> None:
    before = everything(stored.root)
    bundle = bundle_of(stored, directory, DIRECTORY, links=mode)
    assert {file.linked for file in bundle.files} == {Placement(mode.value)}
    assert contents(directory / "model") == {path: content for _, path, content in DIRECTORY}
    assert everything(stored.root).items() >= before.items()
    weight = directory / "model/model.safetensors"
    assert weight.is_symlink() == (mode is LinkMode.SYMLINK)
    assert weight.samefile(stored.root / Digest.of(b"weights").encoded) == (
        mode is not LinkMode.COPY
    )


def test_modes_do_not_depend_on_the_umask(stored: Stored, directory: Path) -> None:
    old = os.umask(0o077)
    try:
        bundle_of(stored, directory, DIRECTORY, links=LinkMode.COPY)
    finally:
        os.umask(old)
    assert directory.stat().st_mode & 0o7777 == 0o755
    kinds = {(kind, mode) for kind, mode, _ in everything(directory).values()}
    assert kinds == {("directory", 0o755), ("file", 0o644)}


def test_progress(stored: Stored, directory: Path) -> None:
    reports: list[Progress] = []
    bundle_of(stored, directory, DIRECTORY, watch=Watch(reports.append, Stop()))
    assert {report.action for report in reports} == {Action.UNPACK}
    assert [report.name for report in reports if report.finished] == [
        path for _, path, _ in DIRECTORY
    ]
