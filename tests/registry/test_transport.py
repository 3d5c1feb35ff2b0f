"""Retries, redirects and errors; the numbers are those of the fault scenarios."""

from __future__ import annotations

import errno
import socket
import ssl
import threading

import pytest
import requests
import urllib3.exceptions

from modelpack.errors import (
    InterruptedTransferError,
    NotFoundError,
    RegistryError,
    RemoteTimeoutError,
    RemoteUnavailableError,
)
from modelpack.progress import Action, Stop
from modelpack.registry import Registry, RetryPolicy, uses_plain_http
from modelpack.registry.http_errors import ErrorBody, network_error
from modelpack.registry.limits import FailedTry, either
from modelpack.registry.urls import api_host
from tests.registry import faults
from tests.registry.faulty import FaultyRegistry
from tests.registry.sources import Client, Connect, manifest_for, read_all


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(
    registry: FaultyRegistry, client: Client, status: int
) -> None:
    descriptor, _ = manifest_for(registry)
    registry.faults.add("HEAD", "", faults.answering(status), times=4)
    assert client.repository.resolve("v1") == descriptor
    assert client.sleeps == [0.25, 0.5, 1.0, 2.0]


@pytest.mark.parametrize("status", [400, 405, 409, 410, 413, 414, 415, 422, 501, 505])
def test_what_will_not_pass_is_not(registry: FaultyRegistry, client: Client, status: int) -> None:
    descriptor, raw = manifest_for(registry)
    registry.faults.add("PUT", "", faults.answering(status), times=None)
    with pytest.raises(RegistryError, match=str(status)) as caught:
        client.repository.write_manifest(descriptor, raw)
    assert caught.value.status_code == status
    assert len(registry.requests) == 1


@pytest.mark.parametrize("retry_after", ["3", "Thu, 01 Jan 1970 00:00:03 GMT"])
@pytest.mark.scenario(13)
def test_retry_after_is_waited_for(
    registry: FaultyRegistry, client: Client, retry_after: str
) -> None:
    descriptor, _ = manifest_for(registry)
    fault = faults.answering(429, Retry_After=retry_after, Date="Thu, 01 Jan 1970 00:00:00 GMT")
    registry.faults.add("HEAD", "", fault, times=2)
    assert client.repository.resolve("v1") == descriptor
    assert client.sleeps == [3.0, 3.0]
    assert {report.action for report in client.reports} == {Action.RETRY}


@pytest.mark.scenario(13)
def test_a_wait_of_an_hour_is_refused(registry: FaultyRegistry, client: Client) -> None:
    registry.faults.add("HEAD", "", faults.answering(429, Retry_After="3600"), times=None)
    with pytest.raises(RemoteUnavailableError, match="asks to wait 3600 s") as caught:
        client.repository.resolve("v1")
    assert caught.value.status_code == 429
    assert client.sleeps == []


@pytest.mark.scenario(14)
def test_503_for_all_tries(registry: FaultyRegistry, client: Client) -> None:
    registry.faults.add("*", "", faults.answering(503), times=None)
    with pytest.raises(RemoteUnavailableError, match="503; given up after 5 tries") as caught:
        client.repository.resolve("v1")
    assert caught.value.exit_code == 6
    assert caught.value.host == registry.host
    assert sum(client.sleeps) < 5
    assert len(registry.requests) == 5


