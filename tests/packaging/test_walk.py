"""Walking a directory: order, skipped entries, links and special files."""

from __future__ import annotations

import inspect
import os
import random
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpack.builder import files
from modelpack.builder.files import Found, Skipped, hub_blobs, walk
from modelpack.errors import PackagingError
from tests.packaging.trees import as_nobody, write


def found(root: Path, *, follow_symlinks: bool = False) -> list[str]:
    seen = walk(root, follow_symlinks=follow_symlinks)
    return [entry.filepath for entry in seen if isinstance(entry, Found)]


def skipped(root: Path) -> list[tuple[str, str]]:
    seen = walk(root, follow_symlinks=False)
    return [(entry.path, entry.reason) for entry in seen if isinstance(entry, Skipped)]


def test_a_directory_stands_at_its_own_place(tmp_path: Path) -> None:
    names = ["a/x", "a/b/y", "a-b", "a.txt", "a0", "A", "Z", "_", "a b", "10", "9", "é", "z/.k/x"]
    write(tmp_path, dict.fromkeys(names, b""))
    expected = ["10", "9", "A", "Z", "_", "a/b/y", "a/x", "a b", "a-b", "a.txt", "a0", "é"]
    assert found(tmp_path) == expected


def test_what_is_skipped_is_reported(tmp_path: Path) -> None:
    names = [
        ".git/config",
        ".hidden",
        "a/.cache/x",
        "a/__pycache__/m.pyc",
        "a/m.py",
        "b/__pycache__",
    ]
    write(tmp_path, dict.fromkeys(names, b""))
    assert found(tmp_path) == ["a/m.py", "b/__pycache__"]
    assert [path for path, _ in skipped(tmp_path)] == [
        ".git",
        ".hidden",
        "a/.cache",
        "a/__pycache__",
    ]
    assert all(reason for _, reason in skipped(tmp_path))


names = st.text("aAb.-_é漢 \udcff&", min_size=1, max_size=3).filter(lambda n: n not in (".", ".."))
trees: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.dictionaries(names, st.just(b""), max_size=4),
    lambda inner: st.dictionaries(names | st.just("__pycache__"), st.just(b"") | inner, max_size=4),
    max_leaves=12,
)


def expected_order(tree: dict[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for name in sorted(tree, key=os.fsencode):
        if name.startswith("."):
            continue
        if not isinstance(tree[name], dict):
            paths.append(prefix + name)
        elif name != "__pycache__":
            paths += expected_order(tree[name], f"{prefix}{name}/")
    return paths


def make(root: Path, tree: dict[str, Any], order: random.Random) -> None:
    for name in order.sample(list(tree), len(tree)):
        if isinstance(tree[name], dict):
            (root / name).mkdir()
            make(root / name, tree[name], order)
        else:
            (root / name).write_bytes(tree[name])


@settings(deadline=None)  # the disk and the machine are shared
@given(trees, st.randoms())
def test_order_is_that_of_a_plain_model(tree: dict[str, Any], order: random.Random) -> None:
    with tempfile.TemporaryDirectory() as directory:
        make(Path(directory), tree, order)
        assert found(Path(directory)) == expected_order(tree)


def test_links_inside_are_followed(tmp_path: Path) -> None:
    write(tmp_path, {"real/x": b"x", "y": b"y", ".store/z": b"z"})
    (tmp_path / "a").symlink_to("real/x")
    (tmp_path / "b").symlink_to(tmp_path / "y")
    (tmp_path / "c").symlink_to("real")
    (tmp_path / "d").symlink_to(".store/z")
    (tmp_path / "real" / "e").symlink_to("../a")
    assert found(tmp_path) == ["a", "b", "c/e", "c/x", "d", "real/e", "real/x", "y"]


def test_a_linked_root_is_followed(tmp_path: Path) -> None:
    write(tmp_path, {"real/x": b"x"})
    (tmp_path / "real" / "y").symlink_to("x")
    (tmp_path / "link").symlink_to("real")
    assert found(tmp_path / "link") == ["x", "y"]


@pytest.mark.parametrize("target", ["../outside/secret", "/etc/hostname", "../outside"])
def test_links_to_the_outside_are_refused(tmp_path: Path, target: str) -> None:
    write(tmp_path, {"outside/secret": b"s", "m/x": b"x"})
    link = tmp_path / "m" / "sub" / "link"
    link.parent.mkdir()
    link.symlink_to(target if target.startswith("/") else f"../{target}")
    with pytest.raises(PackagingError, match="outside the directory") as caught:
        found(tmp_path / "m")
    assert str(link) in caught.value.message
    assert os.path.realpath(link) in caught.value.message
    assert "--follow-symlinks" in (caught.value.hint or "")
    assert "x" in found(tmp_path / "m", follow_symlinks=True)
    assert any("sub/link" in path for path in found(tmp_path / "m", follow_symlinks=True))


def test_a_link_out_by_way_of_the_inside_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"m/x": b"x", "secret": b"s"})
    (tmp_path / "m" / ".hop").symlink_to("../secret")
    (tmp_path / "m" / "link").symlink_to(".hop")
    with pytest.raises(PackagingError, match="secret"):
        found(tmp_path / "m")


