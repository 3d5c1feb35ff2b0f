"""Every operation that reads or writes whole files reports the bytes of the weights."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

import modelpack
from modelpack.builder.request import PackageRequest
from modelpack.bundles.links import LinkMode
from modelpack.operations import archives
from modelpack.operations.convert import convert
from modelpack.operations.docker import export_to_docker, import_from_docker
from modelpack.operations.package import package
from modelpack.progress import Action, Progress, ProgressCallback
from modelpack.storage import watching
from modelpack.store.docker_store import DockerStore
from modelpack.store.layout import LayoutStore
from tests.models import tiny_gguf

NAME = "team/tiny:v1"
Run = Callable[[LayoutStore, Path, ProgressCallback], object]


def hashes_only(store: LayoutStore, here: Path, progress: ProgressCallback) -> object:
    request = PackageRequest(gguf=tiny_gguf(here))
    return package("a/b", request, dry_run=True, store=store, progress=progress)


def exports(store: LayoutStore, here: Path, progress: ProgressCallback, link: bool) -> object:
    docker = DockerStore(here / "docker", create=True)
    return export_to_docker([NAME], docker=docker, store=store, link=link, progress=progress)


def imports_from_docker(store: LayoutStore, here: Path, progress: ProgressCallback) -> object:
    exports(store, here, lambda _: None, link=False)
    docker, other = DockerStore(here / "docker"), LayoutStore(here / "other")
    return import_from_docker([NAME], docker=docker, store=other, link=False, progress=progress)


def archived(store: LayoutStore, progress: ProgressCallback | None) -> bytes:
    return b"".join(archives.archive_of(store, [NAME], watching(progress)).pieces)


def imports_archive(store: LayoutStore, here: Path, progress: ProgressCallback) -> object:
    other, stream = LayoutStore(here / "other"), BytesIO(archived(store, None))
    return archives.import_archive(other, stream, watching(progress))


OPERATIONS: dict[str, Run] = {
    "package --dry-run": hashes_only,
    "package": lambda store, here, progress: package(
        "a/b", PackageRequest(gguf=tiny_gguf(here)), store=LayoutStore(here / "x"),
        progress=progress,
    ),
    "package --link": lambda store, here, progress: package(
        "a/b", PackageRequest(gguf=tiny_gguf(here)), store=LayoutStore(here / "x"), link=True,
        progress=progress,
    ),
    "convert --to image": lambda store, here, progress: convert(
        NAME, "a/image:v1", to="image", store=store, progress=progress
    ),
    "bundle": lambda store, here, progress: modelpack.bundle(
        NAME, here / "bundle", links=LinkMode.COPY, store=store, progress=progress
    ),
    "fsck": lambda store, here, progress: store.fsck(watch=watching(progress)),
    "export --docker-store": lambda store, here, progress: exports(store, here, progress, True),
    "export --docker-store --copy": lambda store, here, progress: exports(
        store, here, progress, False
    ),
    "import --docker-store --copy": imports_from_docker,
    "export": lambda store, here, progress: archived(store, progress),
    "import": imports_archive,
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_progress_of_the_weights(tmp_path: Path, name: str) -> None:
    store = LayoutStore(tmp_path / "store")
    gguf = tiny_gguf(tmp_path)
    package(NAME, PackageRequest(gguf=gguf), store=store)
    reports: list[Progress] = []
    OPERATIONS[name](store, tmp_path, reports.append)
    size = gguf.stat().st_size
    done = [one for one in reports if one.action not in (Action.NOTE, Action.SKIP)]
    assert any(one.completed >= size and (one.total or 0) >= size for one in done), reports
