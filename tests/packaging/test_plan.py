"""Plans: their files and order, skipped entries, and duplicate files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.builder.build import build
from modelpack.builder.plan import plan
from modelpack.builder.request import PackageRequest
from modelpack.errors import WeightFormatError
from tests.packaging.trees import (
    DDUF,
    MIT,
    MODELS,
    PAIR,
    PROJECTOR,
    SHARDS,
    TEMPLATE,
    TINY,
    TINY_DIRECTORY,
    digests,
    layers,
    package,
    write,
)


def test_order_and_types_of_all_flags(tmp_path: Path) -> None:
    write(tmp_path, {**SHARDS, "t.txt": TEMPLATE, "p.bin": PROJECTOR, "b": b"b", "a/TERMS": b"a"})
    built = package(
        PackageRequest(
            gguf=tmp_path / "tiny-00003-of-00003.gguf",
            mmproj=tmp_path / "p.bin",
            chat_template=tmp_path / "t.txt",
            licenses=(tmp_path / "b", tmp_path / "a" / "TERMS"),
        )
    )
    assert layers(built) == [
        ("docker.ai.gguf.v3", "tiny-00001-of-00003.gguf"),
        ("docker.ai.gguf.v3", "tiny-00002-of-00003.gguf"),
        ("docker.ai.gguf.v3", "tiny-00003-of-00003.gguf"),
        ("docker.ai.license", "b"),
        ("docker.ai.license", "TERMS"),
        ("docker.ai.chat.template.jinja", "t.txt"),
        ("docker.ai.mmproj", "p.bin"),
    ]


@pytest.mark.parametrize(
    ("values", "name", "version", "format"),
    [
        ({"gguf": "x.gguf"}, "x.gguf", media_types.DOCKER_CONFIG_V01, "gguf"),
        ({"gguf": "X.GGUF"}, "X.GGUF", media_types.DOCKER_CONFIG_V01, "gguf"),
        ({"gguf": "x.safetensors"}, "x.safetensors", media_types.DOCKER_CONFIG_V01, "safetensors"),
        ({"dduf": "x.dduf"}, "x.dduf", media_types.DOCKER_CONFIG_V01, "dduf"),
        ({"gguf": "x.dduf"}, "x.dduf", media_types.DOCKER_CONFIG_V01, "dduf"),
        ({"safetensors_dir": "."}, "x.gguf", media_types.DOCKER_CONFIG_V02, "gguf"),
        ({"safetensors_dir": "."}, "x.safetensors", media_types.DOCKER_CONFIG_V02, "safetensors"),
        ({"safetensors_dir": "."}, "x.dduf", media_types.DOCKER_CONFIG_V02, "dduf"),
    ],
)
def test_config_versions(
    tmp_path: Path, values: dict[str, str], name: str, version: str, format: str
) -> None:
    content = {"gguf": TINY, "safetensors": PAIR, "dduf": DDUF}[format]
    write(tmp_path, {name: content})
    paths = {key: tmp_path / value for key, value in values.items()}
    built = package(PackageRequest(**paths))  # type: ignore[arg-type]
    assert built.manifest.config.media_type == version
    assert built.config.format == format
    assert built.manifest.artifact_type is None


def test_sharded_safetensors_by_any_shard() -> None:
    root = MODELS / "tiny-safetensors-sharded"
    built = package(PackageRequest(gguf=root / "model-00002-of-00002.safetensors"))
    assert [layer.filepath for layer in built.manifest.layers] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert built.manifest.config.media_type == media_types.DOCKER_CONFIG_V01


def test_statistics_cover_all_shards_and_the_text_config() -> None:
    root = MODELS / "tiny-safetensors-sharded"
    config = package(PackageRequest(safetensors_dir=root)).config
    assert (config.parameters, config.context_size, config.quantization) == ("12.00", 1024, "mixed")
    exact = package(PackageRequest(safetensors_dir=root, preserve=True)).config
    assert (exact.parameters, exact.context_size, exact.quantization) == ("8.00", None, "F32")


def test_the_configuration_of_the_whole_counts(tmp_path: Path) -> None:
    files = {
        "config.json": b'{"n_ctx":1}',
        "unet/config.json": b'{"n_ctx":2}',
        "unet/model.safetensors": PAIR,
    }
    built = package(PackageRequest(safetensors_dir=write(tmp_path, files)))
    assert built.config.context_size == 1


@pytest.mark.parametrize(
    ("size", "written"), [(None, 2048), (0, 0), (5, 5), (2**31 - 1, 2**31 - 1)]
)
def test_context_sizes(tmp_path: Path, size: int | None, written: int) -> None:
    write(tmp_path, {"m.gguf": TINY})
    built = package(PackageRequest(gguf=tmp_path / "m.gguf", context_size=size))
    assert built.config.context_size == written
    assert f'"context_size":{written}' in built.config_bytes.decode()


def test_skipped_files_are_in_the_plan(tmp_path: Path) -> None:
    write(tmp_path, {**TINY_DIRECTORY, ".git/HEAD": b"", "sub/__pycache__/x.pyc": b""})
    planned = plan(PackageRequest(safetensors_dir=tmp_path), environ={})
    assert [entry.path for entry in planned.skipped] == [
        ".git",
        ".gitattributes",
        "sub/__pycache__",
    ]
    assert not planned.notes
    assert sum(file.size for file in planned.files) == sum(
        len(content) for name, content in TINY_DIRECTORY.items() if not name.startswith(".")
    )


def test_a_plan_knows_what_to_compare_later(tmp_path: Path) -> None:
    path = write(tmp_path, {"m.gguf": TINY}) / "m.gguf"
    (tmp_path / "link.gguf").symlink_to("m.gguf")
    (file,) = plan(PackageRequest(gguf=tmp_path / "link.gguf"), environ={}).files
    status = path.stat()
    assert (file.device, file.inode, file.size, file.mtime_ns) == (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
    )
    assert (file.filepath, file.metadata.name) == ("link.gguf", "link.gguf")


def test_annotations_are_written_sorted(tmp_path: Path) -> None:
    write(tmp_path, {"m.gguf": TINY})
    annotations = {"org.example.b": "<&>", "a": "é", "\U0001f600": "", "\uffff": "x"}
    request = PackageRequest(gguf=tmp_path / "m.gguf", annotations=annotations)
    built = package(request)
    assert built.manifest.annotations == annotations
    assert built.manifest.raw.decode().endswith(
        '"annotations":{"a":"é","org.example.b":"\\u003c\\u0026\\u003e","\uffff":"x","\U0001f600":""}}'
    )


def test_one_digest_for_each_file(tmp_path: Path) -> None:
    write(tmp_path, {"m.gguf": TINY})
    request = PackageRequest(gguf=tmp_path / "m.gguf")
    planned = plan(request, environ={})
    for wrong in ([], [Digest.of(b"")] * 2):
        with pytest.raises(ValueError, match="zip"):
            build(planned, request, wrong)
    assert build(planned, request, digests(planned)).manifest.layers[0].size == len(TINY)


# The same file twice: in the directory and by a flag, or by two flags.


def test_the_same_file_twice_is_one_layer(tmp_path: Path) -> None:
    write(tmp_path, {**TINY_DIRECTORY, "copy/LICENSE": MIT})
    license_file = tmp_path / "LICENSE"
    os.link(license_file, tmp_path / "linked")
    expected = package(PackageRequest(safetensors_dir=tmp_path)).manifest.digest
    for same in (license_file, tmp_path / "sub" / ".." / "LICENSE", tmp_path / "copy" / "LICENSE"):
        request = PackageRequest(safetensors_dir=tmp_path, licenses=(same, same))
        planned = plan(request, environ={})
        assert len(planned.notes) == 2
        assert "already" in planned.notes[0]
        assert build(planned, request, digests(planned)).manifest.digest == expected


def test_preserve_keeps_what_comes_twice(tmp_path: Path) -> None:
    write(tmp_path, TINY_DIRECTORY)
    request = PackageRequest(
        safetensors_dir=tmp_path, licenses=(tmp_path / "LICENSE",) * 2, preserve=True
    )
    paths = [path for _, path in layers(package(request))]
    assert paths.count("LICENSE") == 3


def test_a_flag_says_more_than_a_name(tmp_path: Path) -> None:
    write(tmp_path, {"m.gguf": TINY, "mmproj.gguf": PROJECTOR, "TERMS.txt": MIT, "t.txt": TEMPLATE})
    request = PackageRequest(
        safetensors_dir=tmp_path,
        licenses=(tmp_path / "TERMS.txt",),
        chat_template=tmp_path / "t.txt",
        mmproj=tmp_path / "mmproj.gguf",
    )
    assert layers(package(request)) == [
        ("docker.ai.license", "TERMS.txt"),
        ("docker.ai.gguf.v3", "m.gguf"),
        ("docker.ai.mmproj", "mmproj.gguf"),
        ("docker.ai.chat.template.jinja", "t.txt"),
    ]


def test_files_of_equal_size_are_compared(tmp_path: Path) -> None:
    large = b"x" * (3 * 2**20)
    write(tmp_path, {"m.gguf": TINY, "a/L": large, "b/L": large[:-1] + b"y", "c/L": large})
    request = PackageRequest(
        gguf=tmp_path / "m.gguf", licenses=(tmp_path / "a/L", tmp_path / "c/L")
    )
    assert len(plan(request, environ={}).files) == 2
    other = PackageRequest(gguf=tmp_path / "m.gguf", licenses=(tmp_path / "a/L", tmp_path / "b/L"))
    with pytest.raises(Exception, match="would both be"):
        plan(other, environ={})


def test_several_models_in_one_directory(tmp_path: Path) -> None:
    write(tmp_path, {"q4.gguf": TINY, "q8.gguf": TINY, "mmproj.gguf": PROJECTOR, **SHARDS})
    planned = plan(PackageRequest(safetensors_dir=tmp_path), environ={})
    assert len(planned.files) == 6
    (note,) = planned.notes
    assert "q4.gguf, q8.gguf, tiny-00001-of-00003.gguf" in note
    assert "mmproj" not in note
    assert planned.statistics.parameters == "8"
    for name in SHARDS:
        (tmp_path / name).unlink()
    (tmp_path / "q8.gguf").unlink()
    assert not plan(PackageRequest(safetensors_dir=tmp_path), environ={}).notes
    (tmp_path / "mmproj.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeightFormatError, match=r"mmproj\.gguf"):
        plan(PackageRequest(safetensors_dir=tmp_path), environ={})


def test_preserve_takes_any_name(tmp_path: Path) -> None:
    write(tmp_path, {"a\\b\n\udcff.txt": b"", "model.safetensors": PAIR})
    built = package(PackageRequest(safetensors_dir=tmp_path, preserve=True))
    assert built.manifest.layers[0].filepath == "a\\b\n\ufffd.txt"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("README.md", "readme.md"),
        ("e\u0301.txt", "\u00e9.txt"),
        ("notes", "Notes/x.txt"),
        ("LICENSE", "license/x.txt"),
        ("a/b.json", "A/B.json"),
    ],
)
def test_a_note_on_names_that_are_one_on_other_systems(
    tmp_path: Path, one: str, other: str
) -> None:
    write(tmp_path, {"m.safetensors": PAIR, one: b"1", other: b"2"})
    (note,) = plan(PackageRequest(safetensors_dir=tmp_path), environ={}).notes
    assert "are one name where a file system ignores case" in note


def test_licenses_of_one_name_are_unpacked_apart(tmp_path: Path) -> None:
    write(tmp_path, {"m.safetensors": PAIR, "LICENSE": b"1", "license": b"2"})
    assert not plan(PackageRequest(safetensors_dir=tmp_path), environ={}).notes
