"""Trees and open directories: each path is made once, and links are not followed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelpack.artifacts.paths import folded
from modelpack.bundles.directory import MAX_DEPTH, Folder, Tree
from modelpack.errors import UnsafePathError


@pytest.fixture
def root(directory: Path) -> Iterator[Folder]:
    directory.mkdir()
    with Folder.open(directory) as folder:
        yield folder


@pytest.fixture
def tree(root: Folder) -> Tree:
    return Tree(root)


def write(tree: Tree, path: str, source: str = "layer 1", content: bytes = b"x") -> None:
    with tree.place(path, source) as (folder, name):
        fd = folder.create(name)
        os.write(fd, content)
        os.close(fd)


def test_files_and_directories(tree: Tree, directory: Path) -> None:
    old = os.umask(0o077)
    try:
        write(tree, "a")
        write(tree, "sub/b")
        write(tree, "sub/deep/c")
        tree.add_directory("sub/deep", "layer 2")
        tree.add_directory("other", "layer 2")
    finally:
        os.umask(old)
    modes = {
        str(path.relative_to(directory)): path.stat().st_mode & 0o7777
        for path in directory.rglob("*")
    }
    assert modes == {
        "a": 0o644,
        "sub": 0o755,
        "sub/b": 0o644,
        "sub/deep": 0o755,
        "sub/deep/c": 0o644,
        "other": 0o755,
    }
    assert len(tree) == len(modes)


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        ("a", "a", "'a' already exists, from layer 1"),
        ("a/b", "a/b", "'a/b' already exists"),
        ("README.md", "readme.md", "case"),
        ("A/x", "a/y", "'a' and 'A' of layer 1 are the same path"),
        ("a/X/y", "a/x/z", "case"),
        ("caf\u00e9", "cafe\u0301", "accents"),
        ("Stra\u00dfe", "STRASSE", "case"),
        ("a/b", "a", "'a' is a file here and a directory in layer 1"),
        ("a", "a/b", "'a' is a directory here and a file in layer 1"),
        ("a", "A/b", "case"),
        ("a/b", "a/b/c/d", "'a/b' is a directory here"),
    ],
)
def test_two_files_on_one_path(tree: Tree, first: str, second: str, problem: str) -> None:
    write(tree, first)
    with pytest.raises(UnsafePathError, match="layer 2: ") as caught:
        write(tree, second, "layer 2")
    assert problem in str(caught.value)


def test_directory_where_a_file_is(tree: Tree) -> None:
    write(tree, "a")
    with pytest.raises(UnsafePathError, match="'a' is a directory here and a file in layer 1"):
        tree.add_directory("a", "layer 2")
    tree.add_directory("b", "layer 1")
    with pytest.raises(UnsafePathError, match="'b' is a file here and a directory in layer 1"):
        write(tree, "b", "layer 2")


@pytest.mark.parametrize(
    "path", ["", ".", "..", "../x", "/x", "a/../b", "a//b", "a/", "C:x", "a\\b", "a\0b", "x" * 256]
)
@pytest.mark.scenario(23)
def test_unsafe_path(tree: Tree, path: str) -> None:
    with pytest.raises(UnsafePathError):
        write(tree, path)
    with pytest.raises(UnsafePathError):
        tree.add_directory(path, "layer 1")
    assert len(tree) == 0


def test_depth_is_limited(tree: Tree) -> None:
    write(tree, "/".join(["d"] * MAX_DEPTH))
    with pytest.raises(UnsafePathError, match="65 components"):
        write(tree, "/".join(["d"] * (MAX_DEPTH + 1)))


def test_a_file_that_failed_is_not_taken(tree: Tree) -> None:
    with pytest.raises(ZeroDivisionError), tree.place("a", "layer 1"):
        raise ZeroDivisionError
    write(tree, "a")


@pytest.mark.parametrize("planted", ["link", "file", "directory"])
@pytest.mark.parametrize("path", ["x", "sub/x", "sub/deep/x"])
@pytest.mark.scenario(24)
def test_planted_before_a_file(tree: Tree, directory: Path, planted: str, path: str) -> None:
    """Another process plants a link to an outside file at the path of a new file."""
    write(tree, "sub/deep/ours")
    secret = directory.parent.parent / "secret"
    if planted == "link":
        (directory / path).symlink_to(secret)
    elif planted == "file":
        (directory / path).hardlink_to(secret)
    else:
        (directory / path).mkdir()
    with pytest.raises(UnsafePathError, match="another process changed it"):
        write(tree, path, content=b"overwritten")
    assert secret.read_bytes() == b"not yours"


@pytest.mark.parametrize("name", ["new", "sub", "sub/deep"])
@pytest.mark.scenario(24)
def test_planted_in_place_of_a_directory(tree: Tree, directory: Path, name: str) -> None:
    """Another process replaces an existing or new directory by a link."""
    write(tree, "sub/deep/ours")
    outside = directory.parent.parent
    if name != "new":
        shutil.rmtree(directory / name)
    (directory / name).symlink_to(outside, target_is_directory=True)
    with pytest.raises(UnsafePathError, match="another process changed it"):
        write(tree, f"{name}/planted")
    with pytest.raises(UnsafePathError, match="another process changed it"):
        tree.add_directory(f"{name}/planted", "layer 1")
    assert not (outside / "planted").exists()


def test_directory_that_is_moved_away(tree: Tree, directory: Path) -> None:
    """The root is open: files are created in it, even if its path now leads elsewhere."""
    write(tree, "a")
    moved = directory.with_name("moved")
    directory.rename(moved)
    directory.symlink_to(directory.parent.parent, target_is_directory=True)
    write(tree, "b")
    assert sorted(os.listdir(moved)) == ["a", "b"]
    directory.unlink()
    moved.rename(directory)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a", "A", True),
        ("\u00e9", "e\u0301", True),
        ("\u00c9", "e\u0301", True),
        ("\u1e9e", "ss", True),
        ("\u03c3", "\u03c2", True),
        ("a", "b", False),
        ("\ufb01", "fi", True),
        ("\u00b2", "2", False),
    ],
)
def test_folded(one: str, other: str, same: bool) -> None:
    assert (folded(one) == folded(other)) is same
