"""Referrers against a registry that has no API for them, and against odd ones."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import encode
from modelpack.artifacts.manifest import Manifest
from modelpack.errors import ConflictError, DeniedError, RegistryError, UnsupportedError
from modelpack.registry import Registry
from modelpack.registry.referrers import fallback_tag
from tests.peers import docker_registry
from tests.registry.faults import Exchange, answering, redirecting
from tests.registry.faulty import REPOSITORY, FaultyRegistry
from tests.registry.faulty_content import Reply
from tests.registry.sources import Client, Content

EMPTY = Descriptor(media_types.OCI_EMPTY, Digest.of(b"{}"), 2)
SUBJECT = Descriptor(media_types.OCI_MANIFEST, Digest.of(b"a model"), 7)
TAG = fallback_tag(SUBJECT.digest)


def about(number: int, kind: str = "application/x-note") -> Manifest:
    """A referrer of `SUBJECT`, which need not exist."""
    return Manifest.build(
        EMPTY, [EMPTY], artifact_type=kind, subject=SUBJECT, annotations={"n": str(number)}
    )


def push(client: Client, manifest: Manifest) -> None:
    client.repository.write_manifest(manifest.descriptor, manifest.raw)


def listed(client: Client) -> set[Digest]:
    return {one.digest for one in client.repository.referrers(SUBJECT.digest)}


def index_of(*manifests: Manifest) -> bytes:
    entries = [manifest.descriptor.to_json() for manifest in manifests]
    return encode({"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": entries})


@pytest.fixture
def ready(registry: FaultyRegistry) -> FaultyRegistry:
    registry.put_blob(b"{}")
    return registry


@pytest.mark.parametrize(
    ("digest", "tag"),
    [
        (Digest.parse("sha256:" + "a1" * 32), "sha256-" + "a1" * 32),
        (Digest.parse("sha512:" + "b2" * 64), "sha512-" + "b2" * 32),
    ],
)
@pytest.mark.scenario(32)
def test_the_fallback_tag(digest: Digest, tag: str) -> None:
    assert fallback_tag(digest) == tag
    assert len(tag) <= 128


@pytest.mark.scenario(32)
def test_the_list_grows_and_stays_sorted_out(ready: FaultyRegistry, client: Client) -> None:
    for _ in range(2):
        for number in range(3):
            push(client, about(number))
    assert listed(client) == {about(n).digest for n in range(3)}
    raw = client.repository.fetch_manifest_by_name(TAG)[1]
    assert [e["annotations"]["n"] for e in json.loads(raw)["manifests"]] == ["0", "1", "2"]
    # Idempotent: a listed referrer is not written again.
    assert ready.count("PUT", TAG) == 3


def test_a_registry_that_notes_subjects_needs_no_tag(ready: FaultyRegistry, client: Client) -> None:
    def noting(exchange: Exchange) -> None:
        reply = exchange.reply()
        exchange.send(
            Reply(reply.status, {**reply.headers, "OCI-Subject": str(SUBJECT.digest)}, reply.body)
        )

    ready.faults.add("PUT", "/manifests/", noting)
    push(client, about(1))
    assert ready.count("GET", TAG) == 0


@pytest.mark.parametrize(
    "answer",
    [
        answering(404, b"404 page not found"),
        answering(405),
        answering(501),
        answering(400, b'{"errors":[{"code":"UNSUPPORTED"}]}'),
        answering(200, b"<html>hello</html>", Content_Type="text/html"),
    ],
)
def test_what_is_taken_for_a_missing_api(
    ready: FaultyRegistry, client: Client, answer: object
) -> None:
    push(client, about(1))
    ready.faults.add("GET", "/referrers/", answer, times=None)  # type: ignore[arg-type]
    assert listed(client) == {about(1).digest}


def test_a_refusal_is_no_missing_api(ready: FaultyRegistry, client: Client) -> None:
    push(client, about(1))
    ready.faults.add("GET", "/referrers/", answering(403, b'{"errors":[{"code":"DENIED"}]}'))
    with pytest.raises(DeniedError):
        listed(client)


def test_pages_and_filters_of_the_api(ready: FaultyRegistry, client: Client) -> None:
    """A registry that pages, and ignores the filter: there is no OCI-Filters-Applied."""
    kinds = ["application/x-a", "application/x-b"]
    made = [about(n, kinds[n % 2]) for n in range(4)]
    url = f"/v2/{REPOSITORY}/referrers/{SUBJECT.digest}"

    def page(exchange: Exchange) -> None:
        last = "last" in exchange.query
        headers = {"Content-Type": media_types.OCI_INDEX}
        if not last:
            headers["Link"] = f'<{url}?last=x>; rel="next"'
        exchange.send(Reply(200, headers, index_of(*(made[2:] if last else made[:2]))))

    ready.faults.add("GET", "/referrers/", page, times=None)
    assert listed(client) == {one.digest for one in made}
    found = client.repository.referrers(SUBJECT.digest, kinds[0])
    assert {one.digest for one in found} == {made[0].digest, made[2].digest}


def test_a_list_without_end_is_refused(ready: FaultyRegistry, client: Client) -> None:
    url = f"/v2/{REPOSITORY}/referrers/{SUBJECT.digest}"
    headers = {"Content-Type": media_types.OCI_INDEX, "Link": f'<{url}>; rel="next"'}

    def page(exchange: Exchange) -> None:
        exchange.send(Reply(200, headers, index_of(about(1))))

    ready.faults.add("GET", "/referrers/", page, times=None)
    with pytest.raises(RegistryError, match="pagination loop"):
        listed(client)


def test_a_tag_that_is_something_else_is_left_alone(ready: FaultyRegistry, client: Client) -> None:
    other = Manifest.build(EMPTY, [EMPTY], artifact_type="application/x-other")
    client.repository.write_manifest(other.descriptor, other.raw, TAG)
    with pytest.raises(UnsupportedError, match="index of referrers"):
        push(client, about(1))
    assert client.repository.resolve(TAG).digest == other.digest


def test_another_writer_in_between_loses_nothing(ready: FaultyRegistry, client: Client) -> None:
    """Another client overwrites our list: reading it again after the write detects that."""
    push(client, about(0))

    def overwritten(exchange: Exchange) -> None:
        reply = exchange.reply()
        ready.put_manifest(index_of(about(0), about(7)), tag=TAG, media_type=media_types.OCI_INDEX)
        exchange.send(reply)

    ready.faults.add("PUT", TAG, overwritten)
    push(client, about(1))
    assert listed(client) == {about(0).digest, about(1).digest, about(7).digest}


def test_a_registry_that_checks_if_match(ready: FaultyRegistry, client: Client) -> None:
    push(client, about(0))

    def tagged(exchange: Exchange) -> None:
        reply = exchange.reply()
        exchange.send(Reply(reply.status, {**reply.headers, "ETag": '"x"'}, reply.body))

    ready.faults.add("GET", TAG, tagged, times=None)
    ready.faults.add("PUT", TAG, answering(412))
    push(client, about(1))
    assert listed(client) == {about(0).digest, about(1).digest}
    sent = [
        r.headers.get("if-match") for r in ready.requests if r.method == "PUT" and TAG in r.path
    ]
    assert sent == [None, '"x"', '"x"']


def test_giving_up_where_others_never_stop(ready: FaultyRegistry, client: Client) -> None:
    ready.faults.add("PUT", TAG, answering(409), times=None)
    with pytest.raises(ConflictError, match="keep changing"):
        push(client, about(1))


def test_a_fallback_tag_that_is_immutable(ready: FaultyRegistry, client: Client) -> None:
    """A 412 without an `If-Match` is not about another writer: Harbor's immutable tags."""
    push(client, about(0))
    ready.faults.add("PUT", TAG, answering(412), times=None)
    with pytest.raises(RegistryError, match="412") as caught:
        push(client, about(1))
    assert caught.value.hint == "the registry refused to move the tag: push to another one"
    assert ready.count("PUT", TAG) == 2
    assert listed(client) == {about(0).digest}


