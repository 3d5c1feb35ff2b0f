"""The pull-through cache: fetched once, verified, and served without the upstream afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast
from urllib.parse import urlencode

import pytest
import requests
from starlette.requests import ClientDisconnect, Request

import modelpack
from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import MAX_DOCUMENT_BYTES
from modelpack.artifacts.manifest import Manifest
from modelpack.errors import ModelpackError, NotFoundError, RemoteUnavailableError
from modelpack.operations.remote import RemoteOptions
from modelpack.progress import Stop, silent
from modelpack.registry import Credential, Registry, RetryPolicy, StaticCredentials, Timeouts
from modelpack.registry_server import RegistryServer
from modelpack.registry_server.auth import PasswordFile, Passwords
from modelpack.registry_server.blob_fetch import Fetches
from modelpack.registry_server.cache import _MOST_WAITING, Upstream
from modelpack.registry_server.errors import ApiError
from modelpack.registry_server.server import NO_LIMITS
from modelpack.registry_server.uploads import Limits
from modelpack.storage import BlobReader, BytesBlob, Watch
from tests.cli.running import modelpack as command_line
from tests.registry.auth_servers import HTPASSWD
from tests.registry.faults import (
    Exchange,
    answering,
    cut_after,
    flipped_bit,
    held_until,
    redirecting,
    replaced,
    silent_after,
)
from tests.registry.faulty import FaultyRegistry
from tests.registry.faulty_auth import BasicAuth, basic
from tests.scenarios.processes import finish, start
from tests.server.conftest import Client, index
from tests.weights import write_safetensors

MIB = 1024 * 1024
WEIGHTS = random.Random(6).randbytes(3 * MIB)
NAME = "team/model"
QUICK = RetryPolicy(tries=2, sleep=lambda _: None)


class Caching:
    """An upstream with a model, and a factory of caches before it."""

    def __init__(self, upstream: FaultyRegistry, work: Path, stack: ExitStack) -> None:
        self.upstream = upstream
        self.root = work / "cache"
        self._work = work
        self._stack = stack
        self.manifest = self.publish(WEIGHTS)
        self.weight = max(self.manifest.layers, key=lambda layer: layer.size)
        self.path = f"/blobs/{self.weight.digest}"
        upstream.requests.clear()

    def publish(self, weights: bytes, tag: str = "v1") -> Manifest:
        files = self._work / f"files-{Digest.of(weights).short}"
        write_safetensors(files / "model.safetensors", weights)
        request = modelpack.PackageRequest(safetensors_dir=files)
        store = modelpack.Store(self._work / "origin")
        there = f"{self.upstream.host}/{NAME}:{tag}"
        auth, self.upstream.auth = self.upstream.auth, None
        made = modelpack.package(there, request, push=True, store=store)
        self.upstream.auth = auth
        return made.manifest

    def cache(
        self,
        ttl: float = 1000,
        credentials: StaticCredentials | None = None,
        idle: float = 20,
        limits: Limits = NO_LIMITS,
    ) -> str:
        """Serve the same cache, perhaps again; return its host."""
        origin = self._stack.enter_context(
            Registry(
                self.upstream.host,
                credentials=credentials or StaticCredentials({}),
                retry=QUICK,
                timeouts=Timeouts(connect=2, idle=idle),
            )
        )
        server = RegistryServer(
            self.root,
            address="127.0.0.1:0",
            upstream=Upstream(origin, ttl),
            grace=2,
            limits=limits,
        )
        return self._stack.enter_context(server).host

    def pull(self, host: str, tag: str = "v1") -> Digest:
        """Pull from a cache into an empty store, and verify every byte."""
        number = len(list(self._work.glob("client-*")))
        store = modelpack.Store(self._work / f"client-{number}-{threading.get_ident()}")
        there = f"{host}/{NAME}:{tag}"
        pulled = modelpack.pull(there, store=store, remote=RemoteOptions(retry=QUICK))
        for file in modelpack.resolve(there, store=store).files:
            assert file.path.stat().st_size > 0
        assert store.fsck(watch=Watch(silent, Stop())).ok
        return pulled.digest

    def check(self) -> None:
        assert modelpack.Store(self.root).fsck(watch=Watch(silent, Stop())).ok


@pytest.fixture
def caching(tmp_path: Path) -> Iterator[Caching]:
    with FaultyRegistry() as upstream, ExitStack() as stack:
        yield Caching(upstream, tmp_path, stack)


def test_a_model_is_fetched_once(caching: Caching) -> None:
    host = caching.cache()
    for _ in range(3):
        assert caching.pull(host) == caching.manifest.digest
    for blob in caching.manifest.unique_blobs:
        assert caching.upstream.count("GET", f"/blobs/{blob.digest}") == 1
    assert caching.upstream.count("GET", "/manifests/") == 1
    assert caching.upstream.count("HEAD") == 0
    caching.check()


@pytest.mark.parametrize("path", ["/manifests/", "/blobs/", "/tags/"])
def test_an_upstream_leads_into_no_private_network(caching: Caching, path: str) -> None:
    host = caching.cache()
    caching.upstream.faults.add(
        "*", path, redirecting("http://169.254.169.254/latest/"), times=None
    )
    url = f"http://{host}/v2/{NAME}"
    tail = {"/manifests/": "manifests/v1", "/blobs/": "manifests/v1", "/tags/": "tags/list"}[path]
    answer = requests.get(f"{url}/{tail}", timeout=20)
    assert answer.status_code == 502
    assert "refused to connect" in answer.text


def test_a_tag_is_looked_up_again_by_head(caching: Caching) -> None:
    host = caching.cache(ttl=0)
    for _ in range(2):
        caching.pull(host)
    assert caching.upstream.count("GET", "/manifests/") == 1
    assert caching.upstream.count("HEAD", "/manifests/") >= 1


@pytest.mark.parametrize(("ttl", "moves"), [(0, True), (1000, False)])
def test_a_tag_that_moves(caching: Caching, ttl: float, moves: bool) -> None:
    host = caching.cache(ttl)
    caching.pull(host)
    new = caching.publish(b"other weights")
    assert caching.pull(host) == (new if moves else caching.manifest).digest
    old = requests.get(f"http://{host}/v2/{NAME}/manifests/{caching.manifest.digest}", timeout=10)
    assert old.content == caching.manifest.raw
    caching.check()


def test_a_tag_that_went(caching: Caching) -> None:
    host = caching.cache(ttl=0)
    caching.pull(host)
    caching.upstream.content.tags.clear()
    with pytest.raises(NotFoundError):
        caching.pull(host)


@pytest.mark.parametrize("again", [False, True], ids=["the same server", "another server"])
def test_it_works_without_the_upstream(caching: Caching, again: bool) -> None:
    host = caching.cache(ttl=0)
    caching.pull(host)
    caching.upstream.faults.add("*", "/v2/", answering(503), times=None)
    if again:
        host = caching.cache(ttl=0)
    assert caching.pull(host) == caching.manifest.digest
    url = f"http://{host}/v2/{NAME}"
    assert requests.get(f"{url}/tags/list", timeout=10).json()["tags"] == ["v1"]
    unknown = requests.get(f"{url}/manifests/v2", timeout=10)
    assert unknown.status_code == 504
    assert "cannot be reached" in unknown.text


def test_many_that_want_one_blob_make_one_download(caching: Caching) -> None:
    release = threading.Event()
    caching.upstream.faults.add("GET", caching.path, held_until(release))
    host = caching.cache()
    url = f"http://{host}/v2/{NAME}"
    requests.get(f"{url}/manifests/v1", timeout=10).raise_for_status()

    def fetch(_: int) -> bytes:
        return requests.get(f"{url}{caching.path}", timeout=30).content

    with ThreadPoolExecutor(8) as pool:
        all_of_them = [pool.submit(fetch, number) for number in range(8)]
        release.set()
        contents = {Digest.of(one.result()) for one in all_of_them}
    assert contents == {caching.weight.digest}
    assert caching.upstream.count("GET", caching.path) == 1


def test_what_is_here_is_sent_while_the_rest_comes(caching: Caching) -> None:
    half, release = 2 * MIB, threading.Event()

    def send_in_halves(exchange: Exchange) -> None:
        reply = exchange.reply()
        exchange.send_head(200, {"Content-Length": str(len(reply.body))})
        exchange.write(reply.body[:half])
        release.wait(30)
        exchange.write(reply.body[half:])

    caching.upstream.faults.add("GET", caching.path, send_in_halves)
    url = f"http://{caching.cache()}/v2/{NAME}"
    requests.get(f"{url}/manifests/v1", timeout=10).raise_for_status()
    with requests.get(url + caching.path, stream=True, timeout=30) as answer:
        start = answer.raw.read(MIB // 2)
        release.set()
        assert Digest.of(start + answer.raw.read()) == caching.weight.digest


def test_ranges_and_heads(caching: Caching) -> None:
    url = f"http://{caching.cache()}/v2/{NAME}"
    requests.get(f"{url}/manifests/v1", timeout=10).raise_for_status()
    head = requests.head(url + caching.path, timeout=10)
    assert int(head.headers["Content-Length"]) == caching.weight.size
    assert caching.upstream.count("GET", caching.path) == 0, "asking is not fetching"
    part = requests.get(url + caching.path, headers={"Range": "bytes=-1000"}, timeout=30)
    assert (part.status_code, len(part.content)) == (206, 1000)
    whole = requests.get(url + caching.path, timeout=30).content
    assert whole[-1000:] == part.content
    assert Digest.of(whole) == caching.weight.digest


def test_cuts_are_mended(caching: Caching) -> None:
    for _ in range(3):
        caching.upstream.faults.add("GET", caching.path, cut_after(MIB // 2))
    assert caching.pull(caching.cache()) == caching.manifest.digest


@pytest.mark.parametrize(
    "fault", [flipped_bit(5), flipped_bit(3 * MIB - 5), answering(404), answering(401)]
)
def test_a_blob_that_is_wrong_is_neither_kept_nor_sent_whole(
    caching: Caching, fault: Callable[[Exchange], None]
) -> None:
    host = caching.cache()
    caching.upstream.faults.add("GET", caching.path, fault, times=None)
    with pytest.raises(ModelpackError):
        caching.pull(host)
    kept = caching.root / "blobs" / "sha256" / caching.weight.digest.encoded
    assert not kept.exists()
    caching.upstream.faults.clear()
    assert caching.pull(host) == caching.manifest.digest
    caching.check()


def test_who_comes_while_a_blob_is_fetched_again_waits_for_it(caching: Caching) -> None:
    arrived, release = threading.Event(), threading.Event()

    def held(exchange: Exchange) -> None:
        arrived.set()
        assert release.wait(30), "released in the end"
        exchange.send(exchange.reply())

    caching.upstream.faults.add("GET", caching.path, flipped_bit(5))
    caching.upstream.faults.add("GET", caching.path, held)
    url = f"http://{caching.cache()}/v2/{NAME}"
    requests.get(f"{url}/manifests/v1", timeout=10).raise_for_status()
    with pytest.raises(requests.RequestException):  # cut, or it waits for the second fetch as well
        requests.get(url + caching.path, timeout=0.5)
    assert arrived.wait(30), "it is fetched again"
    with pytest.raises(requests.ReadTimeout):
        requests.get(url + caching.path, timeout=0.5)
    release.set()
    answer = requests.get(url + caching.path, timeout=30)
    assert Digest.of(answer.content) == caching.weight.digest
    caching.check()


def test_a_size_that_another_manifest_claims_has_no_wrong_blob_sent(caching: Caching) -> None:
    content, raw = caching.upstream.content, json.loads(caching.manifest.raw)
    for layer in raw["layers"]:
        layer["size"] += 2 * MIB  # so much more to come before the end
    liar, lie = "other/model", json.dumps(raw).encode()
    content.manifests[liar, str(Digest.of(lie))] = caching.manifest.media_type, lie
    content.tags[liar, "v1"] = str(Digest.of(lie))
    content.blobs |= {(liar, digest): blob for (_, digest), blob in content.blobs.items()}
    arrived, release = threading.Event(), threading.Event()

    def wrong(exchange: Exchange) -> None:
        exchange.send_head(200, {"Transfer-Encoding": "chunked"})
        exchange.write(b"%x\r\n%s\r\n" % (caching.weight.size, bytes(caching.weight.size)))
        arrived.set()
        assert release.wait(30), "released in the end"
        exchange.write(b"0\r\n\r\n")

    caching.upstream.faults.add("GET", caching.path, wrong)
    base = f"http://{caching.cache()}/v2"
    for name in (NAME, liar):
        requests.get(f"{base}/{name}/manifests/v1", timeout=10).raise_for_status()
    with requests.get(f"{base}/{liar}{caching.path}", stream=True, timeout=10):
        assert arrived.wait(30), "the other size is being fetched"
        with pytest.raises(requests.ReadTimeout):
            requests.get(f"{base}/{NAME}{caching.path}", timeout=1)
        release.set()
    answer = requests.get(f"{base}/{NAME}{caching.path}", timeout=30)
    assert Digest.of(answer.content) == caching.weight.digest


def test_a_manifest_that_is_wrong_is_not_kept(caching: Caching) -> None:
    host = caching.cache()
    caching.upstream.faults.add("GET", "/manifests/", replaced(b'{"schemaVersion":2}'), times=None)
    by_digest = f"http://{host}/v2/{NAME}/manifests/{caching.manifest.digest}"
    assert requests.get(by_digest, timeout=10).status_code == 502
    assert modelpack.Store(caching.root).models() == ()


def test_a_silent_upstream_is_left(caching: Caching) -> None:
    caching.upstream.faults.add("GET", "/manifests/", silent_after(3), times=None)
    with pytest.raises(RemoteUnavailableError):
        caching.pull(caching.cache(idle=0.3))


@pytest.mark.long
@pytest.mark.parametrize(
    ("path", "arriving"),
    [
        ("manifests/another-{}", 10),  # some of the names share a lock
        ("tags/list", _MOST_WAITING),
        ("referrers/{}", _MOST_WAITING),
    ],
)
def test_what_is_here_is_served_while_the_upstream_is_silent(
    caching: Caching, path: str, arriving: int
) -> None:
    host = caching.cache()
    caching.pull(host)
    url = f"http://{host}/v2/{NAME}"
    arrived, release = threading.Semaphore(0), threading.Event()

    def silent(exchange: Exchange) -> None:
        arrived.release()
        release.wait(60)
        exchange.send(exchange.reply())

    caching.upstream.faults.add("*", f"/{path.partition('/')[0]}/", silent, times=None)

    def ask(number: int) -> int:
        subject = Digest.of(bytes([number]))
        name = path.format(subject if "referrers" in path else number)
        return requests.get(f"{url}/{name}", timeout=60).status_code

    with ThreadPoolExecutor(60) as pool:
        asked = [pool.submit(ask, number) for number in range(60)]
        try:
            for _ in range(arriving):
                assert arrived.acquire(timeout=30), "they wait for the upstream"
            for kept in (f"manifests/{caching.manifest.digest}", caching.path.strip("/")):
                assert requests.get(f"{url}/{kept}", timeout=10).status_code == 200
        finally:
            release.set()
        assert {one.result() for one in asked} <= {200, 404}


def test_credentials_stay_on_their_side(caching: Caching) -> None:
    caching.upstream.auth = BasicAuth("cache", "of-the-cache")
    ours = StaticCredentials({caching.upstream.host: Credential("cache", "of-the-cache")})
    url = f"http://{caching.cache(credentials=ours)}/v2/{NAME}"
    theirs = {"Authorization": basic("client", "of-the-client")}
    for path in ("/manifests/v1", caching.path, "/tags/list", "/manifests/none"):
        answer = requests.get(url + path, headers=theirs, timeout=30)
        assert answer.status_code == (404 if path.endswith("none") else 200)
        assert "www-authenticate" not in answer.headers
        assert b"of-the-cache" not in answer.content
        assert basic("cache", "of-the-cache") not in str(answer.headers)
    sent = {request.headers.get("authorization") for request in caching.upstream.requests}
    assert sent == {None, basic("cache", "of-the-cache")}


def test_wrong_credentials_are_our_problem(caching: Caching) -> None:
    caching.upstream.auth = BasicAuth("cache", "of-the-cache")
    wrong = StaticCredentials({caching.upstream.host: Credential("bob", "wr0ng", source="a-file")})
    for known in (None, wrong):
        host = caching.cache(credentials=known)
        answer = requests.get(f"http://{host}/v2/{NAME}/manifests/v1", timeout=10)
        assert answer.status_code == 502, "401 would have the client send its own"
        for secret in ("bob", "wr0ng", "a-file"):
            assert secret not in answer.text


def test_nothing_is_written_through_it(caching: Caching) -> None:
    client = Client(f"http://{caching.cache()}", NAME)
    assert client.request("POST", "blobs/uploads/").status_code == 405
    assert client.put_manifest("v1", caching.manifest.raw).status_code == 405
    assert client.request("DELETE", "manifests/v1").status_code == 405


@pytest.mark.parametrize("held", [False, True], ids=["fetched", "stored"])
def test_a_namespace_that_is_the_upstream(caching: Caching, held: bool) -> None:
    """containerd sends the registry of the name to a mirror, as `ns`."""
    host = caching.cache()
    if held:
        caching.pull(host)
    for path in ("/manifests/v1", caching.path, "/tags/list"):
        url = f"http://{host}/v2/{NAME}{path}"
        for method in ("GET", "HEAD") if path != "/tags/list" else ("GET",):
            query = {"ns": caching.upstream.host}
            answer = requests.request(method, url, params=query, timeout=30)
            assert answer.status_code == 200
            assert answer.headers["OCI-Namespace"] == caching.upstream.host
        plain = requests.get(url, timeout=30)
        assert plain.status_code == 200
        assert "OCI-Namespace" not in plain.headers
    assert not any("ns" in request.query for request in caching.upstream.requests)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "ns", ["ghcr.io", "docker.io", "a\r\nX-Evil: 1", "HOST/x", "HOST:443", "x" * 5000]
)
def test_a_namespace_that_is_another_registry(caching: Caching, ns: str) -> None:
    """Its content is not the upstream's, whatever the names have in common."""
    host = caching.cache()
    caching.pull(host)
    caching.upstream.requests.clear()
    other = ns.replace("HOST", caching.upstream.host)
    for path in ("/manifests/v1", caching.path, "/tags/list", "/referrers/sha256:" + "0" * 64):
        url = f"http://{host}/v2/{NAME}{path}"
        for query in ({"ns": other}, {"ns": [caching.upstream.host, other]}):
            answer = requests.get(url, params=query, timeout=30)
            assert answer.status_code == 404
            assert answer.json()["errors"][0]["code"] == "NAME_UNKNOWN"
            assert len(answer.content) < 1000
            assert "OCI-Namespace" not in answer.headers
            assert "X-Evil" not in answer.headers
    assert caching.upstream.requests == []


