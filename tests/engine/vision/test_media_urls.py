"""Pictures in http(s) URLs: hosts that the operator allows, and nothing of a private network."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, quote, urlsplit

import anyio
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from modelpack import package
from modelpack.builder.request import PackageRequest
from modelpack.errors import UsageError
from modelpack.registry.urls import origin_of
from modelpack.store.layout import LayoutStore
from modelpack_engine.errors import QueueFullError, RequestError
from modelpack_engine.worker import threads as worker_threads
from modelpack_engine.worker.threads import in_thread
from modelpack_server.api import media_urls
from modelpack_server.api.app import create_app
from modelpack_server.api.media_urls import MediaHost, MediaUrls
from modelpack_server.conversation.pictures import PictureFiles, PictureReader, PictureUrl
from modelpack_server.pool.pool import ModelPool
from tests.engine.serving.test_api import wait_until_ready
from tests.engine.serving.test_serve import command
from tests.engine.serving.tiny import TinyCatalogue
from tests.engine.vision import tiny
from tests.engine.vision.media import saved
from tests.engine.vision.media import url as data_url
from tests.engine.worker.test_workers import until
from tests.registry.auth_servers import make_pair

PNG = saved(Image.new("RGB", (8, 6), (10, 20, 30)))
PUBLIC, OTHER = "93.184.216.34", "2606:4700:4700::1111"
CDN = "cdn.example"


class Pictures(ThreadingHTTPServer):
    """A server of files on loopback; it records the heads of its requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.files: dict[str, tuple[str, bytes]] = {}  # by path, with their content type
        self.release = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        """Print nothing when a client leaves."""

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class _Handler(BaseHTTPRequestHandler):
    server: Pictures

    def do_GET(self) -> None:
        self.server.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        parts = urlsplit(self.path)
        given = {name: values[0] for name, values in parse_qs(parts.query).items()}
        match parts.path:
            case "/to":
                self._head(int(given.get("status", 302)), {"Location": given["url"]})
            case "/hop":
                left = int(given["left"])
                self._head(302, {"Location": f"/hop?left={left - 1}" if left else "/a.png"})
            case "/endless":
                self._head(200, {"Content-Type": "image/png"})
                while not self.server.release.is_set():
                    self.wfile.write(bytes(65536))
            case "/slow":
                self._head(200, {"Content-Type": given.get("type", "image/png")})
                self.wfile.write(PNG[:9])
                self.server.release.wait(30)
                self.wfile.write(PNG[9:])
            case "/head":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nA: ")
                while not self.server.release.wait(0.01):
                    self.wfile.write(b"a")
            case "/cut":
                self._head(200, {"Content-Type": "image/png", "Content-Length": "1000"})
                self.wfile.write(PNG)
            case "/nonsense":
                self.wfile.write(b"SSH-2.0-server secret\r\n")
            case "/status":
                self._head(int(given["is"]), {"Content-Type": "image/png"})
            case _:
                kind, body = self.server.files.get(parts.path, ("image/png", PNG))
                head = {"Content-Type": given.get("type", kind), **self._extra(given)}
                self._head(200, head)
                self.wfile.write(body)

    def _extra(self, given: dict[str, str]) -> dict[str, str]:
        names = {"encoding": "Content-Encoding", "length": "Content-Length", "cookie": "Set-Cookie"}
        return {names[key]: value for key, value in given.items() if key in names}

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[Pictures]:
    with Pictures() as made:
        yield made
        made.release.set()
        made.shutdown()


class Net:
    """Addresses of names, by lookup, and the addresses that were connected to."""

    def __init__(self) -> None:
        self.names: dict[str, list[list[str]]] = {}
        self.lookups: list[str] = []
        self.connected: list[str] = []


