"""The real modctl of CNCF ModelPack and ours: each unpacks what the other made."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts import media_types as mediatypes
from modelpack.artifacts.digest import Digest
from modelpack.operations.convert import convert
from modelpack.testing import registry
from tests.conftest import ROOT
from tests.interop.go_tool import build_go_tool
from tests.models import tiny_gguf, tiny_safetensors
from tests.operations.test_convert import files_of
from tests.peers import require

pytestmark = pytest.mark.peer("go")


@pytest.fixture(scope="module")
def binary() -> Path:
    require("go")
    return build_go_tool(Path(__file__).parent / "modctl_cli", ROOT / ".cache")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[str]:
    with registry(tmp_path / "registry") as server:
        yield server.host


class Modctl:
    """Runs the program in a directory of its own."""

    def __init__(self, binary: Path, directory: Path) -> None:
        self.binary = binary
        self.directory = directory
        directory.mkdir()

    def __call__(self, *arguments: str) -> str:
        own = ["--storage-dir", "storage", "--log-dir", "logs", "--no-progress"]
        done = subprocess.run(
            [self.binary, *arguments, *own], cwd=self.directory, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def tree(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith(".")  # those are left out
    }


def test_modctl_extracts_what_we_package(binary: Path, host: str, tmp_path: Path) -> None:
    modctl = Modctl(binary, tmp_path / "work")
    store = modelpack.Store(tmp_path / "store")
    requests = {
        "gguf": modelpack.PackageRequest(gguf=tiny_gguf(tmp_path), format="cncf"),
        "st": modelpack.PackageRequest(safetensors_dir=tiny_safetensors(tmp_path), format="cncf"),
    }
    wanted = {
        "gguf": {"tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()},
        "st": tree(tmp_path / "tiny-safetensors"),
    }
    for name, request in requests.items():
        reference = f"{host}/team/{name}:v1"
        modelpack.package(reference, request, push=True, store=store)
        modctl("pull", "--plain-http", reference)
        for path, content in wanted[name].items():  # of the manifest it shows its own encoding
            assert f'"{path}"' in (shown := modctl("inspect", reference))
            assert str(Digest.of(content)) in shown
        modctl("extract", reference, "--output", f"out-{name}")
        assert tree(modctl.directory / f"out-{name}") == wanted[name]


@pytest.mark.sample(1)
@pytest.mark.parametrize("form", ["raw", "tar"])
def test_what_modctl_builds_is_read(binary: Path, host: str, tmp_path: Path, form: str) -> None:
    modctl = Modctl(binary, tmp_path / "work")
    source = tiny_safetensors(tmp_path)
    (source / "LICENSE").write_text("MIT License\n")
    wanted = tree(source)
    shutil.move(source, modctl.directory / "model")
    modctl("modelfile", "generate", "model", "--name", "tiny", "--output", ".")
    reference = f"{host}/team/built:{form}"
    raw = f"--raw={'true' if form == 'raw' else 'false'}"
    modctl("build", "-t", reference, "-f", "Modelfile", raw, "model")
    modctl("push", "--plain-http", reference)

    store = modelpack.Store(tmp_path / "store")
    modelpack.pull(reference, store=store)
    model = modelpack.inspect(reference, store=store)
    assert model.config.media_type == mediatypes.CNAI_CONFIG
    assert model.config.cncf_descriptor["name"] == "tiny"
    assert all((file.archive is not None) == (form == "tar") for file in model.files())
    [weight] = modelpack.resolve(reference, media_types=["safetensors"], store=store).files
    assert weight.path.read_bytes() == wanted["model.safetensors"]
    modelpack.bundle(reference, tmp_path / "bundle", store=store)
    assert tree(tmp_path / "bundle" / "model") == wanted
    converted = f"{host}/team/converted:{form}"
    convert(reference, converted, to="cncf", push=True, store=store)
    modctl("pull", "--plain-http", converted)
    modctl("extract", converted, "--output", "back")
    assert tree(modctl.directory / "back") == wanted
    convert(reference, "x/image:v1", to="image", store=store)
    assert files_of(store, "x/image:v1") == {f"models/{path}": wanted[path] for path in wanted}
