"""A new model from an existing one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.builder.build import Built, assemble, repackage
from modelpack.builder.plan import plan_extras
from modelpack.builder.request import PackageRequest
from modelpack.errors import PackagingError, UsageError
from tests.packaging.trees import (
    MIT,
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


def changed(first: Built, request: PackageRequest, environ: dict[str, str] | None = None) -> Built:
    """Repackage from parsed bytes, as from a store."""
    manifest = Manifest.parse(first.manifest.raw)
    config = ModelConfig.parse(first.config_bytes, manifest.config.media_type)
    extra = plan_extras(request, environ=environ or {})
    return repackage(manifest, config, request, extra, digests(extra), environ=environ or {})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, {"m.gguf": TINY, "LICENSE": MIT, "t.jinja": TEMPLATE, "mmproj.gguf": PROJECTOR})
    write(tmp_path, {"new/t.jinja": b"new\n", "new/u.jinja": b"u\n", "new/LICENSE": b"other\n"})
    write(tmp_path, {"new/mmproj-2.gguf": PROJECTOR, "copy/LICENSE": MIT, **SHARDS})
    write(tmp_path / "d", TINY_DIRECTORY)
    return tmp_path


@pytest.fixture
def plain(root: Path) -> Built:
    return package(PackageRequest(gguf=root / "m.gguf"))


def all_flags(root: Path) -> PackageRequest:
    return PackageRequest(
        licenses=(root / "LICENSE",),
        chat_template=root / "t.jinja",
        mmproj=root / "mmproj.gguf",
        context_size=77,
        annotations={"k": "v"},
    )


def test_adding_is_the_same_as_packaging_at_once(root: Path, plain: Built) -> None:
    flags = all_flags(root)
    at_once = package(replace(flags, gguf=root / "m.gguf"))
    later = changed(plain, flags)
    assert later.manifest.raw == at_once.manifest.raw
    assert later.config_bytes == at_once.config_bytes
    assert later.notes == ()


@pytest.mark.parametrize("source", ["m.gguf", "d", "tiny-00002-of-00003.gguf"])
@pytest.mark.parametrize("format", ["docker", "cncf"])
def test_format_and_config_version_stay(root: Path, source: str, format: str) -> None:
    path = {"safetensors_dir" if source == "d" else "gguf": root / source}
    first = package(PackageRequest(**path, format=format))  # type: ignore[arg-type]
    write(root, {"NOTICE.txt": b"n"})
    later = changed(first, PackageRequest(licenses=(root / "NOTICE.txt",)))
    assert later.manifest.config.media_type == first.manifest.config.media_type
    assert later.manifest.artifact_type == first.manifest.artifact_type
    assert later.manifest.layers[:-1] == first.manifest.layers
    added = later.manifest.layers[-1]
    assert added.media_type == (
        media_types.CNCF_DOC_RAW if format == "cncf" else media_types.DOCKER_LICENSE
    )
    assert later.config == first.config.with_changes(
        diff_ids=(*first.config.diff_ids, Digest.of(b"n"))
    )


def test_nothing_to_change_changes_nothing(plain: Built) -> None:
    assert changed(plain, PackageRequest()).manifest.raw == plain.manifest.raw


def test_only_the_context_size(root: Path, plain: Built) -> None:
    later = changed(plain, PackageRequest(context_size=0))
    assert later.manifest.layers == plain.manifest.layers
    assert later.config == plain.config.with_changes(context_size=0)
    assert later.manifest.digest != plain.manifest.digest


def test_no_context_size_in_the_cncf_format(root: Path, plain: Built) -> None:
    in_cncf = changed(plain, PackageRequest(format="cncf"))
    for first, request in (
        (in_cncf, PackageRequest(context_size=5)),
        (plain, PackageRequest(context_size=5, format="cncf")),
    ):
        with pytest.raises(UsageError, match="CNCF"):
            changed(first, request)
    # Fields that fit are written when converting back.
    back = changed(in_cncf, PackageRequest(context_size=5, format="docker"))
    assert back.config.context_size == 5


def test_converting_and_adding_at_once(root: Path, plain: Built) -> None:
    flags = replace(all_flags(root), context_size=None, format="cncf")
    at_once = package(replace(flags, gguf=root / "m.gguf"))
    found = changed(plain, flags)
    assert found.manifest.layers == at_once.manifest.layers
    without = at_once.config.with_changes(
        cncf_descriptor={"family": "llama"}, cncf_config={}
    )  # the builder has no files to read them from
    assert found.config_bytes == without.encode()


def test_times(root: Path) -> None:
    first = package(PackageRequest(gguf=root / "m.gguf", created="2020-02-02T02:02:02Z"))
    environ = {"SOURCE_DATE_EPOCH": "1000000000"}
    later = changed(first, PackageRequest(licenses=(root / "LICENSE",)), environ)
    assert later.config.created == "2020-02-02T02:02:02Z"
    metadata = json.loads(later.manifest.layers[-1].annotations[media_types.FILE_METADATA])
    assert metadata["mtime"] == "2001-09-09T01:46:40Z"
    later = changed(first, PackageRequest(created="2021-01-01T00:00:00+02:00"))
    assert later.config.created == "2021-01-01T00:00:00+02:00"


def test_annotations_are_kept_and_replaced(root: Path) -> None:
    first = package(PackageRequest(gguf=root / "m.gguf", annotations={"a": "1", "b": "2"}))
    later = changed(first, PackageRequest(annotations={"b": "3", "c": "4"}))
    assert later.manifest.annotations == {"a": "1", "b": "3", "c": "4"}


def test_the_same_license_is_not_added_again(root: Path) -> None:
    first = package(PackageRequest(gguf=root / "m.gguf", licenses=(root / "LICENSE",)))
    later = changed(first, PackageRequest(licenses=(root / "copy" / "LICENSE",)))
    assert later.manifest.raw == first.manifest.raw
    assert "already in the model" in later.notes[0]
    kept = changed(first, PackageRequest(licenses=(root / "LICENSE",), preserve=True))
    assert [path for _, path in layers(kept)] == ["m.gguf", "LICENSE", "LICENSE"]


@pytest.mark.parametrize("format", [None, "cncf"])
def test_another_license_of_the_same_name_is_refused(root: Path, format: str | None) -> None:
    request = PackageRequest(gguf=root / "m.gguf", licenses=(root / "LICENSE",))
    first = package(replace(request, format=format))  # type: ignore[arg-type]
    with pytest.raises(PackagingError, match="another file at 'LICENSE'"):
        changed(first, PackageRequest(licenses=(root / "new" / "LICENSE",)))


def test_a_single_file_model_has_one_template_and_one_projector(root: Path) -> None:
    flags = replace(all_flags(root), gguf=root / "m.gguf")
    new = PackageRequest(
        chat_template=root / "new" / "u.jinja", mmproj=root / "new" / "mmproj-2.gguf"
    )
    later = changed(package(flags), new)
    assert [path for _, path in layers(later)] == ["m.gguf", "LICENSE", "u.jinja", "mmproj-2.gguf"]
    assert len(later.config.diff_ids) == 4
    assert later.config.diff_ids[2] == Digest.of(b"u\n")
    assert "replaces 't.jinja'" in later.notes[0]
    # Docker Model Runner appends without checks.
    assert len(changed(package(flags), replace(new, preserve=True)).manifest.layers) == 6


@pytest.mark.parametrize("format", ["docker", "cncf"])
def test_a_directory_has_one_file_at_a_path(root: Path, format: str) -> None:
    first = package(PackageRequest(safetensors_dir=root / "d", format=format))  # type: ignore[arg-type]
    count = len(first.manifest.layers)
    write(root, {"new/chat_template.jinja": b"new\n"})
    replaced = changed(first, PackageRequest(chat_template=root / "new" / "chat_template.jinja"))
    assert len(replaced.manifest.layers) == count
    assert replaced.manifest.layers[-1].digest == Digest.of(b"new\n")
    assert replaced.notes
    write(root, {"new/b.jinja": b"b\n"})
    beside = changed(first, PackageRequest(chat_template=root / "new" / "b.jinja"))
    assert len(beside.manifest.layers) == count + 1


@pytest.mark.parametrize("format", ["docker", "cncf"])
def test_weights_are_never_replaced(root: Path, format: str) -> None:
    first = package(PackageRequest(gguf=root / "m.gguf", format=format))  # type: ignore[arg-type]
    write(root, {"new/m.gguf": PROJECTOR})
    for path in (root / "new" / "m.gguf", root / "m.gguf"):
        if format == "cncf" and path == root / "m.gguf":
            continue  # a layer with the same type, path and digest exists
        with pytest.raises(PackagingError, match=r"another file at 'm\.gguf'"):
            changed(first, PackageRequest(mmproj=path))


def test_a_projector_of_a_directory_gets_its_type(root: Path) -> None:
    write(root, {"g/m.gguf": TINY, "g/mmproj.gguf": PROJECTOR})
    first = package(PackageRequest(safetensors_dir=root / "g"))
    later = changed(first, PackageRequest(mmproj=root / "g" / "mmproj.gguf"))
    assert layers(later) == [("docker.ai.gguf.v3", "m.gguf"), ("docker.ai.mmproj", "mmproj.gguf")]


def test_what_others_wrote_is_kept() -> None:
    odd = Descriptor("application/x-odd", Digest.of(b"odd"), 3, {"org.example.k": "v"})
    weight = Descriptor(media_types.DOCKER_GGUF, Digest.of(b"w"), 1)
    config = ModelConfig(
        media_types.DOCKER_CONFIG_V01, format="gguf", diff_ids=(Digest.of(b"unpacked"),)
    )
    first = assemble(config, [weight, odd], {}, artifact_type="application/x-model")
    later = changed(first, PackageRequest(context_size=1))
    assert later.manifest.layers == (weight, odd)
    assert later.manifest.artifact_type == "application/x-model"
    # Missing diff ids of a config are filled in as Docker does.
    assert later.config.diff_ids == (Digest.of(b"unpacked"), odd.digest)
    assert later.config.created is None


def test_extras_are_in_order_and_once(root: Path) -> None:
    request = replace(all_flags(root), licenses=(root / "LICENSE", root / "copy" / "LICENSE"))
    extra = plan_extras(request, environ={})
    assert [file.filepath for file in extra.files] == ["LICENSE", "t.jinja", "mmproj.gguf"]
    assert len(extra.notes) == 1
    assert plan_extras(PackageRequest(), environ={}).files == ()
    assert plan_extras(PackageRequest(), environ={}).created is None


def test_no_extras_need_no_digests(plain: Built) -> None:
    again = repackage(plain.manifest, plain.config, PackageRequest(), None, (), environ={})
    assert again.manifest.raw == plain.manifest.raw
    with pytest.raises(ValueError, match="zip"):
        repackage(plain.manifest, plain.config, PackageRequest(), None, [Digest.of(b"")])