@pytest.mark.parametrize(
    ("upstream", "ns", "served"),
    [
        ("docker.io", "docker.io", True),
        ("docker.io", "registry-1.docker.io", True),
        ("registry-1.docker.io", "docker.io", True),
        ("ghcr.io", "GHCR.io", True),
        ("ghcr.io", "ghcr.io:443", True),
        ("ghcr.io", "", True),
        ("ghcr.io", "docker.io", False),
        ("ghcr.io", "ghcr.io.example", False),
        ("ghcr.io:8443", "ghcr.io", False),
        ("[2001:db8::1]:443", "[2001:db8::1]", True),
        ("[2001:db8::1]", "[2001:db8::1]:444", False),
    ],
)
def test_namespaces(upstream: str, ns: str, served: bool) -> None:
    request = Request({"type": "http", "query_string": urlencode({"ns": ns}).encode()})
    with Registry(upstream) as origin:
        if served:
            assert Upstream(origin).namespace(request) == (ns or None)
        else:
            with pytest.raises(ApiError, match="does not serve the registry"):
                Upstream(origin).namespace(request)


def test_a_namespace_is_no_way_past_the_password(caching: Caching, tmp_path: Path) -> None:
    """Strangers get 401 whatever they name, so they do not learn which registry is cached."""
    passwords = tmp_path / "htpasswd"
    passwords.write_text(HTPASSWD)
    with (
        Registry(caching.upstream.host, retry=QUICK) as origin,
        RegistryServer(
            caching.root,
            address="127.0.0.1:0",
            upstream=Upstream(origin),
            guard=Passwords(PasswordFile(passwords)),
            grace=2,
        ) as server,
    ):
        for ns in (caching.upstream.host, "ghcr.io"):
            url = f"http://{server.host}/v2/{NAME}/manifests/v1"
            assert requests.get(url, params={"ns": ns}, timeout=10).status_code == 401