def test_a_refused_connection_is_tried_again(connect: Connect) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        client = connect(f"127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(RemoteUnavailableError, match="Connection refused") as caught:
            client.registry.ping()
    assert len(client.sleeps) == 4
    assert "`modelpack registry serve` starts a registry" in (caught.value.hint or "")


def test_a_body_that_is_cut_is_fetched_again(registry: FaultyRegistry, client: Client) -> None:
    descriptor, raw = manifest_for(registry)
    registry.faults.add("GET", "/manifests/", faults.cut_after(10), times=2)
    assert client.repository.fetch_manifest(descriptor) == raw
    assert len(client.sleeps) == 2


def test_a_host_that_does_not_exist_is_not_tried_again(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object, **__: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    client = connect("registry.invalid")
    with pytest.raises(RemoteUnavailableError, match=r"no such host: registry\.invalid"):
        client.registry.ping()
    assert client.sleeps == []


def test_http_where_https_is_expected(registry: FaultyRegistry, connect: Connect) -> None:
    client = connect(registry.host, plain_http=False)
    with pytest.raises(RemoteUnavailableError) as caught:
        client.registry.ping()
    assert client.sleeps == []
    assert "does not speak TLS" in str(caught.value)
    assert "--plain-http" in str(caught.value.hint)


@pytest.mark.scenario(18)
def test_ten_redirects_are_followed_and_no_more(registry: FaultyRegistry, client: Client) -> None:
    blob = registry.put_blob(b"weights")
    registry.faults.add("GET", "/blobs/", faults.redirecting(registry), times=10)
    assert read_all(client.repository, blob) == b"weights"
    registry.faults.add("GET", "/blobs/", faults.redirecting(registry), times=None)
    with pytest.raises(RegistryError, match="more than 10 redirects"):
        read_all(client.repository, blob)


@pytest.mark.scenario(18)
def test_a_redirect_from_https_to_http_is_refused() -> None:
    from modelpack.registry.urls import joined_url

    with pytest.raises(RegistryError, match="from https to plain http"):
        joined_url("https://registry.example/v2/x", "http://registry.example/y", "blob")
    assert joined_url("http://a.example/", "https://b.example/", "x") == "https://b.example/"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_every_redirect_of_a_get_is_followed(
    registry: FaultyRegistry, storage: FaultyRegistry, client: Client, status: int
) -> None:
    blob = storage.put_blob(b"weights")
    registry.faults.add("GET", "/blobs/", faults.redirecting(storage, status))
    assert read_all(client.repository, blob) == b"weights"


@pytest.mark.parametrize("status", [301, 302, 303])
def test_a_redirect_that_would_change_the_method_is_refused(
    registry: FaultyRegistry, storage: FaultyRegistry, client: Client, status: int
) -> None:
    descriptor, raw = manifest_for(registry)
    registry.faults.add("PUT", "", faults.redirecting(storage, status))
    with pytest.raises(RegistryError, match="refused to follow a redirect"):
        client.repository.write_manifest(descriptor, raw)
    assert storage.requests == []


def test_queries_are_not_shown(registry: FaultyRegistry, client: Client) -> None:
    blob = registry.put_blob(b"weights")
    secret = "http://127.0.0.1:1/blob?signature=s3cret"
    registry.faults.add("GET", "/blobs/", faults.redirecting(secret), times=None)
    with pytest.raises(RemoteUnavailableError) as caught:
        read_all(client.repository, blob)
    assert "s3cret" not in str(caught.value)
    assert not any("s3cret" in report.message for report in client.reports)


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b'{"errors":[{"code":"DENIED","message":"no","detail":{}}]}', "DENIED", "no"),
        (b'{"errors":[{"code":"X"},{"code":"Y"}]}', "X", ""),
        (b'{"errors":[{"message":"a\\u001b[31mb\\u202ec\\r\\n"}]}', None, "a [31mb c"),
        (b'{"errors":[{"code":7,"message":[]}]}', None, ""),
        (b'{"errors":[]}', None, ""),
        (b'{"errors":{}}', None, ""),
        (b'["errors"]', None, ""),
        (b"<html>", None, ""),
        (b"\xff\xfe", None, ""),
        (b"", None, ""),
        (b"[" * 60_000, None, ""),
    ],
)
def test_error_bodies(body: bytes, code: str | None, message: str) -> None:
    assert ErrorBody.parse(body) == (code, message)


def test_long_messages_are_shortened() -> None:
    assert len(ErrorBody.parse(b'{"errors":[{"message":"%s"}]}' % (b"x" * 9999)).message) <= 301


def test_an_error_without_a_body(registry: FaultyRegistry, client: Client) -> None:
    registry.faults.add("GET", "", faults.answering(404, b"<html>not here</html>"))
    with pytest.raises(NotFoundError, match="404"):
        client.repository.blob(registry.put_blob(b"weights")).open()


def _wrapped(inner: Exception, outer: type[Exception]) -> Exception:
    try:
        try:
            raise inner
        except Exception as error:
            raise outer("wrapped") from error
    except Exception as error:
        return error


