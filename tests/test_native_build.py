"""The library for CPUs is compiled at installation, and everything else is installed without it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from scripts.native import build
from scripts.native.build import Library, NativeError
from tests.peers import require

ROOT = Path(__file__).parents[1]
NATIVE = build.PACKAGE / "native"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MLX computes by Metal on macOS")

#: A compiler that writes what it was asked for, and logs its output's name.
COMPILER = """#!/bin/sh
case "$*" in
*-dumpmachine) echo x86_64-linux-gnu; exit ;;
*--version) cat "$0"; exit ;;
esac
for last; do :; done
case "$*" in *BROKEN*) echo "kernels.cpp:1:1: error: BROKEN" >&2; exit 1 ;; esac
basename "$last" >>"${0%/*}/log"
printf '%s\\n' "$@" | grep -v "^/" >"$last"
printf '\\0GLIBC_2.31\\0GLIBC_2.9\\0' >>"$last"
"""


class Tree:
    """The sources in a directory of their own, and a compiler that does little."""

    def __init__(self, path: Path) -> None:
        self.root, self.programs = path / "tree", path / "bin"
        shutil.copytree(ROOT / NATIVE, self.root / NATIVE)
        self.programs.mkdir()
        self.compiler = self.programs / "g++"
        self.compiler.write_text(COMPILER)
        self.compiler.chmod(0o755)
        self.environ = {"PATH": f"{self.programs}:/usr/bin:/bin"}

    def build(self) -> Library | None:
        return build.build(self.root, self.environ)

    def compiled(self) -> set[str]:
        """Return the files that were made since the last call."""
        log = self.programs / "log"
        names = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        assert len(names) == len(set(names))
        return set(names)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


OBJECTS = {
    "kernels_portable.o", "kernels_avx2.o", "kernels_avx512.o", "kernels_avx512_bf16.o",
    "kernels_amx.o",
    "packing.o", "program.o",
}  # fmt: skip


def test_only_what_has_changed_is_compiled(tree: Tree) -> None:
    first = tree.build()
    assert first is not None
    assert tree.compiled() == {*OBJECTS, build.LIBRARY}
    assert tree.build() == first
    assert tree.compiled() == set()

    with (tree.root / NATIVE / "packing.cpp").open("a") as file:
        file.write("// changed\n")
    tree.build()
    assert tree.compiled() == {"packing.o", build.LIBRARY}

    with (tree.root / NATIVE / "kernels.hpp").open("a") as file:
        file.write("// changed\n")
    tree.build()
    assert tree.compiled() == {*OBJECTS, build.LIBRARY}

    first.path.with_name("program.o").write_bytes(b"half of it")
    tree.build()
    assert tree.compiled() == {"program.o"}  # with the same bytes as before: nothing to link

    tree.compiler.write_text(COMPILER + "# another version\n")
    tree.build()
    assert tree.compiled() == {*OBJECTS, build.LIBRARY}


def test_an_editable_install_has_the_library_in_its_sources(tree: Tree) -> None:
    made = build.install(tree.root, tree.environ)
    assert made == tree.root / build.PACKAGE / build.LIBRARY
    built = tree.build()
    assert built is not None
    assert made.read_bytes() == built.path.read_bytes()
    assert os.access(made, os.X_OK)


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ({"PATH": ""}, "no C++ compiler found: install g++ or clang++"),
        ({"PATH": "/usr/bin", "CXX": "no-such-g++ -m64"}, "install no-such-g++ ($CXX)"),
        ({"PATH": "/usr/bin:/bin", "CXX": "false"}, "bin/false does not run"),
        ({"PATH": "/usr/bin:/bin", "CXX": "echo"}, "there are no kernels for -dumpmachine"),
        ({"CXX": "BIN/g++ -DBROKEN"}, "failed: kernels.cpp:1:1: error: BROKEN"),
    ],
    ids=["no compiler", "no $CXX", "does not run", "another machine", "an error"],
)
def test_a_library_that_cannot_be_built_is_a_note(
    environ: dict[str, str], why: str, tree: Tree, capfd: pytest.CaptureFixture[str]
) -> None:
    old = tree.root / build.PACKAGE / build.LIBRARY
    old.write_bytes(b"of other sources")
    environ = {key: text.replace("BIN", str(tree.programs)) for key, text in environ.items()}
    environ = tree.environ | environ
    assert build.install(tree.root, environ) is None
    assert not old.exists()
    [note] = capfd.readouterr().err.splitlines()
    assert note.startswith("note: libmodelpack_cpu.so is not built, CPUs use MLX alone: ")
    assert why in note
    with pytest.raises(NativeError, match=re.escape(why)):
        build.install(tree.root, {**environ, "MODELPACK_NATIVE": "1"})


def test_it_can_be_left_out(tree: Tree, capfd: pytest.CaptureFixture[str]) -> None:
    tree.environ["MODELPACK_NATIVE"] = "0"
    assert tree.build() is None
    assert capfd.readouterr() == ("", "")
    assert tree.compiled() == set()


def test_macs_do_without(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert tree.build() is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("content", "static", "platform"),
    [
        (b"\0GLIBC_2.31\0GLIBC_2.9\0libc.so.6\0", True, "manylinux_2_31_x86_64"),
        (b"\0GLIBC_2.2.5\0GLIBC_2.3.2\0", True, "manylinux_2_17_x86_64"),
        (b"\0GLIBC_2.31\0", False, "linux_x86_64"),  # libstdc++ is needed too
        (b"\0GLIBC_2.36\0GLIBC_ABI_DT_RELR\0", True, "linux_x86_64"),
        (b"\0libc.musl-x86_64.so.1\0", True, "linux_x86_64"),
    ],
)
def test_the_platform_is_that_of_the_newest_symbol(
    content: bytes, static: bool, platform: str
) -> None:
    assert build._platform(content, "x86_64", static) == platform


def test_without_static_libraries_the_others_are_linked(tree: Tree) -> None:
    tree.compiler.write_text(COMPILER.replace("*BROKEN*", "*-static-libstdc++*"))
    for _ in range(2):
        built = tree.build()
        assert built is not None
        assert built.platform == "linux_x86_64"
    assert tree.compiled() == {*OBJECTS, build.LIBRARY}


# ---- Wheels, by pip ----------------------------------------------------------------------------


def copy_project(target: Path) -> Path:
    """Copy what git has of the project."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "modelpack", "engine", "spec", "scripts",
         "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\n")  # fmt: skip
    for name in filter(None, listed):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def wheel(project: Path, out: Path, **environ: str) -> Path:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check",
         "--no-deps", "--wheel-dir", str(out), str(project)],
        env={**os.environ, "CXX": "", "MODELPACK_NATIVE": "", **environ}, check=True, timeout=300,
    )  # fmt: skip
    [made] = out.iterdir()
    return made