def test_only_blobs_of_known_manifests_are_fetched(caching: Caching) -> None:
    url = f"http://{caching.cache()}/v2/{NAME}"
    assert requests.get(url + caching.path, timeout=10).status_code == 404
    assert caching.upstream.requests == []


@pytest.mark.parametrize("reference", ["all", "digest"])
def test_an_index_comes_with_its_manifests(caching: Caching, reference: str) -> None:
    raw = index(index(caching.manifest.raw), caching.manifest.raw)
    inner = index(caching.manifest.raw)
    for one, tag in ((inner, None), (raw, "all")):
        caching.upstream.put_manifest(one, tag, media_type=media_types.OCI_INDEX)
    name = str(Digest.of(raw)) if reference == "digest" else reference
    url = f"http://{caching.cache()}/v2/{NAME}"
    assert requests.get(f"{url}/manifests/{name}", timeout=10).content == raw
    caching.upstream.faults.add("*", "/manifests/", answering(503), times=None)
    for digest in (Digest.of(inner), caching.manifest.digest):
        answer = requests.get(f"{url}/manifests/{digest}", timeout=10)
        assert json.loads(answer.content)["schemaVersion"] == 2
    assert Digest.of(requests.get(url + caching.path, timeout=30).content) == caching.weight.digest
    caching.check()


