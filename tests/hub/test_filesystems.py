"""Models on file systems that fsspec reads: its memory, a faulty one, and refused schemes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import modelpack
from modelpack.artifacts import media_types
from modelpack.errors import (
    AuthError,
    DeniedError,
    InterruptedTransferError,
    InvalidReferenceError,
    ModelpackError,
    NotFoundError,
    RegistryError,
    RemoteUnavailableError,
    SizeMismatchError,
    SourceChangedError,
    UnsafePathError,
    UnsupportedError,
    UsageError,
)
from modelpack.hub import filesystems
from modelpack.hub import objects as objects_module
from modelpack.hub.objects import ObjectAddress
from modelpack.operations.objects import open_bucket
from modelpack.operations.package import package
from modelpack.operations.provenance import ProvenanceOptions, read_provenance
from modelpack.progress import Progress, Stop
from modelpack.storage import watching
from tests.cli.running import modelpack as command
from tests.cli.running import succeed
from tests.models import FIXTURES, tiny_safetensors

GGUF = (FIXTURES / "models/tiny-gguf/tiny.gguf").read_bytes()
SECRET = "password-of-the-host"


class FaultyFileSystem(MemoryFileSystem):
    """A third-party implementation, with ETags, whose faults tests set."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False
    #: Changes to the entries of lists, by name.
    entries: ClassVar[dict[str, dict[str, Any]]] = {}
    #: Raised by the next call of a method.
    failure: ClassVar[Exception | None] = None
    #: Written over a file while it is read.
    replacement: ClassVar[bytes | None] = None
    offsets: ClassVar[list[int]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("faulty://").strip("/")

    def _entry(self, entry: dict[str, Any]) -> dict[str, Any]:
        file = self.store.get(entry["name"])
        etag = {} if file is None else {"ETag": f'"{hash(file.getvalue())}"'}
        return {**entry, **etag, **self.entries.get(entry["name"], {})}

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[dict[str, Any]]:
        if self.failure is not None:
            raise self.failure
        return [self._entry(entry) for entry in super().ls(path, detail=True, **options)]

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return self._entry(super().info(path, **options))

    def _open(self, path: str, *arguments: Any, **options: Any) -> Any:
        opened = super()._open(path, *arguments, **options)
        replacement, FaultyFileSystem.replacement = self.replacement, None
        if replacement is not None:
            self.pipe_file(path, replacement)
        seek = opened.seek

        def counted(offset: int, whence: int = 0) -> int:
            if offset:
                self.offsets.append(offset)
            return int(seek(offset, whence))

        opened.seek = counted
        return opened


@pytest.fixture
def store(tmp_path: Path) -> modelpack.Store:
    return modelpack.Store(tmp_path / "store")


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> FaultyFileSystem:
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    for name, empty in (("store", {}), ("pseudo_dirs", [""]), ("entries", {}), ("offsets", []),
                        ("failure", None), ("replacement", None)):  # fmt: skip
        monkeypatch.setattr(FaultyFileSystem, name, empty)
    return FaultyFileSystem()


def imported(store: modelpack.Store, address: str, **options: Any) -> modelpack.Packaged:
    return package("x/m:v1", modelpack.PackageRequest(), from_model=address, store=store, **options)


def parsed(address: str) -> ObjectAddress:
    found = ObjectAddress.parse(address)
    assert found is not None
    return found


def listed(address: str) -> list[str]:
    return [one.path for one in open_bucket(parsed(address)).objects()]


# The contract of a source


@pytest.mark.parametrize("scheme", ["memory", "faulty"])
def test_a_directory_becomes_the_model_of_its_files(
    scheme: str, tmp_path: Path, store: modelpack.Store, memory: object, faulty: object
) -> None:
    source = tiny_safetensors(tmp_path)
    files = fsspec.filesystem(scheme)
    for path in sorted(filter(Path.is_file, source.rglob("*"))):
        files.pipe_file(f"/host/team/Tiny/{path.relative_to(source)}", path.read_bytes())
    files.pipe_file("/host/team/Tiny2/other.safetensors", b"x")
    files.pipe_file("/host/team/Tiny/pytorch_model.bin", b"pickle")
    succeed("import", f"{scheme}://host/team/Tiny/", "x/m:v1", "--store", store.root)
    plain = package("x/y:v1", modelpack.PackageRequest(safetensors_dir=source), store=store)
    model = modelpack.inspect("x/m:v1", store=store)
    assert model.manifest.annotations[media_types.SOURCE] == f"{scheme}://host/team/Tiny"
    assert model.manifest.layers == plain.manifest.layers
    assert list((store.root / "ingest").glob("**/objects-*")) == []
    with pytest.raises(NotFoundError, match=f"{scheme}://host/nothing: not found"):
        imported(store, f"{scheme}://host/nothing")


def test_one_file_with_its_papers_and_provenance(
    faulty: FaultyFileSystem, memory: MemoryFileSystem, store: modelpack.Store
) -> None:
    for files in (faulty, memory):
        files.pipe_file("/m/a.gguf", GGUF)
        files.pipe_file("/m/b.gguf", GGUF)
        files.pipe_file("/m/LICENSE", b"MIT\n")
        files.pipe_file("/m/empty.txt", b"")
    for scheme, has_etag in (("faulty", True), ("memory", False)):
        imported(store, f"{scheme}://m/a.gguf", provenance=ProvenanceOptions())
        [recorded] = read_provenance("x/m:v1", store=store)
        inputs = {one.uri: bool(one.digest) for one in recorded.provenance.dependencies if one.uri}
        assert inputs == {f"{scheme}://m/{name}": has_etag for name in ("a.gguf", "LICENSE")}
    with pytest.raises(NotFoundError, match=r"faulty://m/c\.gguf: not found"):
        imported(store, "faulty://m/c.gguf")


def test_an_interrupted_download_goes_on(faulty: FaultyFileSystem, store: modelpack.Store) -> None:
    faulty.pipe_file("/m/model.gguf", GGUF)
    faulty.pipe_file("/m/README.md", b" " * 3_000_000)
    stop = Stop()

    def report(progress: Progress) -> None:
        if 0 < progress.completed < 3_000_000 and progress.name == "README.md":
            stop.request()

    options = modelpack.RemoteOptions(concurrency=1)
    with pytest.raises(InterruptedTransferError):
        imported(store, "faulty://m", progress=report, stop=stop, remote=options)
    parts = (store.root / "ingest").glob("**/objects-*/*.part")
    [started] = [size for part in parts if len(GGUF) < (size := part.stat().st_size) < 3_000_000]
    faulty.offsets.clear()
    imported(store, "faulty://m", remote=options)
    assert set(faulty.offsets) == {started}


def test_a_file_without_a_version_begins_again(
    faulty: FaultyFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.pipe_file("/m/a.gguf", GGUF)
    faulty.entries["/m/a.gguf"] = {"ETag": None, "created": None}
    bucket = open_bucket(parsed("faulty://m"))
    [one] = bucket.objects()
    assert (one.etag, one.modified) == ("", None)
    (tmp_path / "part").write_bytes(b"x" * len(GGUF))
    bucket.fetch(one, tmp_path / "part", watching(None), None)
    assert (tmp_path / "part").read_bytes() == GGUF


@pytest.mark.parametrize("replacement", [b"y" * len(GGUF), GGUF[:-1], GGUF + b"x"])
@pytest.mark.parametrize("stated", [{}, {"ETag": None}])
def test_a_file_that_is_replaced_while_it_is_read(
    faulty: FaultyFileSystem, store: modelpack.Store, replacement: bytes, stated: dict[str, None]
) -> None:
    faulty.pipe_file("/m/a.gguf", GGUF)
    faulty.entries["/m/a.gguf"] = stated
    FaultyFileSystem.replacement = replacement
    with pytest.raises(SourceChangedError, match=r"faulty://m/a\.gguf: the file was replaced"):
        imported(store, "faulty://m")
    assert store.models() == ()
    assert list((store.root / "ingest").glob("**/*.part")) == []


def test_a_file_that_is_replaced_before_it_is_read(
    memory: MemoryFileSystem, tmp_path: Path
) -> None:
    memory.pipe_file("/m/a.gguf", GGUF)
    bucket = open_bucket(parsed("memory://m"))
    [one] = bucket.objects()
    memory.pipe_file("/m/a.gguf", b"y" * len(GGUF))
    with pytest.raises(SourceChangedError):
        bucket.fetch(one, tmp_path / "part", watching(None), None)
    assert not (tmp_path / "part").exists()


def test_a_read_that_ends_early_or_late(faulty: FaultyFileSystem, tmp_path: Path) -> None:
    faulty.pipe_file("/m/a.gguf", GGUF)
    for size in (len(GGUF) - 1, len(GGUF) + 1):
        faulty.entries["/m/a.gguf"] = {"size": size}
        bucket = open_bucket(parsed("faulty://m"))
        [one] = bucket.objects()
        with pytest.raises(SizeMismatchError, match=f"expected {size} bytes"):
            bucket.fetch(one, tmp_path / "part", watching(None), None)
        assert not (tmp_path / "part").exists()


# What a file system may do wrong


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        ({"name": "/etc/a.gguf"}, UnsafePathError, "'/etc/a.gguf' is a link or not below it"),
        ({"name": "/m/../a.gguf"}, UnsafePathError, "leaves the directory"),
        ({"name": "/m/x\\a.gguf"}, UnsafePathError, "backslash"),
        ({"type": "link"}, UnsafePathError, "is a link"),
        ({"type": "directory"}, UnsupportedError, "too many directories"),
        ({"size": None}, RegistryError, "has no size"),
        ({"type": "other"}, NotFoundError, "no objects"),
    ],
)
def test_entries_that_are_no_files(
    faulty: FaultyFileSystem,
    monkeypatch: pytest.MonkeyPatch,
    entry: dict[str, Any],
    kind: type[ModelpackError],
    message: str,
) -> None:
    monkeypatch.setattr(filesystems, "MAX_DIRECTORIES", 1)
    faulty.pipe_file("/m/a.gguf", GGUF)
    faulty.entries["/m/a.gguf"] = entry
    with pytest.raises(kind, match=message):
        listed("faulty://m")


