"""A new directory appears complete under its name, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelpack.bundles import directory as bundle_directory
from modelpack.bundles.directory import Folder, new_directory
from modelpack.errors import ConflictError, UsageError


def nothing() -> None:
    """Do nothing before the directory is published."""


def fail() -> None:
    raise ZeroDivisionError


def make(
    directory: Path,
    *,
    overwrite: bool = False,
    name: str = "new",
    then: Callable[[], None] = nothing,
) -> None:
    with new_directory(directory, overwrite=overwrite) as folder:
        os.close(folder.create(name))
        with folder.make("sub") as sub:
            os.close(sub.create("deep"))
        then()


def test_new(directory: Path) -> None:
    make(directory)
    assert sorted(os.listdir(directory)) == ["new", "sub"]
    assert directory.stat().st_mode & 0o7777 == 0o755


def test_nothing_is_there_before_the_end(directory: Path) -> None:
    seen = []
    make(directory, then=lambda: seen.append(directory.exists()))
    assert seen == [False]


def test_parents_are_made(directory: Path) -> None:
    make(directory / "a" / "b")
    assert sorted(os.listdir(directory / "a" / "b")) == ["new", "sub"]


def test_failure_leaves_nothing(directory: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        make(directory / "a" / "b", then=fail)
    assert not directory.exists()


def test_interrupt_leaves_nothing(directory: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(directory, then=interrupt)
    assert os.listdir(directory.parent) == []


def test_parents_that_somebody_uses_stay(directory: Path) -> None:
    def use_and_fail() -> None:
        (directory / "theirs").touch()
        fail()

    with pytest.raises(ZeroDivisionError):
        make(directory / "a" / "b", then=use_and_fail)
    assert os.listdir(directory) == ["theirs"]


def test_empty_directory_is_taken(directory: Path) -> None:
    directory.mkdir()
    make(directory)
    assert sorted(os.listdir(directory)) == ["new", "sub"]


def test_full_directory_is_refused(directory: Path) -> None:
    directory.mkdir()
    (directory / "old").touch()
    with pytest.raises(ConflictError, match="not empty"):
        make(directory, then=fail)  # rejected before `fail` runs
    assert os.listdir(directory) == ["old"]


def test_directory_that_fills_meanwhile_is_refused(directory: Path) -> None:
    def fill() -> None:
        directory.mkdir()
        (directory / "theirs").touch()

    with pytest.raises(ConflictError, match="not empty"):
        make(directory, then=fill)
    assert os.listdir(directory) == ["theirs"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_what_is_no_directory_is_refused(
    directory: Path, kind: str, late: bool, overwrite: bool
) -> None:
    def plant() -> None:
        if kind == "file":
            directory.write_bytes(b"theirs")
        else:
            target = directory.parent.parent if kind == "link" else "nowhere"
            directory.symlink_to(target, target_is_directory=True)

    if not late:
        plant()
    with pytest.raises(ConflictError):
        make(directory, overwrite=overwrite, then=plant if late else nothing)
    assert os.path.lexists(directory)
    assert directory.is_symlink() == (kind != "file")


@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "two steps"])
def test_overwrite(directory: Path, monkeypatch: Any, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(bundle_directory, "_EXCHANGE", {})
    make(directory, name="old")
    (directory / "link").symlink_to(directory.parent.parent / "secret")
    make(directory, overwrite=True)
    assert sorted(os.listdir(directory)) == ["new", "sub"]
    assert os.listdir(directory.parent) == ["bundle"]


def test_overwrite_what_is_not_there(directory: Path) -> None:
    make(directory, overwrite=True)
    assert sorted(os.listdir(directory)) == ["new", "sub"]


def test_failed_overwrite_keeps_the_old(directory: Path) -> None:
    make(directory, name="old")
    with pytest.raises(ZeroDivisionError):
        make(directory, overwrite=True, then=fail)
    assert sorted(os.listdir(directory)) == ["old", "sub"]
    assert os.listdir(directory.parent) == ["bundle"]


def test_failed_second_step_keeps_the_old(directory: Path, monkeypatch: Any) -> None:
    make(directory, name="old")
    monkeypatch.setattr(bundle_directory, "_EXCHANGE", {})
    rename, calls = bundle_directory._rename, []

    def fail_second(parent: Folder, old: str, new: str) -> None:
        calls.append(new)
        if len(calls) == 3:  # rename directly; move the old directory aside; rename the new one
            raise PermissionError(13, "no")
        rename(parent, old, new)

    monkeypatch.setattr(bundle_directory, "_rename", fail_second)
    with pytest.raises(PermissionError):
        make(directory, overwrite=True)
    assert sorted(os.listdir(directory)) == ["old", "sub"]
    assert os.listdir(directory.parent) == ["bundle"]
    assert len(calls) == 4


@pytest.mark.parametrize("text", ["/", ".", "../here", "..", "../../above"])
def test_places_that_cannot_be_replaced(tmp_path: Path, monkeypatch: Any, text: str) -> None:
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    with pytest.raises(UsageError):
        make(Path(text), overwrite=True)
    assert os.listdir(here) == []
    assert os.listdir(here.parent) == ["here"]


def test_a_place_can_be_replaced_from_a_deleted_directory(
    tmp_path: Path, monkeypatch: Any, directory: Path
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    here.rmdir()
    make(directory)
    make(directory, overwrite=True, name="newer")
    assert sorted(os.listdir(directory)) == ["newer", "sub"]


@pytest.mark.parametrize("text", ["out", "./out", "sub/../out", "../here/out"])
def test_relative_directory(tmp_path: Path, monkeypatch: Any, text: str) -> None:
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    monkeypatch.chdir(here)
    make(Path(text))
    assert sorted(os.listdir(here / "out")) == ["new", "sub"]


def test_link_above_the_directory_is_followed(directory: Path) -> None:
    directory.mkdir()
    (directory / "real").mkdir()
    (directory / "link").symlink_to("real")
    make(directory / "link" / "out")
    assert sorted(os.listdir(directory / "real" / "out")) == ["new", "sub"]