@pytest.fixture
def net(server: Pictures, monkeypatch: pytest.MonkeyPatch) -> Net:
    """All addresses are the server, whatever the port."""
    made = Net()
    real_lookup, real_connect = socket.getaddrinfo, anyio.connect_tcp

    def look_up(host: str, port: Any, *arguments: Any, **options: Any) -> list[Any]:
        if host not in made.names:
            return list(real_lookup(host, port, *arguments, **options))
        made.lookups.append(host)
        answers = made.names[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    async def connect(remote_host: str, remote_port: int, **options: Any) -> Any:
        made.connected.append(remote_host)
        return await real_connect("127.0.0.1", server.port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(anyio, "connect_tcp", connect)
    return made


def fetch(urls: MediaUrls, url: str, seconds: float = 5.0, max_bytes: int = 1 << 20) -> bytes:
    """Return the file at a URL, fetched as in a server."""

    def work() -> bytes:
        given = {"owner": "a", "seconds": seconds, "max_bytes": max_bytes}
        with urls.fetched(url, "here", **given) as data:  # type: ignore[arg-type]
            return data

    return asyncio.run(in_thread(work))


def refused(urls: MediaUrls, url: str, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        fetch(urls, url, **options)
    assert caught.value.param == "here"
    text = f"{caught.value} {caught.value.hint}"
    assert text.startswith("here: the URL cannot be fetched: ")
    for private in ("secret", "10.0.0.5", "169.254", "127.0.0.1", PUBLIC):
        assert private not in text or private in url.partition("?")[0]
    return text


def test_a_picture_is_fetched(server: Pictures) -> None:
    urls = MediaUrls([f"127.0.0.1:{server.port}"])
    assert fetch(urls, f"{server.url}/a%20b.png?sig=a%2Fb&x=1#part") == PNG
    [(path, headers)] = server.requests
    assert path == "/a%20b.png?sig=a%2Fb&x=1"
    assert headers["host"] == f"127.0.0.1:{server.port}"


def test_nothing_of_the_environment_is_sent(
    server: Pictures, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    urls = MediaUrls([f"127.0.0.1:{server.port}"])
    for _ in range(2):
        assert fetch(urls, f"{server.url}/a.png?cookie=a%3Db") == PNG
    assert [set(headers) for _, headers in server.requests] == [
        {"host", "user-agent", "accept", "accept-encoding", "connection"}
    ] * 2


#: URLs that are refused before anything is looked up, with a part of the message. The hosts
#: allowed are cdn.example, on the standard ports, and 127.0.0.1:9.
REFUSED_URLS = [
    ("ftp://cdn.example/a.png", "expected an http or https URL"),
    ("file:///etc/passwd", "expected an http or https URL"),
    ("gopher://cdn.example:70/_", "expected an http or https URL"),
    ("//cdn.example/a.png", "expected an http or https URL"),
    ("http://", "no valid host"),
    ("http:cdn.example", "no valid host"),
    ("http://user:secret@cdn.example/a.png", "contains a user name"),
    ("http://cdn.example@10.0.0.5/a.png", "contains a user name"),
    ("http://cdn.example:secret@evil.example/", "contains a user name"),
    ("http://cdn.example\\@evil.example/", "a backslash"),
    ("http://evil.example#@cdn.example/", "'evil.example' is not one of"),
    ("http://evil.example?@cdn.example/", "'evil.example' is not one of"),
    ("http://evil.example/cdn.example", "'evil.example' is not one of"),
    ("http://cdn.example.evil.example/", "is not one of"),
    ("http://evilcdn.example/", "is not one of"),
    ("http://sub.cdn.example/", "is not one of"),
    ("http://cdn.example./a.png", "is not one of"),
    ("http://cdn.example:8080/a.png", "is not one of"),
    ("https://cdn.example:80/a.png", "is not one of"),
    ("http://cdn.example:22/", "is not one of"),
    ("http://cdn.example:0/", "no valid host"),
    ("http://cdn.example:99999/", "does not parse"),
    ("http://127.0.0.1/", "is not one of"),
    ("http://127.0.0.1:10/", "is not one of"),
    ("http://localhost:9/", "is not one of"),
    ("http://[::1]:9/", "is not one of"),
    ("http://[::ffff:127.0.0.1]:9/", "is not one of"),
    ("http://2130706433:9/", "is not one of"),
    ("http://0x7f.1:9/", "is not one of"),
    ("http://0177.0.0.1:9/", "is not one of"),
    ("http://127.1:9/", "is not one of"),
    ("http://0.0.0.0:9/", "is not one of"),
    ("http://169.254.169.254/latest/meta-data/", "is not one of"),
    ("http://cdn.exampl\u0435/", "no valid host"),
    ("http://cdn\u3002example/", "no valid host"),
    ("http://cdn.example/a\r\nHost: evil.example", "a control character"),
    ("http://cdn.example/ a", "a space"),
    ("http://[fe80::1%25eth0]/", "no valid host"),
    ("http://[::1/", "does not parse"),
    ("http://cdn.example/" + "a" * 20_000, "more than the limit"),
]


@pytest.mark.parametrize(("url", "message"), REFUSED_URLS, ids=[u[:40] for u, _ in REFUSED_URLS])
def test_refused_urls(url: str, message: str, net: Net, server: Pictures) -> None:
    net.names = {"cdn.example": [[PUBLIC]], "evil.example": [[PUBLIC]]}
    urls = MediaUrls([CDN, "127.0.0.1:9"])
    with pytest.raises(RequestError) as caught:
        urls.check(url, "here")
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)
    assert message in refused(urls, url)
    assert net.lookups == net.connected == server.requests == []


_PIECES = [
    "http:", "https:", "//", "/", "\\", "@", ":", "80", "443", "8080", "?", "#", "..", ".", "%",
    "%2f", "%00", "[", "]", "::1", "[::1]", "cdn.example", "CDN.EXAMPLE", "evil.example",
    "127.0.0.1", "user", ";", "&", "=", " ", "\t", "\r\n", "\u3002", "\u0430", "\ud83d", "a",
    "\xff", "|", "^",
]  # fmt: skip


@given(st.lists(st.sampled_from(_PIECES), max_size=9), st.booleans())
@settings(suppress_health_check=list(HealthCheck), deadline=None)
def test_requests_go_to_the_address_for_the_host(pieces: list[str], begun: bool) -> None:
    """Whatever other parsers make of a URL that passes the check."""
    url = ("http://cdn.example" if begun else "") + "".join(pieces)
    urls = MediaUrls([CDN, f"{CDN}:8080"])
    try:
        checked, _ = urls._checked(url)
    except media_urls._RefusedError:
        return
    made = media_urls._request(checked, origin_of(checked), PUBLIC)
    assert (made.url.host, made.url.userinfo) == (PUBLIC, b"")
    assert made.headers["host"] in (CDN, f"{CDN}:8080", f"{CDN}:443", f"{CDN}:80")
    assert made.url.port in (None, 8080)
    assert made.url.raw_path.startswith(b"/")


#: Addresses to which the allowed name may not lead.
PRIVATE_ADDRESSES = [
    "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.5", "172.16.0.1", "192.168.0.1", "100.64.0.1",
    "100.100.100.200", "169.254.169.254", "192.0.0.192", "198.18.0.1", "224.0.0.1", "240.0.0.1",
    "255.255.255.255", "0.1.2.3", "::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.5",
    "::ffff:169.254.169.254", "::127.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b::a00:5", "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1", "2002:7f00:1::", "2002:a00:5::",
    "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "5f00::1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE_ADDRESSES)
def test_names_of_private_addresses(address: str, net: Net, server: Pictures) -> None:
    """Also beside a public one, whichever the connection would try first."""
    for answer in ([address], [PUBLIC, address], [address, PUBLIC]):
        net.names[CDN] = [answer]
        text = refused(MediaUrls([CDN]), f"http://{CDN}/a.png")
        assert "its host has an address that is not public" in text
    assert net.connected == server.requests == []


def test_the_connection_goes_to_the_address_that_was_checked(net: Net, server: Pictures) -> None:
    """The name resolves to loopback the next time (DNS rebinding)."""
    net.names[CDN] = [[PUBLIC], ["127.0.0.1"]]
    assert fetch(MediaUrls([CDN]), f"http://{CDN}/a.png") == PNG
    assert (net.lookups, net.connected) == ([CDN], [PUBLIC])
    assert server.requests[0][1]["host"] == CDN
    assert "not public" in refused(MediaUrls([CDN]), f"http://{CDN}/a.png")


def test_a_redirect_is_looked_up_again(net: Net, server: Pictures) -> None:
    net.names[CDN] = [[PUBLIC], ["10.0.0.5"]]
    text = refused(MediaUrls([CDN]), f"http://{CDN}/to?url=/a.png")
    assert "its host has an address that is not public" in text
    assert net.connected == [PUBLIC]


def test_a_url_that_is_too_long_once_it_is_encoded(net: Net, server: Pictures) -> None:
    net.names[CDN] = [[PUBLIC]]
    assert "the URL is not valid" in refused(
        MediaUrls([CDN]), f"http://{CDN}/" + "\U0001f600" * 9000
    )
    assert net.connected == []


def test_ipv6(net: Net) -> None:
    net.names[CDN] = [[OTHER]]
    assert fetch(MediaUrls([CDN]), f"http://{CDN}/a.png") == PNG
    assert net.connected == [OTHER]


REDIRECTS = [
    "http://127.0.0.1/", "http://localhost/", "http://10.0.0.5/secret", "http://[::1]/",
    "http://169.254.169.254/latest/meta-data/", "http://evil.example/", "//evil.example/a.png",
    "http://cdn.example:8080/", "http://user:secret@cdn.example/", "file:///etc/passwd",
    "data:image/png;base64,aGk=", "ftp://cdn.example/", "gopher://cdn.example/",
    "http://2130706433/", "http://cdn.example\\@evil.example/", "http://cdn.example:0/",
]  # fmt: skip


@pytest.mark.parametrize("target", REDIRECTS)
@pytest.mark.parametrize("status", [302, 307])
def test_redirects_elsewhere(target: str, status: int, net: Net, server: Pictures) -> None:
    net.names = {CDN: [[PUBLIC]], "evil.example": [[PUBLIC]]}
    url = f"http://{CDN}/to?status={status}&url={quote(target, safe='')}"
    assert "it redirects to a URL that is not allowed" in refused(MediaUrls([CDN]), url)
    assert net.lookups == [CDN]
    assert len(server.requests) == 1


def test_redirects_are_counted(server: Pictures) -> None:
    urls = MediaUrls([f"127.0.0.1:{server.port}"])
    assert fetch(urls, f"{server.url}/hop?left=2") == PNG
    assert len(server.requests) == 4
    server.requests.clear()
    assert "it redirects more than 3 times" in refused(urls, f"{server.url}/hop?left=3")
    assert len(server.requests) == 4


RESPONSES = [
    ("/a.png?type=text/html", "its content type is not that of a picture"),
    ("/a.png?type=application/json", "its content type is not that of a picture"),
    ("/a.png?type=x-image/png", "its content type is not that of a picture"),
    ("/a.png?encoding=gzip", "its content is compressed"),
    ("/a.png?length=9999999", "it has more than 1048576 bytes"),
    ("/a.png?length=" + "9" * 5000, "the server sends no valid response"),
    ("/a.png?length=-1", "the server sends no valid response"),
    ("/a.png?length=%C2%B2", "the server sends no valid response"),
    ("/endless", "it has more than 1048576 bytes"),
    ("/status?is=404", "the server responds with status 404"),
    ("/status?is=500", "the server responds with status 500"),
    ("/status?is=204", "the server responds with status 204"),
    ("/status?is=302", "the server responds with status 302"),
    ("/status?is=401", "the server responds with status 401"),
    ("/nonsense", "the server sends no valid response"),
    ("/cut", "the server closed the connection"),
]


@pytest.mark.parametrize(("path", "message"), RESPONSES, ids=[path[:40] for path, _ in RESPONSES])
def test_bad_responses(path: str, message: str, server: Pictures) -> None:
    urls = MediaUrls([f"127.0.0.1:{server.port}"])
    assert message in refused(urls, server.url + path)


@pytest.mark.parametrize("path", ["/slow", "/head"])
def test_slow_servers(path: str, server: Pictures) -> None:
    urls = MediaUrls([f"127.0.0.1:{server.port}"])
    assert "it takes longer than 0.3 s" in refused(urls, server.url + path, seconds=0.3)


def test_hosts_that_cannot_be_reached(net: Net) -> None:
    net.names[CDN] = [[]]
    assert "its host has no address" in refused(MediaUrls([CDN]), f"http://{CDN}/a.png")


def test_a_closed_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{taken.getsockname()[1]}"
        assert "no connection to its host" in refused(MediaUrls([host]), f"http://{host}/")


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("cdn.example", "http://CDN.example/"),
        ("CDN.example", "https://cdn.example:443/"),
        ("cdn.example:8080", "https://cdn.example:8080/"),
        ("10.0.0.5:9000", "http://10.0.0.5:9000/"),
        ("[::1]:9000", "http://[0:0::1]:9000/"),
        ("localhost", "http://localhost/"),
    ],
)
def test_hosts(text: str, allowed: str) -> None:
    MediaUrls([text]).check(allowed, "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a valid host"),
        ("*", "is not a valid host"),
        ("*.example", "is not a valid host"),
        ("http://cdn.example", "is not a valid host"),
        ("cdn.example/a", "is not a valid host"),
        ("user@cdn.example", "is not a valid host"),
        ("cdn.example:0", "is not a valid host"),
        ("cdn.example:99999", "is not a valid host"),
        ("cdn.example?", "is not a valid host"),
        ("a b", "is not a valid host"),
        ("2130706433", "is not a valid host"),
        ("127.1", "is not a valid host"),
        ("169.254.169.254", "is a link-local or reserved address"),
        ("[fe80::1]", "is a link-local or reserved address"),
    ],
)
def test_bad_hosts(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MediaHost.parse(text)


def test_an_address_is_allowed_for_itself_alone(net: Net, server: Pictures) -> None:
    """A name beside it stays public only."""
    net.names[CDN] = [["10.0.0.5"]]
    urls = MediaUrls([CDN, "10.0.0.5", "localhost"])
    assert fetch(urls, "http://10.0.0.5/a.png") == PNG
    assert "not public" in refused(urls, f"http://{CDN}/a.png")
    assert net.connected == ["10.0.0.5"]
    net.names["localhost"] = [["10.0.0.5"]]
    assert "not public" in refused(urls, "http://localhost/a.png")


def test_tls(server: Pictures, net: Net, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The certificate must be that of the name, although the connection goes to an address."""
    authority = make_pair(tmp_path, "authority")
    pair = make_pair(tmp_path, "server", authority, CDN)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    net.names = {CDN: [[PUBLIC]], "other.example": [[PUBLIC]]}
    assert fetch(MediaUrls([CDN]), f"https://{CDN}/a.png") == PNG
    text = refused(MediaUrls(["other.example"]), "https://other.example/a.png")
    assert "no connection to its host" in text
    text = refused(MediaUrls([CDN]), f"https://{CDN}/to?url=http://{CDN}/a.png")
    assert "it redirects to a URL that is not allowed" in text


@pytest.mark.parametrize(
    ("kind", "most", "waiting"),
    [
        ("image", media_urls.MAX_FETCHES_OF_OWNER, "MAX_WAITING"),
        ("video", media_urls.MAX_VIDEO_FETCHES_OF_OWNER, "MAX_VIDEOS_WAITING"),
    ],
)
def test_urls_wait_for_their_turn(
    kind: Literal["image", "video"],
    most: int,
    waiting: str,
    server: Pictures,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An owner takes few slots, leaves some to others, and too many waiting are refused."""
    monkeypatch.setattr(media_urls, waiting, 1)
    urls = MediaUrls([f"127.0.0.1:{server.port}"])

    def work(owner: str, path: str) -> bytes:
        path = f"{path}?type={kind}/png"
        given = {"owner": owner, "seconds": 30.0, "max_bytes": 1 << 20, "kind": kind}
        with urls.fetched(server.url + path, "here", **given) as data:  # type: ignore[arg-type]
            return data

    def run(owner: str, path: str = "/slow") -> bytes:
        return asyncio.run(in_thread(work, owner, path))

    with ThreadPoolExecutor(8) as threads:
        slow = [threads.submit(run, "a") for _ in range(most)]
        until(lambda: len(server.requests) == len(slow))
        slow.append(threads.submit(run, "a"))
        until(lambda: urls._slots[kind]._waiting == 1)
        with pytest.raises(QueueFullError, match="1 requests wait for files to be fetched"):
            run("a")
        assert run("b", "/a.png") == PNG
        assert len(server.requests) == len(slow)
        server.release.set()
        assert [future.result() for future in slow] == [PNG] * len(slow)
    assert not urls._slots[kind]._running


def test_a_cancelled_request_frees_its_slot(server: Pictures) -> None:
    urls = MediaUrls([f"127.0.0.1:{server.port}"])

    async def leave(begun: Callable[[], bool], path: str) -> None:
        reading = asyncio.create_task(in_thread(_read, urls, server.url + path))
        while not begun():
            await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        while urls._slots["image"]._running.total():
            await asyncio.sleep(0)

    asyncio.run(leave(lambda: bool(server.requests), "/slow"))
    assert not urls._slots["image"]._running
    assert fetch(urls, f"{server.url}/a.png") == PNG


def _read(urls: MediaUrls, url: str) -> int:
    with PictureFiles([PictureUrl(url, "here", urls)]) as files:
        return len([each.decode() for each in files])


def test_a_reader_takes_urls_of_allowed_hosts(server: Pictures) -> None:
    reader = PictureReader(urls=MediaUrls([f"127.0.0.1:{server.port}"]))
    part = reader.url(f"{server.url}/a.png", "here")
    assert not server.requests

    def pixels() -> tuple[int, ...]:
        with PictureFiles([part["picture"]]) as files:
            [found] = (file.decode() for file in files)
        return tuple(found.pixels[0, 0].tolist())

    assert asyncio.run(in_thread(pixels)) == (10, 20, 30)
    with pytest.raises(RequestError, match="is not one of the server's --allow-media-url"):
        reader.url("http://evil.example/a.png", "here")
    for path in ("file:///etc/passwd", "/etc/passwd", "../a.png", "a.png", "\\\\server\\a.png"):
        with pytest.raises(RequestError, match="is not a data: URL"):
            reader.url(path, "here")


@contextmanager
def serving(*hosts: str) -> Iterator[TestClient]:
    catalogue = TinyCatalogue(lambda: tiny.tiny_engine("llava", max_num_batched_tokens=256))
    pool = ModelPool(catalogue, memory=10_000, grace=0.0)
    with TestClient(create_app(pool, media_hosts=hosts)) as client:
        yield client


@pytest.fixture
def http(server: Pictures) -> Iterator[TestClient]:
    with serving(f"127.0.0.1:{server.port}") as client:
        yield client


def bodies(url: str) -> list[tuple[str, dict[str, Any]]]:
    """Return a request with the URL of a picture for each API that takes one."""
    text = {"type": "text", "text": "What is it?"}
    picture = {"type": "image_url", "image_url": {"url": url}}
    source = {"type": "image", "source": {"type": "url", "url": url}}
    asked = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "What?"}]
    return [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [picture, text]}]}),
        ("/v1/responses", {"input": [{"role": "user", "content": asked}]}),
        (
            "/v1/messages",
            {"max_tokens": 4, "messages": [{"role": "user", "content": [source, text]}]},
        ),
    ]


