"""A GGUF file's content or its media type says whether it is a projector, its name does not."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import modelpack
from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.model import Role
from modelpack.bundles.bundle import lay_out
from modelpack.formats.projector import identified
from modelpack.operations.lint import open_subject
from modelpack.operations.pull import Selection
from modelpack.testing import registry
from tests.cli.running import succeed
from tests.operations.conftest import Records
from tests.packaging.trees import PROJECTOR, SHARDS, TINY, write
from tests.unpacking.stored import Stored

NAMES = [("two.gguf", "one.gguf"), ("mmproj-two.gguf", "one.gguf"), ("two.gguf", "one.mmproj")]
FORMATS: list[dict[str, Any]] = [{}, {"format": "cncf"}, {"format": "cncf", "preserve": True}]


@dataclass(frozen=True)
class Packaged:
    """A stored GGUF model with a projector, and the names of both files."""

    root: Path
    store: modelpack.Store
    weights: str
    projector: str

    def roles(self, **kwargs: Any) -> dict[str | None, Role]:
        found = modelpack.inspect("m", **(kwargs or {"store": self.store}))
        return {file.filepath: file.role for file in found.files()}

    @property
    def expected(self) -> dict[str | None, Role]:
        return {self.weights: Role.WEIGHT, self.projector: Role.PROJECTOR}


def packaged(root: Path, names: tuple[str, str], **options: Any) -> Packaged:
    weights, projector = names
    write(root, {weights: TINY, projector: PROJECTOR})
    store = modelpack.Store(root / "store")
    request = modelpack.PackageRequest(gguf=root / weights, mmproj=root / projector, **options)
    modelpack.package("m", request, store=store)
    return Packaged(root, store, weights, projector)


@pytest.mark.parametrize("names", NAMES, ids="/".join)
@pytest.mark.parametrize("options", FORMATS, ids=["docker", "cncf", "preserved"])
def test_a_stored_model(names: tuple[str, str], options: dict[str, Any], tmp_path: Path) -> None:
    made = packaged(tmp_path, names, **options)
    assert made.roles() == made.expected
    for kind, content in (("weight", TINY), ("mmproj", PROJECTOR)):
        [file] = modelpack.resolve("m", media_types=[kind], store=made.store).files
        assert file.path.read_bytes() == content
    bundle = modelpack.bundle("m", tmp_path / "bundle", store=made.store)
    assert bundle.weight.read_bytes() == TINY
    assert bundle.mmproj is not None
    assert bundle.mmproj.read_bytes() == PROJECTOR
    [shown] = [
        line for line in succeed("inspect", "m", "--store", tmp_path / "store").out.splitlines()
        if line.endswith(made.projector)
    ]  # fmt: skip
    assert shown.split()[0] == "projector"
    with open_subject("m", store=made.store) as (_, subject):
        assert {file.path: file.role for file in subject.files} == made.expected


@pytest.mark.parametrize("names", NAMES, ids="/".join)
def test_conversions(names: tuple[str, str], tmp_path: Path) -> None:
    """From CNCF's format to Docker's, which has a media type for projectors, and back."""
    made = packaged(tmp_path, names, format="cncf")
    request = modelpack.PackageRequest(format="docker")
    docker = modelpack.package("d", request, from_model="m", store=made.store)
    assert {layer.filepath: layer.media_type for layer in docker.manifest.layers} == {
        made.weights: media_types.DOCKER_GGUF, made.projector: media_types.DOCKER_MMPROJ,
    }  # fmt: skip
    assert docker.config.architecture == "llama"
    request = modelpack.PackageRequest(format="cncf")
    again = modelpack.package("c", request, from_model="d", store=made.store)
    assert again.config.cncf_config["capabilities"]["inputTypes"] == ["text", "image"]


def test_a_projector_that_replaces_another(tmp_path: Path) -> None:
    made = packaged(tmp_path, ("two.gguf", "one.gguf"), format="cncf")
    other = write(tmp_path / "other", {"one.gguf": PROJECTOR + b"\0"})
    request = modelpack.PackageRequest(mmproj=other / "one.gguf")
    modelpack.package("m", request, from_model="m", store=made.store)
    assert made.roles() == made.expected


@pytest.mark.parametrize("names", NAMES, ids="/".join)
def test_a_model_in_a_registry(names: tuple[str, str], tmp_path: Path) -> None:
    made = packaged(tmp_path, names, format="cncf")
    with registry() as server:
        name = f"{server.host}/team/m"
        modelpack.push("m", to=name, store=made.store)
        found = modelpack.inspect(name, from_registry=True)
        assert {file.filepath: file.role for file in found.files()} == made.expected
        store = modelpack.Store(tmp_path / "pulled")
        selected = Selection(media_types=("mmproj",))
        [missing] = modelpack.pull(name, selection=selected, store=store).missing
        assert missing.filepath == made.weights
        partial = modelpack.inspect(name, store=store)
        assert {file.filepath: file.role for file in partial.files()}[
            made.projector
        ] is Role.PROJECTOR


def test_one_gguf_file_in_a_registry_is_not_read(tmp_path: Path) -> None:
    store, records = modelpack.Store(tmp_path / "store"), Records()
    with registry(on_request=records.add) as server:
        for name, files in (("alone", {"t.gguf": TINY}), ("shards", SHARDS)):
            write(tmp_path / name, files)
            request = modelpack.PackageRequest(gguf=tmp_path / name / min(files), format="cncf")
            modelpack.package(f"{server.host}/team/{name}", request, push=True, store=store)
            records.forget(server)
            modelpack.inspect(f"{server.host}/team/{name}", from_registry=True)
            assert len(records.settled(server)) == 2  # manifest and config


def test_a_directory(tmp_path: Path) -> None:
    """In Docker's format, the files of a directory have one media type, too."""
    write(tmp_path / "d", {"a.gguf": PROJECTOR, "b.gguf": TINY, "README.md": b"A model.\n"})
    store = modelpack.Store(tmp_path / "store")
    for options in FORMATS:
        request = modelpack.PackageRequest(safetensors_dir=tmp_path / "d", **options)
        made = modelpack.package("m", request, store=store)
        assert not any("several models" in note for note in made.notes)
        roles = {file.filepath: file.role for file in modelpack.inspect("m", store=store).files()}
        assert roles == {"a.gguf": Role.PROJECTOR, "b.gguf": Role.WEIGHT, "README.md": Role.DOC}
        if options.get("format") == "cncf" and not options.get("preserve"):
            stated = made.config.cncf_config["capabilities"]
            assert stated["inputTypes"] == ["text", "image"]


def test_files_of_an_archive(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in (("a.gguf", PROJECTOR), ("b.gguf", TINY)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    blobs = Stored(tmp_path / "blobs")
    layer = ("application/vnd.cncf.model.weight.v1.tar", ".", stream.getvalue())
    model = blobs.model([layer], ModelConfig(media_types.CNCF_CONFIG, format="gguf"))
    bundle = lay_out(model, blobs.path, tmp_path / "bundle")
    assert bundle.weight.name == "b.gguf"
    assert bundle.mmproj is not None
    assert bundle.mmproj.name == "a.gguf"


def test_a_damaged_file_keeps_the_role_of_its_name(tmp_path: Path) -> None:
    blobs = Stored(tmp_path / "blobs")
    kind = media_types.CNCF_WEIGHT_RAW
    layers = [(kind, name, b"GGUF" + name.encode()) for name in ("mmproj-a.gguf", "b.gguf")]
    model = identified(blobs.model(layers), lambda file: blobs.path(file.descriptor))
    assert [file.role for file in model.files()] == [Role.PROJECTOR, Role.WEIGHT]