def test_the_limits_of_lists(faulty: FaultyFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty.pipe_file(f"/m/{'d/' * (filesystems.MAX_DEPTH + 1)}a.gguf", GGUF)
    with pytest.raises(UnsupportedError, match="too many directories at"):
        listed("faulty://m")
    assert listed("faulty://m/d") == [f"{'d/' * filesystems.MAX_DEPTH}a.gguf"]
    for name in ("a", "b", "c"):
        faulty.pipe_file(f"/n/{name}", b"")
    monkeypatch.setattr(objects_module, "MAX_OBJECTS", 2)
    with pytest.raises(UnsupportedError, match="more than 2 objects"):
        listed("faulty://n")


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (FileNotFoundError(SECRET), NotFoundError, "not found"),
        (PermissionError(SECRET), DeniedError, "denied"),
        (TypeError(f"missing {SECRET}"), UsageError, "not opened: TypeError"),
        (ModuleNotFoundError(SECRET), UsageError, "a package is not installed"),
        (ModuleNotFoundError(SECRET, name="pyarrow"), UsageError, "pyarrow is not installed"),
        (OSError(111, "Connection refused", SECRET), RemoteUnavailableError, "Connection refused"),
        (socket.gaierror(-2, "Name not known"), RemoteUnavailableError, "Name not known"),
        (type("AuthenticationError", (Exception,), {})(SECRET), AuthError, "AuthenticationError"),
        (RuntimeError(f"https://host/?sig={SECRET}"), RemoteUnavailableError, "RuntimeError"),
    ],
)
def test_errors_have_no_text_of_the_implementation(
    faulty: FaultyFileSystem, failure: Exception, kind: type[ModelpackError], message: str
) -> None:
    FaultyFileSystem.failure = failure
    with pytest.raises(kind, match=f"the files of faulty://m: {message}") as raised:
        listed("faulty://m")
    assert SECRET not in f"{raised.value} {raised.value.hint}"
    assert raised.value.__suppress_context__


