"""Mirrors: their configuration files, and the source of each pulled byte."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.reference import Reference
from modelpack.errors import UsageError
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.registry.mirrors import Mirror, Place, read_mirrors
from modelpack.storage import watching
from modelpack.store.layout import LayoutStore
from tests.cli.running import modelpack, succeed
from tests.peers import free_port
from tests.registry import faults
from tests.registry.faulty import FaultyRegistry
from tests.registry.faulty_auth import BasicAuth
from tests.registry.sources import manifest_for


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "registries.toml"
    monkeypatch.setenv("MODELPACK_MIRRORS", str(path))
    monkeypatch.setattr("modelpack.registry.limits.RetryPolicy.wait", lambda *_: None)
    return path


RULES = """
[[registry]]
prefix = "docker.io/ai"
[[registry.mirror]]
location = "mirror.lan:5000/hub"
[[registry.mirror]]
location = "http://other.lan"
pull-from-mirror = "digest-only"
insecure = true

[[registry]]
location = "docker.io"
insecure = true
[[registry.mirror]]
location = "wide.lan"

[[registry]]
prefix = "*.internal.example"
[[registry.mirror]]
location = "https://mirror.lan/internal"

[[registry]]
prefix = "evil.example"
blocked = true
"""


def test_rules(file: Path) -> None:
    file.write_text(RULES)
    mirrors = read_mirrors()
    assert mirrors.place("docker.io", "ai/smol") == Place(
        (
            Mirror("mirror.lan:5000", "hub/smol"),
            Mirror("other.lan", "smol", "digest-only", True, True),
        )
    )
    assert mirrors.place("docker.io", "aim/x") == Place((Mirror("wide.lan", "aim/x"),), True)
    assert mirrors.place("a.internal.example", "x/y") == Place(
        (Mirror("mirror.lan", "internal/x/y", plain_http=False),)
    )
    for registry in ("internal.example", "ghcr.io", "docker.io.example"):
        assert mirrors.place(registry, "x/y") == Place()
    with pytest.raises(UsageError, match="blocked by the rule for"):
        mirrors.place("evil.example", "x")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[registry]]", "no prefix"),
        ("registry = 1", "not a list"),
        ('[[registry]]\nprefix = "a"\nlocation = "b"', "a location other than"),
        ('[[registry]]\nprefix = "a"\nblocked = "no"', "must be true or false"),
        ('[[registry]]\nprefix = "a"\n[[registry.mirror]]', "no location"),
        ('[[registry]]\nprefix = "a"\n[[registry.mirror]]\nlocation = "u:p@h"', "valid host"),
        (
            '[[registry]]\nprefix = "a"\n[[registry.mirror]]\nlocation = "h"\n'
            'pull-from-mirror = "never"',
            "pull-from-mirror is",
        ),
        ("x = [", "registries.toml"),
    ],
)
def test_files_that_are_wrong(file: Path, text: str, problem: str) -> None:
    file.write_text(text)
    with pytest.raises(UsageError, match=problem):
        read_mirrors()


def test_no_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_mirrors()
    monkeypatch.delenv("MODELPACK_MIRRORS")
    assert read_mirrors().place("docker.io", "ai/smol") == Place()


class Mirrored:
    """A registry, a mirror of its model, and the output of a command."""

    def __init__(self, own: FaultyRegistry, mirror: FaultyRegistry, file: Path) -> None:
        self.own, self.mirror, self.file = own, mirror, file
        self.digest = manifest_for(own)[0].digest
        assert manifest_for(mirror)[0].digest == self.digest
        self.reference = f"{own.host}/team/model:v1"
        self.use("all")

    def use(self, use: str) -> None:
        """Write the file."""
        self.file.write_text(
            f'[[registry]]\nprefix = "{self.own.host}"\n[[registry.mirror]]\n'
            f'location = "{self.mirror.host}"\npull-from-mirror = "{use}"\n'
        )

    def pull(self) -> str:
        """Pull the model, check it, and return the notes."""
        result = succeed("pull", self.reference)
        assert result.out == str(self.digest)
        succeed("fsck")
        return result.err


@pytest.fixture
def mirrored(registry: FaultyRegistry, storage: FaultyRegistry, file: Path) -> Mirrored:
    return Mirrored(registry, storage, file)


def test_a_pull_from_the_mirror(mirrored: Mirrored) -> None:
    mirrored.pull()
    assert mirrored.own.requests == []
    assert mirrored.mirror.count("GET", "/blobs/") == 2


@pytest.mark.parametrize(
    "fault",
    [
        faults.answering(404),
        faults.answering(500),
        faults.answering(401),
        faults.answering(403),
        faults.flipped_bit(3),
        faults.cut_after(0),
        faults.shortened(1),
    ],
)
@pytest.mark.parametrize("where", ["/manifests/", "/blobs/"])
def test_a_mirror_that_fails(mirrored: Mirrored, where: str, fault: faults.Fault) -> None:
    mirrored.mirror.faults.add("GET", where, fault, times=None)
    mirrored.pull()
    assert mirrored.mirror.requests
    assert mirrored.own.count("GET", where) >= 1


def test_a_mirror_that_fails_in_the_middle(mirrored: Mirrored) -> None:
    path = f"/blobs/{Digest.of(b'weights')}"
    mirrored.mirror.faults.add("GET", path, faults.cut_after(3))
    mirrored.mirror.faults.add("GET", path, faults.answering(404), times=None)
    mirrored.pull()
    (request,) = mirrored.own.seen("GET", path)
    assert request.headers["range"] == "bytes=3-"


def test_segments_that_a_mirror_fails_to_give(
    mirrored: Mirrored, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The registry itself sends the missing bytes, and no others."""
    monkeypatch.setattr("modelpack.store.downloads.WINDOW", 1000)
    monkeypatch.setattr("modelpack.store.downloads.MIN_BYTES_FOR_RANGES", 1000)
    monkeypatch.setattr("modelpack.store.downloads.FAST", 1e15)
    monkeypatch.setattr("modelpack.store.downloads._SMALLEST", 100_000)
    content = bytes(range(251)) * 8000
    blob = mirrored.own.put_blob(content)
    mirrored.mirror.put_blob(content)
    path = f"/blobs/{blob.digest}"
    for _ in range(3):
        mirrored.mirror.faults.add("GET", path, lambda exchange: exchange.send(exchange.reply()))
    mirrored.mirror.faults.add("GET", path, faults.answering(404), times=None)
    watch = watching(None)
    with open_repository(Reference.parse(mirrored.reference), RemoteOptions(), watch) as reading:
        LayoutStore(tmp_path / "there").write_blob(blob, reading.blob(blob), watch)
    assert LayoutStore(tmp_path / "there").has_blob(blob)
    ranges = [request.headers["range"] for request in mirrored.own.seen("GET", path)]
    assert mirrored.mirror.count("GET", path) >= 4
    assert 0 < len(ranges) == len(set(ranges)) < 20


