"""Models as tar archives: export, import, and invalid archives."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.operations.archives import archive_of, import_archive
from modelpack.storage import watching
from modelpack.store.layout import LayoutStore
from tests.engine.families.runner.conftest import Runner
from tests.unpacking.tars import END, file, gnu_sparse


def archive(entries: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, content in entries.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.size = kind, len(content)
            entry.linkname = "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            tar.addfile(entry, io.BytesIO(content))
    return made.getvalue()


def test_what_is_exported_can_be_loaded(runner: Runner) -> None:
    response = runner.http.get("/models/ai/tiny:latest/export")
    assert response.headers["content-type"] == "application/x-tar"
    assert response.headers["content-disposition"] == 'attachment; filename="ai/tiny:latest.tar"'
    assert int(response.headers["content-length"]) == len(response.content)
    with tarfile.open(fileobj=io.BytesIO(response.content)) as tar:
        names = tar.getnames()
        assert names[:2] == ["blobs", "blobs/sha256"]
        assert names[-1] == "manifest.json"
    removed = runner.http.delete("/models/tiny").json()

    def pieces() -> Iterator[bytes]:  # chunked, in pieces that split every field
        for start in range(0, len(response.content), 700):
            yield response.content[start : start + 700]

    loaded = runner.http.post(
        "/models/load", content=pieces(), headers={"Content-Type": "application/x-tar"}
    )
    assert loaded.status_code == 200
    assert "Model loaded successfully" in loaded.text
    [model] = runner.http.get("/models").json()
    assert "tags" not in model
    assert {"Deleted": model["id"]} in removed
    again = runner.http.post("/models/load", content=response.content)
    assert again.status_code == 200


def test_safetensors_with_several_layers(tmp_path: Path) -> None:
    from tests.models import tiny_safetensors

    one, two = LayoutStore(tmp_path / "one"), LayoutStore(tmp_path / "two")
    request = modelpack.PackageRequest(safetensors_dir=tiny_safetensors(tmp_path))
    made = modelpack.package("ai/t", request, store=one)
    written = archive_of(one, ["ai/t"], watching(None), form="docker")
    size, pieces = written.size, written.pieces
    content = b"".join(pieces)
    assert len(content) == size
    [imported] = import_archive(two, io.BytesIO(content), watching(None))
    assert imported.digest == made.digest
    assert two.get(str(made.digest)).references == ()


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 400, "not a valid tar archive"),
        (b"not a tar at all" * 100, 400, "not a valid tar archive"),
        (archive({"blobs/sha256/zz": b"x"}), 400, "is not a blob"),
        (archive({"blobs/sha256/" + "0" * 64: b"x"}), 400, "0000"),
        (archive({"../blobs/sha256/" + "0" * 64: b"x"}), 400, "which leaves it"),
        (archive({"manifest.json": b"{}"}), 400, "manifest.json"),
        (archive({"manifest.json": b""}, tarfile.SYMTYPE), 400, "a symbolic link"),
        (archive({"readme/me": b"x"}), 400, "no manifest.json"),
    ],
    ids=["empty", "text", "digest", "wrong", "outside", "manifest", "link", "none"],
)
def test_what_is_no_model(shared: Runner, content: bytes, status: int, words: str) -> None:
    response = shared.http.post("/models/load", content=content)
    assert response.status_code == status, response.text
    assert words in response.text
    assert len(shared.http.get("/models").json()) == 1


def test_an_archive_that_is_cut_short_leaves_no_model(runner: Runner) -> None:
    content = runner.http.get("/models/tiny/export").content
    runner.http.delete("/models/tiny")
    for cut in (600, len(content) // 2):
        assert runner.http.post("/models/load", content=content[:cut]).status_code == 400
    assert runner.http.get("/models").json() == []


def test_a_bomb_leaves_nothing(runner: Runner) -> None:
    """2,560 bytes that claim 3 GiB, after a complete blob."""
    first, zeros = b"first", f"blobs/sha256/{'0' * 64}".encode()
    blobs = runner.store.root / "blobs" / "sha256"
    before = sorted(path.name for path in blobs.iterdir())
    name = f"blobs/sha256/{Digest.of(first).encoded}".encode()
    bomb = file(name, first) + gnu_sparse(zeros, 3 << 30) + END
    response = runner.http.post("/models/load", content=bomb)
    assert response.status_code == 422, response.text
    assert "is a sparse file" in response.text
    assert sorted(path.name for path in blobs.iterdir()) == before
    assert not [*(runner.store.root / "ingest").glob("import-*")]
