"""Secrets are only sent to servers: not in logs, errors, tracebacks, reprs or arguments."""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from modelpack.registry import Credential, DockerConfig, Registry, StaticCredentials
from modelpack.registry.auth import Tokens, TokenServer
from tests.cli.running import modelpack
from tests.registry import faults
from tests.registry.faulty import FaultyRegistry
from tests.registry.faulty_auth import BasicAuth, BearerAuth
from tests.registry.sources import manifest_for

PASSWORD = "pass-w0rd/of+ada"
IDENTITY = "identity+of/ada"
#: Secrets in plain form, in headers, forms and files, and the tokens of the token server.
SECRETS = (
    PASSWORD,
    quote(PASSWORD, safe=""),
    base64.b64encode(f"ada:{PASSWORD}".encode()).decode(),
    base64.b64encode(PASSWORD.encode()).decode().rstrip("="),
    IDENTITY,
    quote(IDENTITY, safe=""),
    "secret-token-",
)


class Heard:
    """All log records and output of a test."""

    def __init__(self) -> None:
        self.records = io.StringIO()

    def check(self, *texts: object) -> None:
        """Fail if a secret is in the logs or in `texts`."""
        everything = "\n".join([self.records.getvalue(), *map(str, texts)])
        assert everything.strip(), "there is something to look through"
        for secret in SECRETS:
            assert secret not in everything


