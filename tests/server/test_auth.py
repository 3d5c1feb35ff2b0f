"""Access to the registry: passwords, tokens, TLS, and addresses beyond loopback."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import requests

from modelpack.errors import AuthError, UsageError
from modelpack.operations.push import push
from modelpack.operations.remote import RemoteOptions
from modelpack.registry import Credential, StaticCredentials, TlsOptions
from modelpack.registry_server import RegistryServer, RequestRecord
from modelpack.registry_server.auth import (
    BearerTokens,
    Guard,
    PasswordFile,
    Passwords,
    TokenSettings,
)
from modelpack.registry_server.server import create_app
from modelpack.storage import Outcome
from modelpack.store.layout import LayoutStore
from tests.cli.running import modelpack, succeed
from tests.models import tiny_gguf
from tests.peers import require
from tests.registry.auth_servers import (
    HTPASSWD,
    ISSUER,
    PASSWORD,
    SERVICE,
    USER,
    Pair,
    make_pair,
    token_server,
)
from tests.registry.sources import Client, Content, read_all
from tests.server.conftest import digest_of

ADA = Credential(USER, PASSWORD)


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("signer"), "signer")


@pytest.fixture
def htpasswd(tmp_path: Path) -> Path:
    path = tmp_path / "htpasswd"
    path.write_text(f"# users\n\n{HTPASSWD}")
    return path


@contextmanager
def serving(tmp_path: Path, guard: Guard | None, **options: Any) -> Iterator[RegistryServer]:
    options.setdefault("address", "127.0.0.1:0")
    with RegistryServer(tmp_path / "store", guard=guard, grace=1, **options) as server:
        yield server


@pytest.fixture
def guarded(tmp_path: Path, htpasswd: Path) -> Iterator[RegistryServer]:
    with serving(tmp_path, Passwords(PasswordFile(htpasswd))) as server:
        yield server


def client_of(server: RegistryServer, credential: Credential | None, **options: Any) -> Client:
    known = {server.host: credential} if credential else {}
    return Client(server.host, credentials=StaticCredentials(known), **options)


def test_a_password(guarded: RegistryServer) -> None:
    with client_of(guarded, ADA) as client:
        assert client.write(b"weights") is Outcome.WRITTEN
        assert read_all(client.repository, Content(b"weights").descriptor) == b"weights"
    with (
        client_of(guarded, Credential(USER, "wrong")) as client,
        pytest.raises(AuthError, match="refused"),
    ):
        client.registry.ping()
    with (
        client_of(guarded, None) as client,
        pytest.raises(AuthError, match="none are stored for it"),
    ):
        client.registry.ping()


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Basic",
        "Basic !!!",
        "Basic YWRh",  # no colon
        "Basic " + "A" * 30_000,
        "Bearer abc",
        requests.auth._basic_auth_str("eve", PASSWORD),
        requests.auth._basic_auth_str(USER, PASSWORD + "x"),
        requests.auth._basic_auth_str(USER, ""),
        requests.auth._basic_auth_str(USER, "x" * 73),
        requests.auth._basic_auth_str(USER, PASSWORD + "\0"),
    ],
)
def test_what_is_refused(guarded: RegistryServer, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    for _ in range(2):
        answer = requests.get(f"{guarded.url}/v2/", headers=headers, timeout=10)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"].startswith('Basic realm="modelpack"')
        assert answer.headers["Docker-Distribution-Api-Version"] == "registry/2.0"
        assert answer.json()["errors"][0]["code"] == "UNAUTHORIZED"


def test_every_endpoint_asks(tmp_path: Path, htpasswd: Path) -> None:
    guard = Passwords(PasswordFile(htpasswd))
    store = LayoutStore(tmp_path / "store")
    routes = create_app(store, guard=guard).routes
    values = {"name:path": "a/b", "session": "0", "reference": "v1", "digest": "sha256:0"}
    asked = 0
    with serving(tmp_path, guard) as server:
        for route in routes:
            path = str(getattr(route, "path", ""))
            for name, value in values.items():
                path = path.replace(f"{{{name}}}", value)
            for method in getattr(route, "methods", None) or ():
                answer = requests.request(method, server.url + path, data=b"x", timeout=10)
                assert answer.status_code == 401, (method, path)
                asked += 1
    assert asked >= 20
    assert list(store.models()) == []


def test_guesses_do_not_keep_users_out(
    guarded: RegistryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{guarded.url}/v2/"
    known = (ADA.username, ADA.password)
    assert requests.get(url, auth=known, timeout=10).status_code == 200
    guessing, go_on = threading.Semaphore(0), threading.Event()

    def slow(*_: bytes) -> bool:
        guessing.release()
        go_on.wait(60)
        return False

    monkeypatch.setattr("modelpack.registry_server.auth.bcrypt.checkpw", slow)

    def guess(number: int) -> int:
        return requests.get(url, auth=(ADA.username, f"{number}"), timeout=60).status_code

    with ThreadPoolExecutor(60) as pool:
        guesses = [pool.submit(guess, number) for number in range(60)]
        try:
            for _ in range(2):
                assert guessing.acquire(timeout=30), "two passwords are compared"
            assert requests.get(url, auth=known, timeout=10).status_code == 200
        finally:
            go_on.set()
        assert {one.result() for one in guesses} == {401}


def test_the_file_is_read_again(tmp_path: Path, htpasswd: Path) -> None:
    users = PasswordFile(htpasswd)
    assert users.check(USER, PASSWORD)
    assert users.check(USER, PASSWORD)
    assert PASSWORD not in f"{users!r} {vars(users)}"
    salted = bcrypt.hashpw(b"new", bcrypt.gensalt(4)).decode()
    _rewrite(htpasswd, f"ada:{salted}\nbob:{salted}\n")
    assert not users.check(USER, PASSWORD)
    assert users.check(USER, "new")
    assert users.check("bob", "new")
    _rewrite(htpasswd, "broken")
    assert users.check("bob", "new"), "a file that is being written locks nobody out"
    htpasswd.unlink()
    assert users.check("bob", "new")


def _rewrite(path: Path, text: str) -> None:
    other = path.with_suffix(".new")
    other.write_text(text)
    os.replace(other, path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no users"),
        ("# nobody\n", "no users"),
        ("ada:secret-in-the-clear\n", "line 1"),
        (HTPASSWD + "bob:{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g=\n", "line 2"),
        (HTPASSWD + "bob:$apr1$x$y\n", "line 2"),
        (":" + HTPASSWD.partition(":")[2], "line 1"),
        ("ada:$2y$31$" + "a" * 53, "line 1"),  # would take years to check
        ("\xff", "UTF-8"),
    ],
)
def test_files_that_are_refused(htpasswd: Path, text: str, problem: str) -> None:
    htpasswd.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=problem) as caught:
        PasswordFile(htpasswd)
    assert "secret" not in str(caught.value)


def test_tls(tmp_path: Path, htpasswd: Path, signer: Pair) -> None:
    pair = make_pair(tmp_path, "server", signer)
    guard = Passwords(PasswordFile(htpasswd))
    with serving(tmp_path, guard, tls=(pair.certificate, pair.key)) as server:
        assert server.url.startswith("https://")
        options = {"plain_http": False, "tls": TlsOptions(signer.certificate)}
        with client_of(server, ADA, **options) as client:
            assert client.write(b"weights" * 1000) is Outcome.WRITTEN
            assert read_all(client.repository, Content(b"weights" * 1000).descriptor)
    with pytest.raises(UsageError, match="are not a certificate and its key"):
        RegistryServer(tmp_path / "store", tls=(pair.certificate, signer.key))


def test_addresses_that_others_reach(tmp_path: Path, htpasswd: Path) -> None:
    with pytest.raises(UsageError, match="asks for no password") as caught:
        RegistryServer(tmp_path / "store", address="0.0.0.0:0")
    assert "--allow-anonymous" in str(caught.value.hint)
    with serving(tmp_path, Passwords(PasswordFile(htpasswd)), address="0.0.0.0:0") as server:
        port = server.host.rpartition(":")[2]
        answer = requests.get(f"http://127.0.0.1:{port}/v2/", timeout=10)
        assert answer.status_code == 401


def test_records_show_no_passwords(tmp_path: Path, htpasswd: Path) -> None:
    records: list[RequestRecord] = []
    guard = Passwords(PasswordFile(htpasswd))
    with serving(tmp_path, guard, on_request=records.append) as server:
        requests.get(f"{server.url}/v2/", auth=(USER, PASSWORD), timeout=10)
    assert records[0].status == 200
    assert records[0].headers["authorization"] == "Basic"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--token-realm", "https://t.example"], "token authentication requires"),
        (["--tls-key", __file__], "requires --tls-cert"),
        (["--htpasswd", __file__], "is not a user with a bcrypt hash"),
        (["--tls-cert", __file__], "not a certificate and its key"),
        (["--addr", "0.0.0.0:0"], "--allow-anonymous"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, arguments: list[str], problem: str) -> None:
    result = modelpack("registry", "serve", "--root", tmp_path / "store", *arguments)
    assert result.code == 2
    assert problem in result.err


def test_log_in_push_and_pull(
    guarded: RegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io
    import sys

    reference = f"{guarded.host}/team/tiny:v1"
    succeed("package", "--gguf", tiny_gguf(tmp_path), reference)
    assert modelpack("push", reference).code == 4
    monkeypatch.setattr(sys, "stdin", io.StringIO(PASSWORD))
    succeed("login", guarded.host, "-u", USER, "--password-stdin")
    digest = succeed("push", reference).out
    succeed("rm", reference)
    assert succeed("pull", reference).out == digest
    assert digest_of(b"")[:7] == digest[:7]


@pytest.mark.peer("skopeo")
@pytest.mark.parametrize("kind", ["password", "tokens"])
def test_skopeo_logs_in_and_copies(tmp_path: Path, htpasswd: Path, signer: Pair, kind: str) -> None:
    skopeo = require("skopeo")
    pair = make_pair(tmp_path / "pki", "server", signer)
    trust = tmp_path / "trust"
    trust.mkdir()
    (trust / "ca.crt").write_bytes(signer.certificate.read_bytes())
    tls = (pair.certificate, pair.key)
    reference = "team/tiny:v1"
    digest = succeed("package", "--gguf", tiny_gguf(tmp_path), reference).out
    with token_server(signer, tls=pair) as tokens:
        settings = TokenSettings(f"{tokens.url}/token", SERVICE, ISSUER, signer.certificate)
        guard: Guard = (
            Passwords(PasswordFile(htpasswd)) if kind == "password" else BearerTokens(settings)
        )
        with serving(tmp_path, guard, tls=tls) as server:
            here = f"docker://{server.host}/{reference}"
            source = StaticCredentials({server.host: ADA})
            authority = TlsOptions(signer.certificate)
            remote = RemoteOptions(plain_http=False, tls=authority, credentials=source)
            push(reference, to=f"{server.host}/{reference}", remote=remote)
            inspect = [skopeo, "inspect", "--raw", "--cert-dir", trust, here]
            refused = subprocess.run(inspect, capture_output=True, text=True, timeout=60)
            # The token server gives tokens to pull to everybody.
            assert (refused.returncode == 0) is (kind == "tokens")
            known = [*inspect, "--creds", f"{USER}:{PASSWORD}"]
            shown = subprocess.run(known, capture_output=True, timeout=60)
            assert shown.returncode == 0, shown.stderr
            assert digest_of(shown.stdout) == digest
            copied = f"docker://{server.host}/team/copied:v1"
            copy = [skopeo, "copy", "--preserve-digests", "--src-cert-dir", trust]
            copy += ["--dest-cert-dir", trust, "--dest-creds", f"{USER}:{PASSWORD}"]
            copy += ["--src-creds", f"{USER}:{PASSWORD}", here, copied]
            done = subprocess.run(copy, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
