"""Archives: exported models are imported unchanged, and broken archives leave nothing."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

import modelpack
from modelpack import errors
from modelpack.artifacts import media_types
from modelpack.operations.archives import Form, archive_of, import_archive
from modelpack.operations.index import NamedVariant, create_index
from modelpack.storage import watching
from tests.cli.running import modelpack as command
from tests.cli.running import succeed
from tests.models import store_of_two, tiny_gguf
from tests.peers import require

GGUF, ST = "docker.io/x/gguf:v1", "docker.io/x/st:v1"


@pytest.fixture
def store(tmp_path: Path) -> modelpack.Store:
    return store_of_two(tmp_path)


@pytest.fixture
def other(tmp_path: Path) -> modelpack.Store:
    return modelpack.Store(tmp_path / "other")


def archived(store: modelpack.Store, *names: str, form: Form = "oci") -> bytes:
    archive = archive_of(store, names, watching(None), form=form)
    raw = b"".join(archive.pieces)
    assert len(raw) == archive.size
    return raw


def read(store: modelpack.Store, raw: bytes, to: str | None = None) -> dict[str, str]:
    done = import_archive(store, io.BytesIO(raw), watching(None), to=to)
    return {str(one.reference): str(one.digest) for one in done}


def test_a_layout_brings_models_and_names(store: modelpack.Store, other: modelpack.Store) -> None:
    raw = archived(store, GGUF, ST)
    assert archived(store, GGUF, ST) == raw
    found = read(other, raw)
    assert found == {name: str(store.resolve(name).digest) for name in (GGUF, ST)}
    assert {str(r) for m in other.models() for r in m.references} == {GGUF, ST}
    assert other.fsck(watch=watching(None)).ok
    # All names of an id, and a new name for a single model.
    by_id = archived(store, store.resolve(GGUF).digest.short)
    assert list(read(other, by_id)) == [GGUF]
    assert list(read(other, by_id, to="my/own:v2")) == ["docker.io/my/own:v2"]


def test_docker_s_archive_brings_one_model(store: modelpack.Store, other: modelpack.Store) -> None:
    found = read(other, archived(store, ST, form="docker"))
    assert found == {"None": str(store.resolve(ST).digest)}
    with tarfile.open(fileobj=io.BytesIO(archived(store, ST, form="docker"))) as archive:
        names = archive.getnames()
    assert names[-1] == "manifest.json"
    assert all(name.startswith("blobs") for name in names[:-1])


def test_an_index_comes_with_its_variants(store: modelpack.Store, other: modelpack.Store) -> None:
    variants = [NamedVariant("gguf", GGUF), NamedVariant("st", ST)]
    made = create_index("x/all:v1", variants, store=store)
    assert read(other, archived(store, "x/all:v1")) == {"docker.io/x/all:v1": str(made.digest)}
    assert modelpack.inspect("x/all:v1", store=other).digest == store.resolve(GGUF).digest


@pytest.mark.peer("skopeo")
def test_skopeo_reads_and_writes_layouts(
    store: modelpack.Store, other: modelpack.Store, tmp_path: Path
) -> None:
    skopeo, ours, theirs = require("skopeo"), tmp_path / "ours.tar", tmp_path / "theirs.tar"
    ours.write_bytes(archived(store, GGUF, ST))
    source, target = f"oci-archive:{ours}:{GGUF}", f"oci-archive:{theirs}:v1"
    subprocess.run([skopeo, "copy", source, target], check=True, capture_output=True)
    digest = str(store.resolve(GGUF).digest)
    assert read(other, theirs.read_bytes()) == {"None": digest}
    assert read(other, theirs.read_bytes(), to="x/back:v1") == {"docker.io/x/back:v1": digest}


def test_on_the_command_line(
    store: modelpack.Store, other: modelpack.Store, tmp_path: Path
) -> None:
    path = tmp_path / "m.tar"
    digest = str(store.resolve(GGUF).digest)
    assert succeed("export", GGUF, "-o", path, "--store", store.root).out == digest
    assert succeed("import", path, "a/b:c", "--store", other.root).out == digest
    again = command("export", GGUF, "-o", path, "--store", store.root)
    assert (again.code, "give --force to replace it" in again.err) == (7, True)
    every = succeed("export", "--all", "-f", "-o", path, "--store", store.root, "--json").json
    assert len(every["digests"]) == 2
    streamed = succeed(
        "export", GGUF, "-o", "-", "--format", "docker", "--store", store.root
    ).stdout
    assert streamed == archived(store, GGUF, form="docker")
    assert not list(tmp_path.glob(".*.partial"))


def tar(*files: tuple[str, bytes]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        for name, raw in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    return target.getvalue()


def listing(**changes: object) -> bytes:
    entry = {"mediaType": media_types.OCI_MANIFEST, "digest": "sha256:" + "0" * 64, "size": 2}
    value = {"schemaVersion": 2, "manifests": [entry | changes]}
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda raw: raw[:3000], errors.ModelpackError, ""),
        (lambda raw: b"no tar at all" * 100, errors.FormatError, "not a valid tar archive"),
        (lambda raw: tar(("x", b"")), errors.ManifestError, "has no index.json and no manifest"),
        (lambda raw: tar(("index.json", b"{")), errors.ManifestError, "index.json"),
        (lambda raw: tar(("index.json", b" " * 5_000_000)), errors.ManifestError, "more than"),
        (lambda raw: tar(("manifest.json", b"[]")), errors.UnsupportedError, "`docker save`"),
        (lambda raw: tar(("index.json", listing())), errors.ManifestError, "but missing"),
        (lambda raw: tar(("index.json", listing(mediaType="a/b"))), errors.UnsupportedError,
         "expected a manifest"),
        (lambda raw: tar(("index.json", b'{"schemaVersion":2,"manifests":[]}')),
         errors.ManifestError, "lists no manifest"),
        (lambda raw: tar(("../blobs/sha256/" + "0" * 64, b"")), errors.UnsafePathError, "leaves"),
        (lambda raw: tar(("blobs/sha256/xyz", b"")), errors.FormatError, "is not a blob"),
        (lambda raw: tar(("blobs/sha256/" + "0" * 64, b"x")), errors.IntegrityError, "0000"),
    ],
)  # fmt: skip
def test_broken_archives(
    store: modelpack.Store, other: modelpack.Store, change: Callable[[bytes], bytes],
    kind: type[errors.ModelpackError], said: str,
) -> None:  # fmt: skip
    raw = change(archived(store, GGUF))
    with pytest.raises(kind) as caught:
        read(other, raw)
    assert said in str(caught.value)
    assert not other.models()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((GGUF,), 2, "expected either --output or --docker-store"),
        ((GGUF, "-o", "x.tar", "--docker-store"), 2, "expected either --output or --docker-store"),
        (("-o", "x.tar"), 2, "name the models, or give --all"),
        ((GGUF, "--all", "-o", "x.tar"), 2, "name the models, or give --all"),
        ((GGUF, ST, "-o", "x.tar", "--format", "docker"), 2, "holds one model, got 2"),
        (("x/none", "-o", "x.tar"), 3, "x/none"),
        ((GGUF, "-o", "no/such/x.tar"), 3, "cannot write no/such/x.tar"),
        ((GGUF, "-o", "x.tar", "--copy"), 2, "--copy requires --docker-store"),
    ],
)
def test_wrong_exports(
    store: modelpack.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...], code: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    result = command("export", *arguments, "--store", store.root)
    assert result.code == code
    assert said in result.err
    assert not list(tmp_path.glob("*.tar"))


def test_several_models_have_no_one_name(store: modelpack.Store, other: modelpack.Store) -> None:
    with pytest.raises(errors.UsageError, match="contains 2 models"):
        read(other, archived(store, GGUF, ST), to="a/b")
    with pytest.raises(errors.UsageError, match="a digest cannot be chosen"):
        read(other, archived(store, GGUF), to="a/b@sha256:" + "0" * 64)
    assert not other.models()


def test_archives_that_are_none_are_named(tmp_path: Path) -> None:
    text = tmp_path / "LICENSE"
    text.write_text("free " * 1000)
    refused = command("import", text, "--store", tmp_path / "store")
    assert refused.code == 1
    assert f"error: {text} at byte 0: is not a valid tar archive" in refused.err
    for name in ("nope.tar", "nope.TAR.GZ"):
        missing = command("import", name, "--store", tmp_path / "store")
        assert missing.code == 3
        assert f"error: no such file: {name}" in missing.err


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, zstandard.compress])
def test_compressed_archives_are_named(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "model.tar"
    path.write_bytes(compress(bytes(1024)))
    refused = command("import", path, "--store", tmp_path / "store")
    assert refused.code == 1
    assert f"error: {path}: is compressed: decompress it first" in refused.err


def test_weights_are_no_archive(tmp_path: Path) -> None:
    for name in (tiny_gguf(tmp_path), tmp_path):
        result = command("import", name, "--store", tmp_path / "store")
        assert result.code == 2
        assert str(name) in result.err
        assert f"hint: run modelpack package {name} NAME" in result.err


@pytest.mark.parametrize("form", ["oci", "docker"])
def test_a_blob_of_another_size_is_not_exported(store: modelpack.Store, form: Form) -> None:
    """The bytes of a changed blob must not be read as headers of the archive."""
    weight = modelpack.inspect(GGUF, store=store).manifest.layers[0]
    path = store.blob_path(weight.digest)
    path.unlink()
    path.write_bytes(b"cut")
    with pytest.raises(errors.SizeMismatchError):
        archived(store, GGUF, form=form)