def test_a_config_that_no_reader_takes_is_not_fetched(caching: Caching) -> None:
    raw = json.loads(caching.manifest.raw)
    raw["config"]["size"] = MAX_DOCUMENT_BYTES + 1
    caching.upstream.put_manifest(json.dumps(raw).encode(), "large")
    answer = requests.get(f"http://{caching.cache()}/v2/{NAME}/manifests/large", timeout=10)
    assert answer.status_code == 400
    assert "config" in answer.text
    assert caching.upstream.count("GET", "/blobs/") == 0


def test_room_to_keep(caching: Caching, tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    limits = Limits(keep_free=disk.f_blocks * disk.f_frsize + 1)
    base = f"http://{caching.cache()}/v2/{NAME}"
    requests.get(f"{base}/manifests/v1", timeout=10).raise_for_status()
    full = f"http://{caching.cache(limits=limits)}/v2/{NAME}"
    assert requests.get(full + caching.path, timeout=10).status_code == 507
    caching.publish(WEIGHTS[:-1], "v2")
    caching.upstream.requests.clear()
    assert requests.get(f"{full}/manifests/v2", timeout=10).status_code == 507
    assert caching.upstream.count("GET", "/blobs/") == 0
    assert Digest.of(requests.get(base + caching.path, timeout=30).content) == caching.weight.digest


class Waiting:
    """A request whose client stays connected until the test says otherwise."""

    def __init__(self, *, gone: bool = False) -> None:
        self.gone = gone

    async def is_disconnected(self) -> bool:
        return self.gone


class Held:
    """A blob that is sent when the test allows it."""

    def __init__(self, content: bytes, may_come: threading.Event) -> None:
        self.descriptor = Descriptor("x/y", Digest.of(content), len(content))
        self.opened = threading.Event()
        self._content, self._may_come = content, may_come

    @contextmanager
    def open(self, offset: int = 0) -> Iterator[BlobReader]:
        self.opened.set()
        assert self._may_come.wait(30), "it may come in the end"
        with BytesBlob(self._content).open(offset) as reader:
            yield reader


def test_downloads_wait_for_their_turn_as_long_as_anybody_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelpack.registry_server.blob_fetch.MOST_AT_A_TIME", 1)
    may_come = threading.Event()
    fetches = Fetches(modelpack.Store(tmp_path / "store"), Stop())
    blobs = [Held(bytes([number]), may_come) for number in range(3)]
    first, left, last = [fetches.of(blob.descriptor, lambda b=blob: b) for blob in blobs]

    async def follow() -> None:
        with pytest.raises(ClientDisconnect):
            await fetches.begin(left, cast(Request, Waiting(gone=True)))
        may_come.set()
        for fetch in (first, last):
            await fetches.begin(fetch, cast(Request, Waiting()))

    assert blobs[0].opened.wait(30), "the first begins at once"
    assert not any(blob.opened.is_set() for blob in blobs[1:])
    asyncio.run(follow())
    assert blobs[2].opened.is_set()
    assert not blobs[1].opened.is_set()
    assert left.error is not None
    again = fetches.of(blobs[1].descriptor, lambda: blobs[1])
    asyncio.run(fetches.begin(again, cast(Request, Waiting())))
    assert blobs[1].opened.is_set()


@pytest.mark.long
def test_the_command(caching: Caching) -> None:
    words = ("--addr", "127.0.0.1:0", "--root", caching.root, "--upstream", caching.upstream.host)
    process = start("registry", "serve", *words)
    try:
        assert process.stdout is not None
        host = process.stdout.readline().strip()
        assert caching.pull(host) == caching.manifest.digest
    finally:
        process.terminate()
        ended = finish(process)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ftp://a", "ftp://a"),
        ("https://", "https://"),
        ("https://a/b", "https://a/b"),
        ("a/b", "a/b"),
        ("user:secret@a", "a"),
        ("https://user:secret@a/b", "a/b"),
    ],
)
def test_what_is_no_upstream(url: str, shown: str, tmp_path: Path) -> None:
    failed = command_line("registry", "serve", "--root", tmp_path / "store", "--upstream", url)
    assert failed.code == 2
    assert f"--upstream {shown!r}: expected HOST" in failed.err
    assert "secret" not in failed.err
