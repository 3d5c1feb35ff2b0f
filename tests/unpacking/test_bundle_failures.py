"""Failures while laying out a bundle leave no files and change nothing outside."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.model import Model
from modelpack.bundles.bundle import Bundle, lay_out
from modelpack.bundles.directory import Folder
from modelpack.errors import (
    ConflictError,
    InterruptedTransferError,
    NotFoundError,
    SizeMismatchError,
    StorageFullError,
    StoreError,
    UnsafePathError,
    UsageError,
)
from modelpack.progress import Progress, Stop, silent
from modelpack.storage import Watch
from tests.unpacking.laid_out import DIRECTORY, WEIGHT, bundle_of
from tests.unpacking.stored import Stored, contents

V01, V02 = media_types.DOCKER_CONFIG_V01, media_types.DOCKER_CONFIG_V02


def test_stop(stored: Stored, directory: Path) -> None:
    stop = Stop()
    watch = Watch(lambda _: stop.request(), stop)
    with pytest.raises(InterruptedTransferError):
        bundle_of(stored, directory, DIRECTORY, watch=watch)
    assert not directory.exists()


def test_again_is_refused_and_overwrite_replaces(stored: Stored, directory: Path) -> None:
    bundle_of(stored, directory, DIRECTORY)
    with pytest.raises(ConflictError, match="not empty"):
        bundle_of(stored, directory, [WEIGHT])
    assert (directory / "model/model.safetensors").exists()
    bundle = bundle_of(stored, directory, [WEIGHT], overwrite=True)
    assert set(contents(directory)) == {"config.json", "model/tiny.gguf"}
    assert bundle.weight.read_bytes() == b"weights"
    assert os.listdir(directory.parent) == ["bundle"]


@pytest.mark.scenario(24)
def test_links_in_what_is_replaced_are_not_followed(stored: Stored, directory: Path) -> None:
    outside = directory.parent.parent
    directory.mkdir()
    (directory / "model").symlink_to(outside, target_is_directory=True)
    (directory / "config.json").symlink_to(outside / "secret")
    with pytest.raises(ConflictError):
        bundle_of(stored, directory, [WEIGHT])
    bundle_of(stored, directory, [WEIGHT], overwrite=True)
    assert not (directory / "model").is_symlink()
    assert (directory / "config.json").read_bytes() == b"{}\n"


def test_a_link_instead_of_the_directory_is_refused(stored: Stored, directory: Path) -> None:
    directory.symlink_to(directory.parent.parent, target_is_directory=True)
    with pytest.raises(ConflictError, match="not a directory") as caught:
        bundle_of(stored, directory, [WEIGHT], overwrite=True)
    assert "symbolic link" in (caught.value.hint or "")


@pytest.mark.parametrize("planted", ["model", "model/sub", "model/sub/README.md", "config.json"])
@pytest.mark.scenario(24)
def test_links_planted_while_we_work_are_not_followed(
    stored: Stored, directory: Path, planted: str
) -> None:
    """A process with write access replaces a created entry by a link to the outside."""
    outside = directory.parent.parent
    planting: list[str] = []

    def plant(report: Progress) -> None:
        if report.name != "sub/first" or planting:
            return
        (work,) = directory.parent.iterdir()
        planting.append(planted)
        target = outside if planted != "config.json" else outside / "secret"
        if planted in ("model", "model/sub"):
            (work / planted).rename(outside.parent / "moved")
        (work / planted).symlink_to(target)

    layers = [WEIGHT, (media_types.DOCKER_MODEL_FILE, "sub/first", b"1"), DIRECTORY[-1]]
    with pytest.raises(UnsafePathError, match="another process changed it"):
        bundle_of(stored, directory, layers, watch=Watch(plant, Stop()))
    assert planting
    assert not (outside / "sub").exists()
    assert not (outside / "README.md").exists()
    assert not directory.exists()


@pytest.mark.parametrize("path", ["../../x", "/abs", "a\0b", "C:\\x", "", ".", "a/../../b"])
@pytest.mark.parametrize("config", [V01, V02])
@pytest.mark.scenario(23)
def test_unsafe_paths(stored: Stored, directory: Path, config: str, path: str) -> None:
    with pytest.raises(UnsafePathError):
        bundle_of(stored, directory, [WEIGHT, (media_types.DOCKER_MODEL_FILE, path, b"x")], config)
    assert not directory.exists()


@pytest.mark.parametrize(
    ("first", "second"), [("a", "a/b"), ("a/b", "a"), ("A/x", "a/y"), ("a", "A")]
)
def test_clashing_paths(stored: Stored, directory: Path, first: str, second: str) -> None:
    layers = [
        WEIGHT,
        (media_types.DOCKER_MODEL_FILE, first, b"1"),
        (media_types.DOCKER_MODEL_FILE, second, b"2"),
    ]
    with pytest.raises(UnsafePathError):
        bundle_of(stored, directory, layers)
    assert not directory.exists()


@pytest.mark.parametrize("lost", [True, False])
def test_store_that_lost_a_blob(stored: Stored, directory: Path, lost: bool) -> None:
    model = stored.model(DIRECTORY)
    blob = stored.path(model.manifest.layers[-1])
    blob.unlink()
    if not lost:
        blob.write_bytes(b"#")
    with pytest.raises(NotFoundError if lost else SizeMismatchError):
        lay_out(model, stored.path, directory)
    assert not directory.exists()


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, StorageFullError),
        (errno.EDQUOT, StorageFullError),
        (errno.EROFS, StoreError),
        (errno.EIO, StoreError),
    ],
)
def test_what_the_file_system_refuses(
    stored: Stored,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    error: type[StoreError],
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Folder, "create", refuse)
    with pytest.raises(error, match=f"cannot lay out {directory}") as caught:
        bundle_of(stored, directory, [WEIGHT])
    assert type(caught.value) is error
    assert not directory.exists()


def test_places_that_cannot_be_a_bundle(stored: Stored, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError):
        bundle_of(stored, tmp_path / "file" / "sub", [WEIGHT])
    with pytest.raises(ConflictError):
        bundle_of(stored, tmp_path / "file", [WEIGHT], overwrite=True)
    with pytest.raises(UsageError):
        bundle_of(stored, Path("/"), [WEIGHT], overwrite=True)


def test_the_current_directory_is_not_replaced(
    stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(UsageError, match="current directory"):
        bundle_of(stored, Path(), [WEIGHT])


def test_paths_are_absolute(
    stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = bundle_of(stored, Path("out"), [WEIGHT])
    assert bundle.weight == tmp_path / "out/model/tiny.gguf"


def test_a_link_to_the_store_survives_the_store(stored: Stored, directory: Path) -> None:
    model: Model = stored.model([WEIGHT])
    bundle = lay_out(model, stored.path, directory)
    stored.path(model.manifest.layers[0]).unlink()
    assert bundle.weight.read_bytes() == b"weights"


def test_blobs_may_be_asked_for_more_than_once(stored: Stored, directory: Path) -> None:
    asked: list[Digest] = []

    def path(descriptor: Any) -> Path:
        asked.append(descriptor.digest)
        return stored.path(descriptor)

    layers = [(media_types.DOCKER_SAFETENSORS, f"{name}.safetensors", b"same") for name in "ab"]
    lay: Callable[..., Bundle] = lay_out
    lay(stored.model(layers), path, directory, watch=Watch(silent, Stop()))
    assert set(contents(directory / "model")) == {"a.safetensors", "b.safetensors"}
    assert asked == [Digest.of(b"same")] * 2