def test_a_redirect_to_a_web_page_is_a_missing_api(
    ready: FaultyRegistry, storage: FaultyRegistry, client: Client
) -> None:
    """GHCR responds with 303 to a page of another host, which limits requests."""
    push(client, about(1))
    ready.faults.add("GET", "/referrers/", redirecting(storage, 303), times=None)
    assert listed(client) == {about(1).digest}
    assert storage.requests == []
    ready.faults.clear()
    ready.faults.add("GET", "/referrers/", redirecting(storage, 307), times=None)
    assert listed(client) == {about(1).digest}
    assert storage.count("GET", "/referrers/") == 1, "other redirects are followed"


@pytest.mark.parametrize("kind", ["faulty", "docker-registry"])
def test_threads_that_attach_at_once(kind: str, tmp_path: Path) -> None:
    server = FaultyRegistry() if kind == "faulty" else docker_registry(tmp_path / "registry")
    with server as running:
        host = running.host if isinstance(running, FaultyRegistry) else running
        with Client(host) as client:
            made = [about(number) for number in range(8)]
            with Registry(host) as first:
                empty = Content(b"{}")
                repository = first.repository(REPOSITORY)
                repository.write_blob(EMPTY, empty, client.watch)
            failures: list[Exception] = []

            def attach(manifest: Manifest) -> None:
                try:
                    with Registry(host) as own:
                        own.repository(REPOSITORY).write_manifest(manifest.descriptor, manifest.raw)
                except Exception as error:
                    failures.append(error)

            threads = [threading.Thread(target=attach, args=(one,)) for one in made]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert failures == []
            assert listed(client) == {one.digest for one in made}
            gone = threading.Thread(
                target=client.repository.delete_referrer, args=(made[0].digest,)
            )
            gone.start()
            push(client, about(99))
            gone.join()
            assert listed(client) == {*(one.digest for one in made[1:]), about(99).digest}


def test_deletion_where_the_registry_deletes_nothing(ready: FaultyRegistry, client: Client) -> None:
    push(client, about(1))
    ready.faults.add("DELETE", "/manifests/", answering(405), times=None)
    client.repository.delete_referrer(about(1).digest)
    assert listed(client) == set()
    ready.faults.clear()
    # The list is not kept by clients, so a refusal is a failure.
    push(client, about(2))
    client.repository.delete_manifest(TAG)
    ready.faults.add("DELETE", "/manifests/", answering(405), times=None)
    with pytest.raises(RegistryError):
        client.repository.delete_referrer(about(2).digest)
