"""The real kit of KitOps, where it is installed: `kit`, or what MODELPACK_KIT names.

What it makes is read everywhere else too, from a file: tests/operations/test_foreign.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelpack
from modelpack.operations.convert import convert
from modelpack.testing import registry
from tests.interop.test_modctl_cli import tree
from tests.models import tiny_gguf, tiny_safetensors
from tests.peers import REQUIRED

KITFILE = Path(__file__).parent / "kit" / "Kitfile"


@pytest.fixture
def program() -> Path:
    found = shutil.which(os.environ.get("MODELPACK_KIT", "kit"))
    if found is None and REQUIRED:
        pytest.xfail("KitOps is not installed, and has to be built from its sources")
    if found is None:
        pytest.skip("KitOps is not installed")
    return Path(found)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[str]:
    with registry(tmp_path / "registry") as server:
        yield server.host


class Kit:
    """Runs the program in a directory of its own."""

    def __init__(self, program: Path, home: Path, directory: Path) -> None:
        self.program = program
        self.home = home
        self.directory = directory
        directory.mkdir(exist_ok=True)

    def __call__(self, command: str, *arguments: str) -> str:
        done = subprocess.run(
            [self.program, command, *arguments, "--progress", "none"], cwd=self.directory,
            env={**os.environ, "KITOPS_HOME": str(self.home)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.mark.parametrize("compression", ["none", "gzip", "gzip-fastest"])
def test_what_kit_packs_is_read(program: Path, host: str, tmp_path: Path, compression: str) -> None:
    kit = Kit(program, tmp_path / "home", tmp_path / "kit")
    files = {
        "weights/tiny.gguf": tiny_gguf(tmp_path).read_bytes(),
        "weights/adapter_config.json": b"{}",
        "run.py": b"print(1)\n",
        "data/rows.csv": b"a,b\n",
        "README.md": b"# Tiny\n",
        "LICENSE": b"MIT License\n",
    }
    for path, content in files.items():
        (kit.directory / path).parent.mkdir(exist_ok=True)
        (kit.directory / path).write_bytes(content)
    shutil.copyfile(KITFILE, kit.directory / "Kitfile")
    reference = f"{host}/team/kit:v1"
    kit("pack", ".", "--compression", compression, "-t", reference)
    kit("push", reference, "--plain-http")

    store = modelpack.Store(tmp_path / "store")
    modelpack.pull(reference, store=store)
    [weight] = modelpack.resolve(reference, media_types=["gguf"], store=store).files
    assert weight.path.read_bytes() == files["weights/tiny.gguf"]
    modelpack.bundle(reference, tmp_path / "bundle", store=store)
    assert tree(tmp_path / "bundle" / "model") == files
    for to in ("docker", "cncf"):
        convert(reference, f"x/{to}:v1", to=to, store=store)
        modelpack.bundle(f"x/{to}:v1", tmp_path / to, store=store)
        assert tree(tmp_path / to / "model") == files


def test_kit_takes_what_we_lay_out(program: Path, host: str, tmp_path: Path) -> None:
    store = modelpack.Store(tmp_path / "store")
    directory = tiny_safetensors(tmp_path)
    request = modelpack.PackageRequest(safetensors_dir=directory, format="cncf")
    modelpack.package("x/st:v1", request, store=store)
    modelpack.bundle("x/st:v1", tmp_path / "bundle", store=store)
    kit = Kit(program, tmp_path / "home", tmp_path / "bundle" / "model")
    kit("init", ".", "--name", "tiny", "--desc", "a test", "--author", "us", "--force")
    reference = f"{host}/team/kit:v1"
    kit("pack", ".", "-t", reference)
    kit("unpack", reference, "-d", str(tmp_path / "unpacked"))
    unpacked = tree(tmp_path / "unpacked")
    del unpacked["Kitfile"]
    assert unpacked == tree(directory)