@pytest.mark.long
@pytest.mark.peer("pip")
def test_wheels(tree: Tree, tmp_path: Path) -> None:
    """With a compiler, a wheel is of one platform and has the library; without one, of none."""
    project = copy_project(tmp_path / "project")
    made = wheel(project, tmp_path / "with", **tree.environ, MODELPACK_NATIVE="1")
    assert made.name.endswith("-py3-none-manylinux_2_31_x86_64.whl")
    inside = zipfile.ZipFile(made)
    members = {name for name in inside.namelist() if name.startswith("modelpack_engine/cpu/")}
    assert f"modelpack_engine/cpu/{build.LIBRARY}" in members
    assert not [name for name in members if "/native/" in name]
    [metadata] = [name for name in inside.namelist() if name.endswith(".dist-info/WHEEL")]
    assert "Root-Is-Purelib: false" in inside.read(metadata).decode()

    build.install(project, tree.environ)  # as left by an editable install
    pure = wheel(project, tmp_path / "without", PATH="")
    assert pure.name.endswith("-py3-none-any.whl")
    left = {
        name for name in zipfile.ZipFile(pure).namelist() if name.startswith("modelpack_engine")
    }
    assert f"modelpack_engine/cpu/{build.LIBRARY}" not in left
    assert left | {f"modelpack_engine/cpu/{build.LIBRARY}"} == {
        name for name in inside.namelist() if name.startswith("modelpack_engine")
    }


@pytest.mark.long
@pytest.mark.peer("pip")
def test_sources_are_enough_to_build_it(tree: Tree, tmp_path: Path) -> None:
    """The sdist has the C++ sources and the build's scripts, and no library."""
    project = copy_project(tmp_path / "project")
    build.install(project, tree.environ)
    out = tmp_path / "sdist"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "hatchling>=1.25", "click>=8.2"], check=True, timeout=300)
    subprocess.run(
        [str(python), "-m", "hatchling", "build", "-t", "sdist", "-d", str(out)],
        cwd=project, check=True, timeout=300, capture_output=True,
    )  # fmt: skip
    [made] = out.iterdir()
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"scripts/native/build.py", "scripts/build_hook.py"} <= names
    assert {str(NATIVE / path.name) for path in (ROOT / NATIVE).iterdir()} <= names
    assert not [name for name in names if name.endswith((".so", ".o"))]


# ---- The real compiler -------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.peer("g++")
def test_two_directories_make_the_same_bytes(tmp_path: Path) -> None:
    """`make` has built the library in this directory."""
    require("g++")
    shutil.copytree(ROOT / NATIVE, tmp_path / NATIVE)
    environ = {"PATH": os.environ["PATH"], "CXX": os.environ.get("CXX", "")}
    built = build.build(tmp_path, {**environ, "MODELPACK_NATIVE": "1"})
    assert built is not None
    content = built.path.read_bytes()
    assert str(tmp_path).encode() not in content
    assert content == (ROOT / build.PACKAGE / build.LIBRARY).read_bytes()


@pytest.mark.long
@pytest.mark.peer("g++")
def test_the_sources_have_no_warnings(tmp_path: Path) -> None:
    require("g++")
    compiler = build.find_compiler({"PATH": os.environ["PATH"], "CXX": "g++"})
    # GCC 12 warns of its own headers of AVX-512; notes of an ABI concern functions inlined here.
    off = ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi"]
    for name, source, flags in compiler.objects():
        ignored = off if "-mavx512f" in flags else off[2:]
        arguments = [*flags, "-Wall", "-Wextra", "-Werror", *ignored]
        compiler.run([*arguments, "-c", source, "-o", str(tmp_path / name)], ROOT / NATIVE)
        assert (tmp_path / name).stat().st_size > 0