def test_network_errors_are_translated() -> None:
    reset = network_error("x", "h", _wrapped(OSError(errno.ECONNRESET, "reset"), OSError))
    assert isinstance(reset, FailedTry)
    assert isinstance(reset.error, RemoteUnavailableError)
    assert "reset" in str(reset.error)
    late = network_error("x", "h", requests.ConnectTimeout())
    assert isinstance(late, FailedTry)
    inner = urllib3.exceptions.ReadTimeoutError(None, None, "late")  # type: ignore[arg-type]
    timeout = network_error("x", "h", requests.ConnectionError(inner))
    assert isinstance(timeout, FailedTry)
    assert isinstance(timeout.error, RemoteTimeoutError)
    untrusted = ssl.SSLCertVerificationError(1, "certificate verify failed")
    untrusted.verify_message = "self-signed certificate"
    error = network_error("x", "h", _wrapped(untrusted, OSError))
    assert isinstance(error, RemoteUnavailableError)
    assert "self-signed certificate" in str(error)
    assert "SSL_CERT_FILE" in str(error.hint)


@pytest.mark.parametrize(
    ("host", "plain"),
    [
        ("localhost", True),
        ("localhost:5000", True),
        ("LOCALHOST:5000", True),
        ("registry.localhost:80", True),
        ("127.0.0.1:5000", True),
        ("127.9.9.9", True),
        ("[::1]:5000", True),
        ("[::1]", True),
        ("docker.io", False),
        ("localhost.example.com", False),
        ("notlocalhost", False),
        ("10.0.0.1:5000", False),
        ("[::2]:5000", False),
        ("128.0.0.1", False),
        ("127.0.0.1.example.com", False),
    ],
)
def test_plain_http_is_for_this_machine(
    host: str, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert uses_plain_http(host) is plain
    assert uses_plain_http(host, True) is True
    assert uses_plain_http(host, False) is False
    monkeypatch.setenv("INSECURE_REGISTRY", "true")
    assert uses_plain_http(host) is True
    monkeypatch.setenv("INSECURE_REGISTRY", "false")
    assert uses_plain_http(host) is plain


def test_docker_hub_has_a_host_of_its_own() -> None:
    assert api_host("docker.io") == api_host("index.docker.io") == "registry-1.docker.io"
    assert api_host("ghcr.io") == "ghcr.io"
    with Registry("docker.io") as registry:
        assert registry.host == "docker.io"
        endpoint = registry.repository("ai/smollm2")._endpoint
        assert endpoint.tags_url() == "https://registry-1.docker.io/v2/ai/smollm2/tags/list"


@pytest.mark.parametrize("host", ["localhost", "[::1]:5000", "registry.example:5000"])
@pytest.mark.parametrize("name", ["a", "a/b/c", "my.models/x", "localhost/x"])
def test_urls_of_a_repository(host: str, name: str) -> None:
    with Registry(host, plain_http=True) as registry:
        endpoint = registry.repository(name)._endpoint
        assert endpoint.uploads_url() == f"http://{host}/v2/{name}/blobs/uploads/"
        assert endpoint.manifest_url("v1") == f"http://{host}/v2/{name}/manifests/v1"


def test_the_delay_doubles_and_is_shortened_by_chance() -> None:
    policy = RetryPolicy(chance=lambda: 0.0)
    assert [policy.delay(n) for n in (1, 2, 3, 8, 999)] == [0.25, 0.5, 1.0, 30.0, 30.0]
    assert RetryPolicy(chance=lambda: 1.0).delay(1) == 0.125


def test_either_stop() -> None:
    one, two = Stop(), Stop()
    assert either(one, one) is one
    both = either(one, two)
    both.check()
    both.wait(0.01)
    assert not both.is_requested()
    timer = threading.Timer(0.05, two.request)
    timer.start()
    with pytest.raises(InterruptedTransferError):
        both.wait(30)
    timer.join()
    assert both.is_requested()
    with pytest.raises(InterruptedTransferError):
        both.check()


def test_a_requested_stop_ends_every_call(registry: FaultyRegistry, client: Client) -> None:
    blob = registry.put_blob(b"x" * 5000)
    with client.repository.blob(blob).open() as stream:
        client.stop.request()
        with pytest.raises(InterruptedTransferError):
            stream.readinto(memoryview(bytearray(10)))
    for call in (
        lambda: client.repository.resolve("v1"),
        lambda: client.repository.has_blob(blob),
        lambda: list(client.repository.tags()),
        client.registry.ping,
    ):
        with pytest.raises(InterruptedTransferError):
            call()
    assert len(registry.requests) == 1
