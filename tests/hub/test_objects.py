"""Models in S3, Google Cloud Storage and Azure: listing, download, packaging, faults, names."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import modelpack
from modelpack.artifacts import media_types
from modelpack.errors import (
    AmbiguousError,
    AuthError,
    DeniedError,
    InterruptedTransferError,
    InvalidReferenceError,
    ModelpackError,
    NotFoundError,
    PackagingError,
    RegistryError,
    RemoteUnavailableError,
    SizeMismatchError,
    SourceChangedError,
    StorageFullError,
    UnsafePathError,
    UnsupportedError,
    UsageError,
)
from modelpack.hub import object_stores
from modelpack.hub import objects as objects_module
from modelpack.hub.objects import ObjectAddress
from modelpack.operations import objects as downloads
from modelpack.operations.objects import open_bucket
from modelpack.operations.package import package
from modelpack.operations.provenance import ProvenanceOptions, read_provenance
from modelpack.progress import Progress, Stop
from modelpack.storage import watching
from tests.cli.running import modelpack as command
from tests.cli.running import succeed
from tests.hub.buckets import KEYS, TOKEN, Cloud, CloudServer, azure, gcs, s3
from tests.models import FIXTURES, tiny_safetensors

GGUF = (FIXTURES / "models/tiny-gguf/tiny.gguf").read_bytes()
PROJECTOR = (FIXTURES / "models/tiny-mmproj/mmproj-tiny-f16.gguf").read_bytes()
Both = tuple[Cloud, CloudServer]


@pytest.fixture
def store(tmp_path: Path) -> modelpack.Store:
    return modelpack.Store(tmp_path / "store")


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[Both]:
    with gcs(monkeypatch) as both:
        yield both


def imported(store: modelpack.Store, address: str, **options: Any) -> modelpack.Packaged:
    return package("x/m:v1", modelpack.PackageRequest(), from_model=address, store=store, **options)


def listed(address: str) -> list[str]:
    found = ObjectAddress.parse(address)
    assert found is not None
    return [one.path for one in open_bucket(found).objects()]


def left(store: modelpack.Store) -> list[Path]:
    """Return what a download left in the store."""
    return sorted((store.root / "ingest").glob("**/objects-*"))


# All kinds


@pytest.mark.long
def test_a_directory_of_s3_becomes_the_model_of_its_files(
    tmp_path: Path, store: modelpack.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_safetensors(tmp_path)
    with s3(monkeypatch) as cloud:
        cloud.fill(source, "team/Tiny")
        cloud.put("team/Tiny2/other.safetensors", b"x")
        cloud.put("team/Tiny/pytorch_model.bin", b"pickle")
        done = succeed("import", "s3://models/team/Tiny/", "x/m:v1", "--store", store.root)
        with pytest.raises(NotFoundError, match=r"s3://nobody/x: no such bucket"):
            imported(store, "s3://nobody/x")
        with pytest.raises(NotFoundError, match="no objects"):
            imported(store, "s3://models/team/Tin")
    plain = package("x/y:v1", modelpack.PackageRequest(safetensors_dir=source), store=store)
    assert done.out != str(plain.digest)  # it has its address as an annotation
    model = modelpack.inspect("x/m:v1", store=store)
    assert model.manifest.annotations[media_types.SOURCE] == "s3://models/team/Tiny"
    assert model.manifest.layers == plain.manifest.layers
    assert [p.stat().st_nlink for p in (store.root / "blobs/sha256").iterdir()] == [1] * len(
        list((store.root / "blobs/sha256").iterdir())
    )
    assert left(store) == []
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in done.err


def test_files_of_gcs_with_their_papers_and_provenance(
    google: Both, store: modelpack.Store
) -> None:
    cloud, _ = google
    for name in ("a.gguf", "b.gguf"):
        cloud.put(f"m/{name}", GGUF)
    cloud.put("m/mmproj-F16.gguf", PROJECTOR)
    cloud.put("m/LICENSE", b"MIT\n")
    cloud.put("m/chat_template.jinja", b"{{ messages }}")
    with pytest.raises(NotFoundError, match=r"Q4_K_M \(the default\); there are: a, b"):
        imported(store, "gs://models/m")
    done = imported(store, "gs://models/m/a.gguf", provenance=ProvenanceOptions())
    kinds = [str(file.role) for file in modelpack.inspect("x/m:v1", store=store).files()]
    assert sorted(kinds) == ["chat_template", "license", "projector", "weight"]
    assert imported(store, "gcs://models/m/a.gguf").digest == done.digest
    [recorded] = read_provenance("x/m:v1", store=store)
    inputs = [one for one in recorded.provenance.dependencies if one.uri.startswith("gs://")]
    assert {(one.name, one.uri) for one in inputs} == {
        (name, f"gs://models/m/{name}")
        for name in ("a.gguf", "mmproj-F16.gguf", "LICENSE", "chat_template.jinja")
    }
    assert all(len(one.digest["etag"]) == 32 for one in inputs)


def test_blobs_of_azure(store: modelpack.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with azure(monkeypatch) as (cloud, server):
        cloud.put("m/a.gguf", GGUF)
        cloud.put("m2/b.gguf", GGUF)
        imported(store, "az://models/m")
        files = modelpack.resolve("x/m:v1", store=store).files
        assert [file.path.read_bytes() for file in files] == [GGUF]
        with pytest.raises(NotFoundError, match=r"az://nobody/x: no such bucket"):
            listed("az://nobody/x")
        server.faults.replaced = True
        with pytest.raises(SourceChangedError, match="was replaced while it was read"):
            imported(store, "az://models/m")
        server.faults.denied = 403
        with pytest.raises(DeniedError, match="denied: 403 AccessDenied") as raised:
            listed("az://models/m")
        assert TOKEN not in str(raised.value)
        monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
        with pytest.raises(UsageError, match=r"az://models/m: .*[Aa]ccount"):
            listed("az://models/m")


def test_why_obstore_is_not_read_through_fsspec(google: Both, tmp_path: Path) -> None:
    """Its fsspec interface has no conditions: bytes of a replaced object are no error."""
    from obstore.fsspec import FsspecStore

    cloud, server = google
    cloud.put("m/a.gguf", GGUF)
    files = FsspecStore("gs", client_options={"allow_http": True})
    [entry] = files.ls("models/m", detail=True)
    server.faults.replaced = True
    files.get_file("models/m/a.gguf", str(tmp_path / "got"))
    assert entry["size"] == len(GGUF) < len((tmp_path / "got").read_bytes())
    address = ObjectAddress("gs", "models", "m")
    source = object_stores.CloudStorage.opened(address, frozenset(), os.environ)
    [(key, size, etag, modified)] = source.listed()
    one = objects_module.StoredObject(key, "a.gguf", size, etag, modified)
    with pytest.raises(SourceChangedError):
        next(source.chunks(one, 0))


def test_the_command_packages_objects(google: Both, store: modelpack.Store) -> None:
    cloud, _ = google
    cloud.put("one/a.gguf", GGUF)
    where = ("--store", store.root)
    done = succeed("package", "x/m:v1", "--from", "gs://models/one", "--format", "cncf", *where)
    assert modelpack.inspect("x/m:v1", store=store).manifest.is_cncf
    assert TOKEN not in done.err
    again = command("package", "x/m:v1", "--from", "gs://models/one", "--dry-run", *where)
    assert (again.code, "dry run" in again.err) == (2, True)
    both = command("package", "x/m", "--from", "gs://models/one", "--gguf", "y.gguf", *where)
    assert (both.code, "cannot be combined with --gguf" in both.err) == (2, True)
    succeed("import", "gs://models/one/a.gguf", "x/file:v1", *where)
    unnamed = command("import", "gs://models/one", *where)
    assert (unnamed.code, "needs a name" in unnamed.err) == (2, True)


def test_objects_have_no_signatures(google: Both, store: modelpack.Store, tmp_path: Path) -> None:
    cloud, _ = google
    cloud.put("one/a.gguf", GGUF)
    policy = tmp_path / "trust.toml"
    for default, code in (("reject", 5), ("accept", 0)):
        policy.write_text(f'default = "{default}"\n')
        where = ("--store", store.root, "--policy", policy)
        refused = command("package", "x/m:v1", "--from", "gs://models/one", *where)
        assert (refused.code, "objects have no signatures" in refused.err) == (2, True)
        assert store.models() == ()
        done = command("import", "gs://models/one", "x/m:v1", *where)
        assert done.code == code


def test_an_interrupted_download_goes_on(google: Both, store: modelpack.Store) -> None:
    cloud, server = google
    weights = (FIXTURES / "models/tiny-safetensors/model.safetensors").read_bytes()
    cloud.put("m/model.safetensors", weights)
    big = b"{" + b" " * 3_000_000 + b"}"
    cloud.put("m/config.json", big)
    stop = Stop()

    def report(progress: Progress) -> None:
        if 0 < progress.completed < 3_000_000 and progress.name == "config.json":
            stop.request()

    options = modelpack.RemoteOptions(concurrency=1)
    with pytest.raises(InterruptedTransferError):
        imported(store, "gs://models/m", progress=report, stop=stop, remote=options)
    [part] = [p for p in left(store)[0].glob("*.part") if 0 < p.stat().st_size < 3_000_000]
    started = part.stat().st_size
    server.faults.ranges.clear()
    imported(store, "gs://models/m", remote=options)
    assert f"bytes={started}-{len(big) - 1}" in [
        text if not text or text.partition("-")[2] else f"{text}{len(big) - 1}"
        for text in server.faults.ranges
    ]
    assert left(store) == []


def test_a_body_that_ends_early_is_continued(google: Both, store: modelpack.Store) -> None:
    cloud, server = google
    cloud.put("m/a.gguf", GGUF)
    server.faults.cut = 100  # of 256
    imported(store, "gs://models/m")
    assert len(server.faults.ranges) == 3
    assert modelpack.resolve("x/m:v1", store=store).files[0].path.read_bytes() == GGUF
    server.faults.cut = 20
    cloud.put("m/b.gguf", GGUF)
    with pytest.raises(RegistryError, match=r"gs://models/m/b\.gguf"):
        imported(store, "gs://models/m/b.gguf")


def test_an_object_that_is_replaced(google: Both, store: modelpack.Store) -> None:
    cloud, server = google
    cloud.put("m/a.gguf", GGUF)
    server.faults.replaced = True
    with pytest.raises(SourceChangedError, match="was replaced while it was read"):
        imported(store, "gs://models/m")
    # Bytes of an earlier content are not used for a new one.
    part = left(store)[0] / f"{'0' * 64}.part"
    part.write_bytes(b"old")
    server.faults.replaced = False
    imported(store, "gs://models/m")
    assert left(store) == []


def test_other_sizes_than_listed(google: Both, tmp_path: Path) -> None:
    cloud, _ = google
    cloud.put("m/a.gguf", GGUF)
    address = ObjectAddress.parse("gs://models/m")
    assert address is not None
    bucket = open_bucket(address)
    [one] = bucket.objects()
    for size in (len(GGUF) - 1, len(GGUF) + 1):
        wrong = objects_module.StoredObject(one.key, one.path, size, one.etag, one.modified)
        with pytest.raises(SizeMismatchError, match=f"expected {size} bytes"):
            bucket.fetch(wrong, tmp_path / "part", watching(None), None)
        assert not (tmp_path / "part").exists()


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (401, AuthError, "denied: 401 AccessDenied"),
        (403, DeniedError, "denied: 403 AccessDenied"),
        (400, RegistryError, "answered 400"),
        (503, RemoteUnavailableError, "answered 503"),
    ],
)
def test_refusals(google: Both, status: int, kind: type[ModelpackError], message: str) -> None:
    _, server = google
    server.faults.denied = status
    with pytest.raises(kind, match=message) as raised:
        listed("gs://models/m")
    assert TOKEN not in str(raised.value)


def test_the_limits_of_lists_and_disks(
    google: Both, store: modelpack.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud, _ = google
    for name in ("a.gguf", "b.txt", "c.txt"):
        cloud.put(f"m/{name}", GGUF)
    monkeypatch.setattr(objects_module, "MAX_OBJECTS", 2)
    with pytest.raises(UnsupportedError, match="more than 2 objects"):
        listed("gs://models/m")
    monkeypatch.undo()

    def full(folder: Path, size: int, what: str) -> None:
        raise StorageFullError(f"{what}: {size}", needed=size, available=0)

    with gcs(monkeypatch) as (cloud, server):
        cloud.put("m/a.gguf", GGUF)
        monkeypatch.setattr(downloads, "check_room", full)
        with pytest.raises(StorageFullError, match="gs://models/m: 256"):
            imported(store, "gs://models/m")
        assert server.faults.ranges == []


@pytest.mark.parametrize(
    ("keys", "kind", "message"),
    [
        (["m/../../etc/x.gguf"], UnsafePathError, r"'m/\.\./\.\./etc/x\.gguf' is not a path"),
        (["m//x.gguf"], UnsafePathError, "is not a path"),
        (["m/a\\b.gguf"], UnsafePathError, "backslash"),
        (["m/x", "m/x/y.gguf"], UnsafePathError, "is a file and a directory"),
        (["m/x.bin"], PackagingError, "pickles only"),
        (["m/readme.md"], PackagingError, "has no weights"),
        (["m/a-Q4_K_M.gguf", "m/b-Q4_K_M.gguf"], AmbiguousError, "several models"),
        (["m/a-00001-of-00002.gguf"], PackagingError, "shards are missing"),
    ],
)
def test_keys_that_are_no_model(
    google: Both, store: modelpack.Store, keys: list[str], kind: type[ModelpackError], message: str
) -> None:
    _, server = google
    server.objects |= dict.fromkeys(keys, GGUF)
    with pytest.raises(kind, match=message) as raised:
        imported(store, "gs://models/m")
    if kind is AmbiguousError:
        assert raised.value.hint == "write gs://models/m/FILE.gguf"
    assert store.models() == ()


def test_a_marker_of_a_directory_is_no_file(google: Both) -> None:
    _, server = google
    server.objects |= {"m/": b"", "m/sub/": b"", "m/sub/a.gguf": GGUF}
    assert listed("gs://models/m") == ["sub/a.gguf"]
    server.objects |= {"LICENSE/": b"", "LICENSE/LICENSE": b"MIT"}
    assert listed("gs://models/LICENSE") == ["LICENSE"]


# Addresses and settings


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://models", "s3://models"),
        ("s3://models/a/B_c/", "s3://models/a/B_c"),
        ("gcs://my.models/x.gguf", "gs://my.models/x.gguf"),
    ],
)
def test_addresses(text: str, shown: str) -> None:
    assert str(ObjectAddress.parse(text)) == shown


@pytest.mark.parametrize("text", ["team/m:v1", "hf://a/b", "https://x/y", "s3:/a/b", ""])
def test_other_names(text: str) -> None:
    assert ObjectAddress.parse(text) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://", "no bucket"),
        ("s3:///key", "no bucket"),
        ("gs://Upper/x", "'Upper' is not a bucket"),
        ("s3://user:secret@host/x", "'host' is not a bucket"),
        ("s3://models/../x", r"leaves the directory"),
        ("s3://models/a//b", "empty"),
        ("s3://models/a\x00b", "control character"),
    ],
)
def test_wrong_addresses(text: str, message: str) -> None:
    with pytest.raises(InvalidReferenceError, match=message) as raised:
        ObjectAddress.parse(text)
    assert "secret" not in f"{raised.value} {raised.value.reference} {raised.value.hint}"


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("http://storage.example", "storage.example would get credentials over plain http"),
        ("ftp://x", "GOOGLE_BASE_URL is not the address of a server"),
        ("http://[::1", "GOOGLE_BASE_URL is not the address of a server"),
        ("https://user:secret@x", "GOOGLE_BASE_URL is not the address of a server"),
    ],
)
def test_wrong_endpoints(monkeypatch: pytest.MonkeyPatch, endpoint: str, message: str) -> None:
    monkeypatch.setenv("GOOGLE_BASE_URL", endpoint)
    address = ObjectAddress("gs", "models", "m")
    with pytest.raises(UsageError, match=message) as raised:
        open_bucket(address)
    assert "secret" not in str(raised.value)
    if "plain http" in message:
        open_bucket(address, insecure=frozenset({"storage.example"}))


@pytest.mark.parametrize("first", ["http://localhost:9000", "https://s3.example"])
def test_every_endpoint_is_checked(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """Which of several variables obstore uses depends on their order in the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", first)
    monkeypatch.setenv("AWS_ENDPOINT", "http://storage.example")
    with pytest.raises(UsageError, match=r"AWS_ENDPOINT: storage\.example would get credentials"):
        open_bucket(ObjectAddress("s3", "models", "m"))


