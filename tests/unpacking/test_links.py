"""Links to the store: shared and copied files, and blobs missing in the store."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.model import ModelFile
from modelpack.bundles.directory import Folder
from modelpack.bundles.links import LinkMode, Placement, put
from modelpack.errors import (
    DigestMismatchError,
    InterruptedTransferError,
    NotFoundError,
    SizeMismatchError,
    StoreError,
)
from modelpack.progress import Progress, Stop, silent
from modelpack.storage import Watch
from tests.unpacking.stored import Stored

CONTENT = b"weights" * 1000


@pytest.fixture
def file(stored: Stored) -> ModelFile:
    return stored.model([(media_types.DOCKER_GGUF, "x.gguf", CONTENT)]).files()[0]


@pytest.fixture
def blob(stored: Stored, file: ModelFile) -> Path:
    return stored.path(file.descriptor)


def put_in(
    directory: Path, file: ModelFile, blob: Path, mode: LinkMode, watch: Watch | None = None
) -> Placement:
    directory.mkdir(exist_ok=True)
    with Folder.open(directory) as folder:
        return put(file, blob, folder, "x", mode, watch or Watch(silent, Stop()), [])


def refuse(number: int) -> Any:
    def refusing(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refusing


def clone(target: int, _request: int, source: int) -> None:
    """Copy a file like FICLONE, for file systems without it."""
    os.write(target, os.pread(source, 1 << 20, 0))


@pytest.mark.parametrize("mode", [LinkMode.AUTO, LinkMode.HARDLINK])
def test_hard_link(directory: Path, file: ModelFile, blob: Path, mode: LinkMode) -> None:
    assert put_in(directory, file, blob, mode) is Placement.HARDLINK
    assert (directory / "x").samefile(blob)
    assert (directory / "x").stat().st_mode & 0o7777 == 0o444


def test_hard_link_of_a_blob_that_is_a_link_is_one_of_its_target(
    directory: Path, file: ModelFile, blob: Path
) -> None:
    moved = blob.with_name("moved")
    blob.rename(moved)
    blob.symlink_to(moved)
    assert put_in(directory, file, blob, LinkMode.HARDLINK) is Placement.HARDLINK
    assert not (directory / "x").is_symlink()
    assert (directory / "x").samefile(moved)


def test_symbolic_link(
    directory: Path, file: ModelFile, blob: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(blob.parent)
    relative = Path(blob.name)
    assert put_in(directory, file, relative, LinkMode.SYMLINK) is Placement.SYMLINK
    assert os.readlink(directory / "x") == str(blob)


def test_copy(directory: Path, file: ModelFile, blob: Path) -> None:
    reports: list[Progress] = []
    watch = Watch(reports.append, Stop())
    assert put_in(directory, file, blob, LinkMode.COPY, watch) is Placement.COPY
    assert (directory / "x").read_bytes() == CONTENT
    assert not (directory / "x").samefile(blob)
    assert (directory / "x").stat().st_mode & 0o7777 == 0o644
    assert reports[-1].completed == reports[-1].total == len(CONTENT)


def test_reflink(directory: Path, file: ModelFile, blob: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(fcntl, "ioctl", clone)
    assert put_in(directory, file, blob, LinkMode.REFLINK) is Placement.REFLINK
    assert (directory / "x").read_bytes() == CONTENT
    assert not (directory / "x").samefile(blob)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_auto_falls_back(
    directory: Path, file: ModelFile, blob: Path, monkeypatch: Any, number: int
) -> None:
    monkeypatch.setattr(os, "link", refuse(number))
    monkeypatch.setattr(fcntl, "ioctl", clone)
    assert put_in(directory, file, blob, LinkMode.AUTO) is Placement.REFLINK
    (directory / "x").unlink()
    monkeypatch.setattr(fcntl, "ioctl", refuse(number))
    assert put_in(directory, file, blob, LinkMode.AUTO) is Placement.COPY
    assert (directory / "x").read_bytes() == CONTENT


@pytest.mark.parametrize("mode", [LinkMode.HARDLINK, LinkMode.REFLINK])
def test_what_was_asked_for_is_not_replaced_by_a_copy(
    directory: Path, file: ModelFile, blob: Path, monkeypatch: Any, mode: LinkMode
) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.EXDEV))
    monkeypatch.setattr(fcntl, "ioctl", refuse(errno.EOPNOTSUPP))
    with pytest.raises(StoreError, match=f"a {mode} of") as caught:
        put_in(directory, file, blob, mode)
    assert caught.value.hint
    assert os.listdir(directory) == []


@pytest.mark.parametrize("mode", [LinkMode.AUTO, LinkMode.REFLINK])
def test_full_disk_is_not_a_reason_to_copy(
    directory: Path, file: ModelFile, blob: Path, monkeypatch: Any, mode: LinkMode
) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.ENOSPC))
    monkeypatch.setattr(fcntl, "ioctl", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        put_in(directory, file, blob, mode)
    assert os.listdir(directory) == []


@pytest.mark.parametrize("mode", list(LinkMode))
def test_blob_that_is_lost(directory: Path, file: ModelFile, blob: Path, mode: LinkMode) -> None:
    blob.unlink()
    with pytest.raises(NotFoundError, match=str(file.descriptor.digest)):
        put_in(directory, file, blob, mode)


@pytest.mark.parametrize("mode", list(LinkMode))
@pytest.mark.parametrize("content", [b"", CONTENT[:-1], CONTENT + b"x"])
def test_blob_of_another_size(
    directory: Path, file: ModelFile, blob: Path, mode: LinkMode, content: bytes
) -> None:
    blob.unlink()
    blob.write_bytes(content)
    with pytest.raises(SizeMismatchError, match=f"has {len(content)} bytes, expected 7000"):
        put_in(directory, file, blob, mode)


@pytest.mark.parametrize("mode", list(LinkMode))
def test_blob_that_is_no_file(directory: Path, file: ModelFile, blob: Path, mode: LinkMode) -> None:
    blob.unlink()
    os.mkfifo(blob)
    with pytest.raises(StoreError, match="not a file"):
        put_in(directory, file, blob, mode)


def test_copy_shows_damage(directory: Path, file: ModelFile, blob: Path) -> None:
    blob.chmod(0o644)
    blob.write_bytes(b"W" + CONTENT[1:])
    with pytest.raises(DigestMismatchError) as caught:
        put_in(directory, file, blob, LinkMode.COPY)
    assert caught.value.expected == str(Digest.of(CONTENT))


def test_blob_that_is_replaced_while_it_is_linked(
    directory: Path, file: ModelFile, blob: Path, monkeypatch: Any
) -> None:
    link = os.link

    def replace_and_link(*arguments: Any, **options: Any) -> None:
        blob.unlink()
        blob.write_bytes(CONTENT)
        link(*arguments, **options)

    monkeypatch.setattr(os, "link", replace_and_link)
    with pytest.raises(StoreError, match="was replaced"):
        put_in(directory, file, blob, LinkMode.AUTO)


def test_copy_stops_on_request(directory: Path, file: ModelFile, blob: Path) -> None:
    stop = Stop()
    stop.request()
    with pytest.raises(InterruptedTransferError):
        put_in(directory, file, blob, LinkMode.COPY, Watch(silent, stop))
