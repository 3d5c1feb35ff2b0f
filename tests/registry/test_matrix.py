"""One matrix: what the client does at each registry, operation by operation.

`OUTCOMES` has a row for each target: real registries, and the imitations of public services in
`tests.registry.imitations`. docs/registries.md shows the same table. An operation that a registry
lacks must end in an error that says so, or in the documented fallback.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
import requests

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.errors import NotFoundError, RegistryError
from modelpack.registry import (
    BlobOptions,
    Credential,
    Repository,
    RetryPolicy,
    StaticCredentials,
)
from modelpack.registry.http_client import Call, HttpClient
from modelpack.registry.referrers import fallback_tag
from modelpack.storage import Outcome
from modelpack.testing import registry as embedded_registry
from tests.conftest import ROOT
from tests.contract.parts import small_model, write_model
from tests.peers import docker_registry
from tests.registry.cutting import CuttingProxy
from tests.registry.distribution import distribution
from tests.registry.faults import kept_upload
from tests.registry.imitations import MIB, PROFILES, Imitation
from tests.registry.sources import Client, Content, read_all

LARGE: Final = random.Random(24).randbytes(11 * MIB)
CUT: Final = 6 * MIB
CHUNKS: Final = BlobOptions(chunk_size=5 * MIB)
EMPTY: Final = Descriptor(media_types.OCI_EMPTY, Digest.of(b"{}"), 2)
NOTE: Final = "application/vnd.example.note"

#: Where a target differs from `FULL`; "-" is what no document says about a service.
OUTCOMES: Final[dict[str, dict[str, str]]] = {
    "embedded": {},
    "docker-registry": {"referrers": "fallback tag", "resume": "starts again"},
    "distribution": {"referrers": "fallback tag"},
    "docker-hub": {"referrers": "fallback tag", "retag": "refused", "catalogue": "refused"},
    "ghcr": {
        "chunk": "one request", "referrers": "fallback tag", "delete": "refused",
        "catalogue": "-",
    },
    "ecr": {"chunk": "one request", "retag": "refused", "catalogue": "-"},
    "harbor": {"retag": "refused"},
    "artifactory": {
        "resume": "starts again", "chunk": "one request", "referrers": "fallback tag",
    },
    "minimal": {
        "mount": "uploaded", "chunk": "one request", "range": "whole blob",
        "referrers": "fallback tag", "delete": "refused", "catalogue": "refused",
    },
    "chunk-minimum": {"referrers": "fallback tag"},
}  # fmt: skip
#: The outcomes at a registry with all parts of the specification.
FULL: Final = {
    "push": "pushed", "mount": "mounted", "resume": "resumes", "chunk": "chunks",
    "range": "range", "referrers": "API", "retag": "moved", "delete": "deleted",
    "catalogue": "listed",
}  # fmt: skip


@dataclass
class Target:
    """A registry under test; `imitation` is None for a real one."""

    host: str
    imitation: Imitation | None
    stack: ExitStack
    #: The requests of the test's clients, with the status of each response.
    calls: list[tuple[Call, int]] = field(default_factory=list)

    def client(
        self, name: str, host: str = "", blobs: BlobOptions | None = None, **options: object
    ) -> Client:
        """Return a client of the repository `name`, at a proxy before the registry if given."""
        host = host or self.host
        credential = self.imitation.credential if self.imitation else None
        known: dict[str, Credential] = {host: credential} if credential else {}
        made = Client(
            host,
            name=f"team/{name}",
            credentials=StaticCredentials(known),
            blobs=blobs or BlobOptions(),
            **options,
        )
        return self.stack.enter_context(made)

    def seen(self, method: str, text: str = "") -> list[tuple[Call, int]]:
        """Return the requests with this method and `text` in their URL."""
        return [one for one in self.calls if one[0].method == method and text in one[0].url]


@pytest.fixture(scope="module")
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    """A registry for all operations, each of which has a repository of its own."""
    root: Path = tmp_path_factory.mktemp("matrix") / "registry"
    imitation, host = None, ""
    with ExitStack() as stack:
        match request.param:
            case "embedded":
                host = stack.enter_context(embedded_registry(root)).host
            case "docker-registry":
                host = stack.enter_context(docker_registry(root))
            case "distribution":
                host = stack.enter_context(distribution(root))
            case name:
                imitation = stack.enter_context(PROFILES[name].run())
                host = imitation.host
        yield Target(host, imitation, stack)


@pytest.fixture
def target(running: Target, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """The registry, whose requests are recorded."""
    attempt = HttpClient.attempt

    def recorded(client: HttpClient, call: Call) -> requests.Response:
        status = 0
        try:
            response = attempt(client, call)
            status = response.status_code
        finally:
            calls.append((call, status))
        return response

    calls: list[tuple[Call, int]] = []
    monkeypatch.setattr(HttpClient, "attempt", recorded)
    with ExitStack() as stack:
        yield Target(running.host, running.imitation, stack, calls)


def write(client: Client, repository: Repository, content: bytes) -> Outcome:
    source = Content(content)
    return repository.write_blob(source.descriptor, source, client.watch)


def check(error: RegistryError, said: str, *hints: str) -> None:
    """Assert that the error says why, and what to do: one of `hints`."""
    assert said in str(error)
    assert error.hint in hints


# Operations: each returns its outcome, and asserts that content is intact whatever it is.


def push(target: Target) -> str:
    repository = target.client("push").repository
    model = small_model(b"weights", b"license")
    write_model(repository, model, "v1")
    assert repository.resolve("v1") == model.descriptor
    assert repository.fetch_manifest(model.descriptor) == model.manifest.raw
    for blob in model.manifest.blobs:
        assert read_all(repository, blob) == model.contents[blob.digest]
    assert list(repository.tags()) == ["v1"]
    return "pushed"


def mount(target: Target) -> str:
    client = target.client("mount")
    blob = Content(LARGE[:1000])
    write(client, client.repository, blob.content)
    other = client.registry.repository("team/mounted")
    mounted = other.mount_blob(blob.descriptor, client.repository)
    outcome = write(client, other, blob.content)
    assert outcome is (Outcome.EXISTED if mounted else Outcome.WRITTEN)
    assert read_all(other, blob.descriptor) == blob.content
    return "mounted" if mounted else "uploaded"


def resume(target: Target) -> str:
    patient = RetryPolicy(first_delay=0.5, chance=lambda: 0.0)
    if target.imitation is not None:
        client = target.client("resume")
        faults = target.imitation.registry.faults
        faults.add("PUT", "/resume/blobs/uploads/", kept_upload(CUT), first=True)
    else:
        proxy = target.stack.enter_context(CuttingProxy(target.host, CUT))
        client = target.client("resume", proxy.host, retry=patient)
    content = b"resume" + LARGE
    assert write(client, client.repository, content) is Outcome.WRITTEN
    assert read_all(client.repository, Content(content).descriptor) == content
    sessions = [status for _, status in target.seen("POST", "/blobs/uploads/") if status == 202]
    return "resumes" if len(sessions) == 1 else "starts again"


def chunk(target: Target) -> str:
    client = target.client("chunk", blobs=CHUNKS)
    assert write(client, client.repository, LARGE) is Outcome.WRITTEN
    assert read_all(client.repository, Content(LARGE).descriptor) == LARGE
    uploads = [(call, status) for call, status in target.calls if "/blobs/uploads/" in call.url]
    last = max(n for n, (call, _) in enumerate(uploads) if call.method == "POST")
    bodies = [len(call.body) for call, _ in uploads[last:] if call.body is not None]
    assert sum(bodies) == len(LARGE)
    return "one request" if len(LARGE) in bodies else "chunks"


def pull_range(target: Target) -> str:
    client = target.client("range")
    blob = Content(LARGE[:100_000])
    write(client, client.repository, blob.content)
    assert read_all(client.repository, blob.descriptor, 99_000) == blob.content[99_000:]
    if target.imitation is not None:
        elsewhere = target.imitation.storage.requests
        assert not any("authorization" in request.headers for request in elsewhere)
    statuses = {status for _, status in target.seen("GET", "/blobs/sha256:")}
    return "range" if 206 in statuses else "whole blob"


def refer(target: Target) -> str:
    repository = target.client("attach").repository
    model = small_model(b"weights")
    write_model(repository, model, "v1")
    write(target.client("attach"), repository, b"{}")
    notes = [
        Manifest.build(
            EMPTY, [EMPTY], artifact_type=NOTE, subject=model.descriptor, annotations={"n": number}
        )
        for number in "12"
    ]
    for note in (*notes, notes[0]):
        repository.write_manifest(note.descriptor, note.raw)
    found = repository.referrers(model.digest, NOTE)
    assert {one.digest for one in found} == {note.digest for note in notes}
    try:
        repository.resolve(fallback_tag(model.digest))
    except NotFoundError:
        return "API"
    return "fallback tag"


def retag(target: Target) -> str:
    repository = target.client("retag").repository
    old, new = small_model(b"old"), small_model(b"new")
    write_model(repository, old, "v1")
    write_model(repository, old, "v1")  # a push that changes nothing succeeds everywhere
    try:
        write_model(repository, new, "v1")
    except RegistryError as error:
        check(error, "immutable", "the registry refused to move the tag: push to another one")
        assert repository.resolve("v1").digest == old.digest
        return "refused"
    assert repository.resolve("v1").digest == new.digest
    return "moved"


def delete(target: Target) -> str:
    repository = target.client("delete").repository
    model = small_model(b"weights")
    write_model(repository, model, "v1")
    try:
        repository.delete_manifest(str(model.digest))
    except RegistryError as error:
        check(error, "405", "check whether the registry supports this and has it enabled")
        assert repository.resolve("v1").digest == model.digest
        return "refused"
    for name in ("v1", str(model.digest)):
        with pytest.raises(NotFoundError):
            repository.resolve(name)
    return "deleted"


def catalogue(target: Target) -> str:
    client = target.client("catalogue")
    write_model(client.repository, small_model(b"weights"), "v1")
    try:
        names = list(client.registry.repositories())
    except RegistryError as error:
        check(
            error,
            client.registry.host,
            "name the repositories",
            "check the password and the permissions of the account, or log in again; "
            "or name the repositories",
        )
        return "refused"
    assert "team/catalogue" in names
    return "listed"


OPERATIONS: Final[dict[str, Callable[[Target], str]]] = {
    "push": push,
    "mount": mount,
    "resume": resume,
    "chunk": chunk,
    "range": pull_range,
    "referrers": refer,
    "retag": retag,
    "delete": delete,
    "catalogue": catalogue,
}


MARKS: Final = {
    "docker-registry": [pytest.mark.peer("docker-registry")],
    "distribution": [pytest.mark.long, pytest.mark.peer("go")],
}
CELLS: Final = [
    pytest.param(name, operation, outcome, marks=MARKS.get(name, []), id=f"{name}-{operation}")
    for name, outcomes in OUTCOMES.items()
    for operation, outcome in (FULL | outcomes).items()
    if outcome != "-"
]


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("running", "operation", "outcome"), CELLS, indirect=["running"], scope="module"
)
def test_matrix(target: Target, operation: str, outcome: str) -> None:
    assert OPERATIONS[operation](target) == outcome
    if target.imitation is not None:
        assert target.imitation.registry.open_uploads == []
        assert not any("cookie" in one.headers for one in target.imitation.registry.requests)


@pytest.mark.parametrize("name", [name for name in PROFILES if PROFILES[name].throttled])
def test_too_many_requests(name: str) -> None:
    """Twice 429: the client waits as long as it is asked to, if it is asked."""
    profile = PROFILES[name]
    assert profile.throttled is not None
    with profile.run() as imitation, ExitStack() as stack:
        client = Target(imitation.host, imitation, stack).client("limited")
        write_model(client.repository, small_model(b"weights"), "v1")
        imitation.registry.faults.add("GET", "/manifests/", profile.throttled, 2, first=True)
        imitation.registry.faults.add("HEAD", "/manifests/", profile.throttled, 2, first=True)
        client.repository.fetch_manifest_by_name("v1")
        assert len(client.sleeps) == 2
        assert min(client.sleeps) >= (7 if name == "docker-hub" else 0.25)
        imitation.registry.faults.add("GET", "/manifests/", profile.throttled, None, first=True)
        with pytest.raises(RegistryError, match="429") as caught:
            client.repository.fetch_manifest_by_name("v1")
        assert caught.value.exit_code == 6
        assert caught.value.hint == "log in or wait: the registry limits requests"


def test_the_documented_table_is_this_one() -> None:
    lines = (ROOT / "docs" / "registries.md").read_text().splitlines()
    head = lines.index(f"| | {' | '.join(FULL)} |")
    assert lines[head + 2 : head + 3 + len(OUTCOMES)] == [
        *(
            f"| {name} | {' | '.join((FULL | outcomes).values())} |"
            for name, outcomes in OUTCOMES.items()
        ),
        "",
    ]


def test_each_quirk_names_its_source() -> None:
    for profile in PROFILES.values():
        assert all(quirk.what and quirk.source for quirk in profile.quirks)
    assert set(OUTCOMES) - set(PROFILES) == {"embedded", "docker-registry", "distribution"}