@pytest.mark.parametrize(
    "name", ["AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "AZURITE_BLOB_STORAGE_URL"]
)
def test_every_endpoint_of_azure_is_checked(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "http://storage.example")
    with pytest.raises(UsageError, match=rf"{name}: storage\.example would get credentials"):
        open_bucket(ObjectAddress("az", "models", "m"))


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        ("<Code>SlowDown</Code> status code: 503 https://s3.example/models/tokenizer.json",
         RemoteUnavailableError, "answered 503 SlowDown"),
        ("no answer from https://s3.example/models/token", RemoteUnavailableError, "did not"),
        ("<Code>InvalidRange</Code> status code: 416 <Key>token</Key>", RegistryError, "416"),
        ("<Code>ExpiredToken</Code> status code: 400", AuthError, "denied: 400 ExpiredToken"),
        ("Error performing token request: refused", AuthError, "no credentials were found"),
        ("the credential provider was not enabled", AuthError, "no credentials were found"),
    ],
)  # fmt: skip
def test_what_obstore_says(said: str, kind: type[RegistryError], message: str) -> None:
    made = object_stores._error("x", ObjectAddress("s3", "models", "m"), said)
    assert (type(made), message in str(made)) == (kind, True)


def test_without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(UsageError, match="obstore is not installed"):
        open_bucket(ObjectAddress("s3", "models", "m"))


def test_without_credentials(google: Both, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GOOGLE_BEARER_TOKEN")
    key = tmp_path / "key.json"
    key.write_text(json.dumps({"type": "unknown"}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    with pytest.raises(ModelpackError, match="gs://models/m"):
        listed("gs://models/m")