def test_each_refused_url_is_a_bad_request(net: Net, server: Pictures) -> None:
    """Status 400 in every API for all lists above, and a message that names the reason."""
    cdn = f"http://{CDN}"
    redirect = "it redirects to a URL that is not allowed"
    cases: list[tuple[str, str, list[str]]] = [
        *(
            # A request's reader, which takes data: URLs too, names them first.
            (url, "is not a data: URL" if "http or https" in message else message, [PUBLIC])
            for url, message in REFUSED_URLS
        ),
        *((f"{cdn}/a.png", "an address that is not public", [one]) for one in PRIVATE_ADDRESSES),
        *((f"{cdn}/to?url={quote(one, safe='')}", redirect, [PUBLIC]) for one in REDIRECTS),
        *(
            (cdn + path, message, [PUBLIC])
            for path, message in RESPONSES
            if "1048576" not in message  # the limit of `fetch`; a server's is larger
        ),
    ]
    net.names["evil.example"] = [[PUBLIC]]
    wrong = []
    with serving(CDN, "127.0.0.1:9") as client:
        for url, message, addresses in cases:
            net.names[CDN] = [addresses]
            for path, body in bodies(url):
                answer = client.post(path, json={"model": "tiny"} | body)
                if answer.status_code != 400 or message not in answer.json()["error"]["message"]:
                    wrong.append((path, url[:100], answer.status_code, answer.text))
    assert wrong == []
    assert set(net.connected) == {PUBLIC}