def test_a_mirror_that_is_not_there(mirrored: Mirrored) -> None:
    text = mirrored.file.read_text()
    mirrored.file.write_text(text.replace(mirrored.mirror.host, f"127.0.0.1:{free_port()}"))
    assert "trying the next source" in mirrored.pull()


def test_tags_from_the_registry_digests_from_the_mirror(mirrored: Mirrored) -> None:
    mirrored.use("digest-only")
    mirrored.pull()
    assert mirrored.own.count("GET", "/manifests/v1") == 1
    assert mirrored.own.count("GET", "/blobs/") == 0
    assert mirrored.mirror.count("GET", "/manifests/v1") == 0
    assert mirrored.mirror.count("GET", "/blobs/") == 2


def test_a_push_goes_to_the_registry(mirrored: Mirrored) -> None:
    mirrored.pull()
    mirrored.mirror.requests.clear()
    succeed("tag", mirrored.reference, f"{mirrored.own.host}/team/other:v1")
    succeed("push", f"{mirrored.own.host}/team/other:v1")
    assert mirrored.mirror.requests == []


def test_a_mirror_has_credentials_of_its_own(
    mirrored: Mirrored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrored.mirror.auth = BasicAuth("bob", "mirror-pw")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    pairs = {mirrored.own.host: b"ada:own-pw", mirrored.mirror.host: b"bob:mirror-pw"}
    auths = {host: {"auth": base64.b64encode(pair).decode()} for host, pair in pairs.items()}
    (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))
    mirrored.pull()
    own = base64.b64encode(b"ada:own-pw").decode()
    assert not any(own in str(request.headers) for request in mirrored.mirror.requests)
    assert mirrored.own.requests == []


def test_a_blocked_registry(file: Path, registry: FaultyRegistry) -> None:
    file.write_text(f'[[registry]]\nprefix = "{registry.host}"\nblocked = true\n')
    result = modelpack("pull", f"{registry.host}/team/model:v1")
    assert result.code == 2
    assert "blocked" in result.err
    assert registry.requests == []


def test_what_is_pulled_is_what_was_published(mirrored: Mirrored) -> None:
    mirrored.pull()
    assert LayoutStore().resolve(mirrored.reference).digest == mirrored.digest
    assert Digest.of(b"weights").encoded in {p.name for p in LayoutStore().root.rglob("*")}