def test_a_directory_whose_name_starts_the_same_is_outside(tmp_path: Path) -> None:
    write(tmp_path, {"m/x": b"x", "m-secret/y": b"y"})
    (tmp_path / "m" / "link").symlink_to("../m-secret/y")
    with pytest.raises(PackagingError, match="outside"):
        found(tmp_path / "m")


def hub_snapshot(tmp_path: Path) -> Path:
    repository = tmp_path / "hub" / "models--org--name"
    write(repository, {"blobs/aaa": b"w", "blobs/bbb": b"c", "refs/main": b"rev"})
    snapshot = repository / "snapshots" / "rev"
    (snapshot / "sub").mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/aaa")
    (snapshot / "sub" / "config.json").symlink_to("../../../blobs/bbb")
    return snapshot


def test_a_hugging_face_snapshot(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    assert found(snapshot) == ["model.safetensors", "sub/config.json"]
    assert found(snapshot / "sub") == ["config.json"]
    (tmp_path / "link").symlink_to(snapshot)
    assert found(tmp_path / "link") == ["model.safetensors", "sub/config.json"]


def test_a_snapshot_reaches_its_own_blobs_only(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    write(tmp_path / "hub" / "models--org--other", {"blobs/ccc": b"o"})
    (snapshot / "x").symlink_to("../../../models--org--other/blobs/ccc")
    with pytest.raises(PackagingError, match="models--org--other"):
        found(snapshot)


def test_linked_blobs_do_not_open_a_way_out(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PackagingError, match="outside"):
        found(snapshot)


@pytest.mark.parametrize(
    ("real", "blobs"),
    [
        ("/h/models--o--n/snapshots/r", "/h/models--o--n/blobs"),
        ("/h/models--o--n/snapshots/r/a/b", "/h/models--o--n/blobs"),
        ("/h/models--o--n/snapshots", None),
        ("/h/models--o--n", None),
        ("/h/datasets--o--n/snapshots/r", None),
        ("/snapshots/r", None),
        ("/", None),
    ],
)
def test_blobs_of_a_snapshot(real: str, blobs: str | None) -> None:
    assert hub_blobs(real) == blobs


def refused_entries(root: Path) -> dict[str, str]:
    """Make an entry of a kind that cannot be packaged; return the expected message."""
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
    (root / "dangling").symlink_to("nothing")
    (root / "self").symlink_to("self")
    (root / "up").symlink_to(".")
    (root / "device").symlink_to("/dev/null")
    return {
        "fifo": "is a FIFO",
        "socket": "is a socket",
        "dangling": "link to nothing, which cannot be followed: No such file",
        "self": "cannot be followed: Too many levels",
        "up": "would never end",
        "device": "/dev/null",
    }


@pytest.mark.parametrize("name", ["fifo", "socket", "dangling", "self", "up", "device"])
def test_refused_entries(name: str) -> None:
    with tempfile.TemporaryDirectory() as directory:  # short, since socket paths are limited
        root = Path(directory)
        says = refused_entries(root)
        for other in says:
            if other != name:
                (root / other).unlink()
        with pytest.raises(PackagingError) as caught:
            found(root)
        assert says[name] in caught.value.message
        assert str(root / name) in caught.value.message


def test_a_device_is_refused_even_when_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "device").symlink_to("/dev/null")
    with pytest.raises(PackagingError, match="is a device"):
        found(tmp_path, follow_symlinks=True)


def test_a_loop_through_two_directories(tmp_path: Path) -> None:
    write(tmp_path, {"a/x": b"", "b/y": b""})
    (tmp_path / "a" / "b").symlink_to("../b")
    (tmp_path / "b" / "a").symlink_to("../a")
    with pytest.raises(PackagingError, match="never end") as caught:
        found(tmp_path)
    assert str(tmp_path / "a" / "b" / "a") in caught.value.message


def test_unreadable_directories_are_named(open_dir: Path) -> None:
    write(open_dir, {"ok/x": b"", "closed/y": b""})
    (open_dir / "closed").chmod(0)
    with as_nobody(), pytest.raises(PackagingError, match="Permission denied") as caught:
        found(open_dir)
    assert str(open_dir / "closed") in caught.value.message


def test_paths_longer_than_the_system_takes(tmp_path: Path) -> None:
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(25):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
    finally:
        os.chdir(here)
    with pytest.raises(PackagingError, match="File name too long"):
        found(tmp_path)


def test_deep_directories_do_not_exhaust_the_stack(tmp_path: Path) -> None:
    path = tmp_path
    for _ in range(300):
        path = path / "d"
        path.mkdir()
    (path / "x").touch()
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 150)
    try:
        assert found(tmp_path) == ["d/" * 300 + "x"]
    finally:
        sys.setrecursionlimit(before)


def test_links_cannot_multiply_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ENTRIES", 50)
    for i in range(9):
        (tmp_path / f"d{i}").mkdir()
        for name in "ab":
            (tmp_path / f"d{i}" / name).symlink_to(f"../d{i + 1}")
    (tmp_path / "d9").mkdir()
    with pytest.raises(PackagingError, match="more than 50 entries"):
        found(tmp_path)


def test_names_for_terminals_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "a\x1b[31m\udcff").symlink_to("nothing")
    with pytest.raises(PackagingError, match=r"a\\x1b\[31m\\xff") as caught:
        found(tmp_path)
    assert caught.value.message.isprintable()