# Addresses


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sftp://host/models/a", "sftp://host/models/a"),
        ("SMB://user@host:445/share/a.gguf/", "smb://user@host:445/share/a.gguf"),
        ("hdfs:///models", "hdfs:///models"),
        ("memory://m", "memory://m"),
    ],
)
def test_addresses(text: str, shown: str) -> None:
    assert str(parsed(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        "hf://a/b",
        "https://x/y",
        "http://x/y",
        "modelscope://a/b",
        "docker://a/b",
        "oci://a/b",
        "c://x",
    ],
)
def test_names_of_hubs_and_registries(text: str) -> None:
    assert ObjectAddress.parse(text) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"sftp://me:{SECRET}@host/m", "it has a password"),
        (f"abfs://c@host/m?sig={SECRET}", r"it has '\?'"),
        (f"sftp://host/m#{SECRET}", "it has '#'"),
        ("zip://a.gguf::s3://models/m.zip", "it has '::'"),
        ("simplecache://x/a::s3://models/m.zip", "it has '::'"),
        ("sftp://host/../m", "leaves the directory"),
        ("sftp://ho st/m", "'ho st' is not a host"),
    ],
)
def test_wrong_addresses(text: str, message: str) -> None:
    with pytest.raises(InvalidReferenceError, match=message) as raised:
        ObjectAddress.parse(text)
    assert SECRET not in f"{raised.value} {raised.value.hint} {raised.value.reference}"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("nonsense://host/m", "unknown scheme 'nonsense'", "use s3, gs, az or install"),
        ("tos://host/m", "no implementation of tos:// is installed", "Install tosfs"),
        ("abfs://host/m", "no implementation of abfs:// is installed", "Install adlfs"),
        ("file:///etc", "a local file is no object", "modelpack package PATH NAME"),
        ("local:///etc", "a local file is no object", "modelpack package PATH NAME"),
        ("zip://m", "is not a remote file system", "download the files"),
        ("reference://m", "is not a remote file system", "download the files"),
        ("dir://m", "is not a remote file system", "download the files"),
        ("ftp://host.example/m", "does not verify that it reads from 'host.example'", "--insecure"),
    ],
)
def test_schemes_that_are_refused(
    store: modelpack.Store, text: str, message: str, hint: str
) -> None:
    with pytest.raises(UsageError) as raised:
        open_bucket(parsed(text))
    assert message in str(raised.value)
    assert hint in (raised.value.hint or "")
    for arguments in (("import", text, "x/m"), ("package", "x/m", "--from", text)):
        done = command(*arguments, "--store", store.root)
        assert (done.code, message in done.err) == (2, True)


def test_a_host_that_may_be_unverified() -> None:
    for text, insecure in (("ftp://me@host:21/m", {"host:21"}), ("ftp://localhost/m", set())):
        open_bucket(parsed(text), insecure=frozenset(insecure))