@pytest.fixture
def heard() -> Iterator[Heard]:
    """Record all loggers at the lowest level."""
    heard = Heard()
    handler = logging.StreamHandler(heard.records)
    handler.setFormatter(logging.Formatter("%(name)s %(message)s %(args)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield heard
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    return tmp_path / "config.json"


def basic() -> dict[str, str]:
    return {"auth": base64.b64encode(f"ada:{PASSWORD}".encode()).decode()}


def wrong_password(registry: FaultyRegistry) -> dict[str, str]:
    registry.auth = BasicAuth("ada", "another")
    return basic()


def wrong_password_for_tokens(registry: FaultyRegistry) -> dict[str, str]:
    registry.auth = BearerAuth("ada", "another")
    return basic()


def wrong_identity_token(registry: FaultyRegistry) -> dict[str, str]:
    registry.auth = BearerAuth("ada", "another", identity_token="another")
    return {"identitytoken": IDENTITY}


def useless_tokens(registry: FaultyRegistry) -> dict[str, str]:
    registry.auth = BearerAuth("ada", PASSWORD, uses=0)
    return basic()


def a_token_server_that_repeats(registry: FaultyRegistry) -> dict[str, str]:
    registry.auth = BearerAuth("ada", PASSWORD)
    body = json.dumps({"token": f"secret-token-\n{PASSWORD}"}).encode()
    registry.faults.add("*", "/token", faults.answering(200, body), times=None)
    return basic()


def a_token_server_that_breaks(registry: FaultyRegistry) -> dict[str, str]:
    registry.auth = BearerAuth("ada", PASSWORD, identity_token=IDENTITY)
    registry.faults.add("*", "/token", faults.answering(500, b"oops"), times=None)
    return {"identitytoken": IDENTITY}


def denied(registry: FaultyRegistry) -> dict[str, str]:
    registry.auth = BearerAuth("ada", PASSWORD)
    registry.faults.add("*", "/manifests/", faults.answering(403), times=None)
    return basic()


def a_registry_that_repeats(registry: FaultyRegistry) -> dict[str, str]:
    registry.auth = BearerAuth("ada", PASSWORD)
    registry.faults.add("*", "/manifests/", repeating(403, PASSWORD), times=None)
    return basic()


def a_token_server_that_repeats_in_errors(registry: FaultyRegistry) -> dict[str, str]:
    registry.auth = BearerAuth("ada", PASSWORD, identity_token=IDENTITY)
    registry.faults.add("*", "/token", repeating(401, IDENTITY), times=None)
    return {"identitytoken": IDENTITY}


def repeating(status: int, secret: str) -> faults.Fault:
    """Echo the request's credentials, and `secret`, which the client has too."""

    def fault(exchange: faults.Exchange) -> None:
        sent = exchange.headers.get("authorization", "")
        challenge = exchange.registry.auth and exchange.registry.auth.refusal(exchange)
        if challenge and status == 403:
            exchange.send(challenge)
            return
        message = f"I know {sent} and {secret}"
        body = json.dumps({"errors": [{"code": "DENIED", "message": message}]}).encode()
        faults.answering(status, body)(exchange)

    return fault


def a_token_that_no_header_takes(registry: FaultyRegistry) -> dict[str, str]:
    registry.auth = BearerAuth("ada", PASSWORD)
    return {"registrytoken": f"secret-token-1\n{PASSWORD}"}


def a_broken_file(registry: FaultyRegistry) -> dict[str, str]:
    registry.auth = BasicAuth("ada", PASSWORD)
    return {"auth": f"{PASSWORD}=not base64"}


def all_is_well(registry: FaultyRegistry) -> dict[str, str]:
    registry.auth = BearerAuth("ada", PASSWORD)
    return basic()


@pytest.mark.parametrize("json_errors", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize(
    "scenario",
    [
        wrong_password,
        wrong_password_for_tokens,
        wrong_identity_token,
        useless_tokens,
        a_token_server_that_repeats,
        a_token_server_that_breaks,
        denied,
        a_registry_that_repeats,
        a_token_server_that_repeats_in_errors,
        a_token_that_no_header_takes,
        a_broken_file,
        all_is_well,
    ],
)
def test_commands(
    registry: FaultyRegistry,
    config: Path,
    heard: Heard,
    monkeypatch: pytest.MonkeyPatch,
    scenario: Callable[[FaultyRegistry], dict[str, str]],
    json_errors: list[str],
) -> None:
    monkeypatch.setattr("modelpack.registry.limits.RetryPolicy.wait", lambda *_: None)
    manifest_for(registry)
    config.write_text(json.dumps({"auths": {registry.host: scenario(registry)}}))
    reference = f"{registry.host}/team/model:v1"
    result = modelpack("inspect", "--remote", "--debug", *json_errors, reference)
    assert (result.code == 0) is (scenario is all_is_well)
    assert registry.requests, "the registry was asked"
    heard.check(result.err, result.out)


def test_the_wire_is_not_shown(registry: FaultyRegistry, heard: Heard) -> None:
    """http.client does not print requests, whatever the level of the log."""
    assert http.client.HTTPConnection.debuglevel == 0
    registry.auth = BearerAuth("ada", PASSWORD)
    manifest_for(registry)
    source = StaticCredentials({registry.host: Credential("ada", PASSWORD)})
    with Registry(registry.host, credentials=source) as client:
        client.repository("team/model").resolve("v1")
        used = {r.headers.get("authorization", "").partition(" ")[0] for r in registry.requests}
        assert used == {"", "Basic", "Bearer"}
        heard.check(*everything_reachable(client))


def everything_reachable(client: Registry) -> Iterator[str]:
    """Yield the reprs of our objects behind a client."""
    todo: list[Any] = [client]
    seen: set[int] = set()
    while todo:
        found = todo.pop()
        if id(found) in seen or not type(found).__module__.startswith("modelpack"):
            continue
        seen.add(id(found))
        yield repr(found)
        yield f"{found}"
        todo += vars(found).values() if hasattr(found, "__dict__") else ()


def test_reprs() -> None:
    secret = Credential("ada", PASSWORD, IDENTITY, "secret-token-1")
    tokens = Tokens("r.example", lambda *_, **__: b'{"token": "secret-token-1"}')
    server = TokenServer("https://t.example/", "s")
    assert tokens.header(server, secret, frozenset(), None) == "Bearer secret-token-1"
    shown = [secret, [secret], tokens, tokens._kept, StaticCredentials({"r": secret})]
    Heard().check(*map(repr, shown), repr(DockerConfig()))


def test_arguments_of_all_programs(tmp_path: Path, config: Path) -> None:
    """Command lines are visible to all users: the helper records its own and that of its caller."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "docker-credential-spy"
    program.write_text(
        "#!/bin/sh\ncat >/dev/null\n"
        f'{{ echo "$0" "$@"; tr "\\0" " " </proc/$PPID/cmdline; }} >>{folder}/seen\n'
    )
    program.chmod(0o755)
    config.write_text('{"credsStore": "spy"}')
    with FaultyRegistry() as registry:
        registry.auth = BasicAuth("ada", PASSWORD)
        command = [sys.executable, "-m", "modelpack", "login", registry.host, "-u", "ada"]
        done = subprocess.run(
            [*command, "--password-stdin"],
            input=PASSWORD,
            env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            check=True,
        )
    seen = (folder / "seen").read_text()
    assert "store" in seen
    assert "--password-stdin" in seen
    Heard().check(seen, done.stdout, done.stderr)


def test_a_signature_is_not_shown(
    registry: FaultyRegistry, storage: FaultyRegistry, heard: Heard
) -> None:
    """A location may be signed: an error names its host, not its query."""
    blob = registry.put_blob(b"weights")
    location = f"{storage.url}/blobs/x?signature=secret-token-9"
    answer = faults.answering(307, Location=location)
    registry.faults.add("GET", "/blobs/", answer, times=None)
    storage.faults.add("GET", "", faults.answering(410), times=None)
    with (
        Registry(registry.host) as client,
        pytest.raises(Exception, match="410") as caught,
        client.repository("team/model").blob(blob).open() as reader,
    ):
        reader.readinto(memoryview(bytearray(7)))
    assert "/blobs/x" in heard.records.getvalue(), "urllib3 logs where we went"
    heard.check(caught.value, repr(caught.value))