@pytest.mark.long
def test_all_apis(http: TestClient, server: Pictures) -> None:
    """Pictures in URLs have the answers of those in the request."""
    url = f"{server.url}/a.png"
    cases = zip(bodies(url), bodies(data_url(PNG)), strict=True)
    for (path, by_url), (_, by_data) in cases:
        given = {"model": "tiny", "temperature": 0}
        first = http.post(path, json=given | by_data)
        second = http.post(path, json=given | by_url)
        assert first.status_code == second.status_code == 200, second.text
        assert _said(first.json()) == _said(second.json())
    assert [path for path, _ in server.requests] == ["/a.png"] * 3
    authorization = {"Authorization": "Bearer secret", "Cookie": "a=secret"}
    for path, body in bodies(f"{server.url}/status?is=403"):
        refused = http.post(path, json={"model": "tiny"} | body, headers=authorization)
        assert refused.status_code == 400
        assert "the URL cannot be fetched: the server responds with status 403" in refused.text
    for path, body in bodies("http://10.0.0.5/a.png"):
        refused = http.post(path, json={"model": "tiny"} | body)
        assert refused.status_code == 400
        assert "'10.0.0.5' is not one of the server's --allow-media-url" in refused.text
    assert "secret" not in str(server.requests)


def test_what_is_refused_fetches_nothing(
    http: TestClient, server: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The context, the queue, and a bad picture before: as for pictures in the request."""
    picture = {"type": "image_url", "image_url": {"url": f"{server.url}/a.png"}}

    def ask(content: list[dict[str, Any]]) -> Any:
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
        return http.post("/v1/chat/completions", json=body)

    assert ask([{"type": "text", "text": "a" * 2000}, picture]).status_code == 400
    bad = {"type": "image_url", "image_url": {"url": data_url(b"bad")}}
    assert ask([bad, picture]).status_code == 400
    assert ask([picture] * 33).status_code == 400
    assert server.requests == []


@pytest.mark.long
def test_large_prompts_wait_for_no_pictures(
    http: TestClient, server: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large prompts share two threads, which pictures that are slow to arrive do not hold."""
    monkeypatch.setattr(worker_threads, "LARGE", 1)
    path, slow = bodies(f"{server.url}/slow")[0]
    text = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(http.post, path, json={"model": "tiny"} | slow) for _ in "ab"]
        until(lambda: len(server.requests) == 2)
        assert http.post(path, json=text).status_code == 200
        assert not any(future.done() for future in waiting)
        server.release.set()
        assert [future.result().status_code for future in waiting] == [200, 200]


@pytest.mark.long
def test_the_option_of_serve(server: Pictures, tmp_path: Path) -> None:
    store = LayoutStore(tmp_path / "store")
    package("tiny", PackageRequest(safetensors_dir=tiny.directory("llava")), store=store)
    process = subprocess.Popen(
        [*command(store, "tiny"), "--allow-media-url", f"127.0.0.1:{server.port}"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        wait_until_ready(url)
        for picture, status in ((f"{server.url}/a.png", 200), ("http://127.0.0.1:9/a.png", 400)):
            for path, body in bodies(picture):
                answer = requests.post(url + path, json={"model": "tiny"} | body, timeout=60)
                assert answer.status_code == status, answer.text
    finally:
        process.kill()
        process.communicate()
    assert len(server.requests) == 3


def _said(answer: dict[str, Any]) -> Any:
    """Return the text of a response of any API."""
    if "choices" in answer:
        return answer["choices"][0]["message"]["content"]
    if "output" in answer:
        return answer["output"][0]["content"][0]["text"]
    return answer["content"][0]["text"]
