"""`modelpack login` and `logout`, and lookups of the stored credentials."""

from __future__ import annotations

import base64
import io
import json
import os
import pty
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modelpack.errors import AuthError
from modelpack.registry import Credential, DockerConfig, default_credentials
from tests.cli.running import Result, modelpack, succeed
from tests.registry import faults
from tests.registry.faulty import FaultyRegistry
from tests.registry.faulty_auth import BasicAuth, BearerAuth
from tests.registry.sources import manifest_for

ROOT = Path(__file__).parents[2]
# A helper that writes one file per action, with its stdin and its arguments.
HELPER = """#!/bin/sh
cat >{folder}/$1.in
echo "$@" >>{folder}/arguments
{more}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of Docker's config.json, which does not exist yet."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    return tmp_path / "docker" / "config.json"


def add_helper(folder: Path, monkeypatch: pytest.MonkeyPatch, more: str = "") -> None:
    folder.mkdir()
    program = folder / "docker-credential-test"
    program.write_text(HELPER.format(folder=folder, more=more))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def login(monkeypatch: pytest.MonkeyPatch, host: str, password: str, *more: str) -> Result:
    monkeypatch.setattr(sys, "stdin", io.StringIO(password))
    return modelpack("login", host, "--username", "ada", "--password-stdin", *more)


def test_in_and_out(
    registry: FaultyRegistry, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.auth = BasicAuth("ada", "s3cret")
    config.parent.mkdir()
    other = {"auth": "b3RoZXI6cHc="}
    old = {"auths": {"other.example": other, f"https://{registry.host}/v1/": {}}, "detachKeys": "x"}
    config.write_text(json.dumps(old))
    config.chmod(0o644)
    result = login(monkeypatch, registry.host, "s3cret\n", "--json")
    assert result.code == 0, result.err
    assert "plain text" in result.err
    assert result.json["checked"] is True
    entry = {"auth": base64.b64encode(b"ada:s3cret").decode()}
    assert json.loads(config.read_text()) == {
        "auths": {"other.example": other, registry.host: entry},
        "detachKeys": "x",
    }
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert list(config.parent.iterdir()) == [config]
    reference = f"{registry.host}/team/model:v1"
    manifest_for(registry)
    succeed("manifest", "--remote", reference)
    assert succeed("logout", registry.host).out == f"logged out of {registry.host}"
    assert list(json.loads(config.read_text())["auths"]) == ["other.example"]
    assert "not logged in" in succeed("logout", registry.host).out
    assert modelpack("manifest", "--remote", reference).code == 4


def test_a_wrong_password_is_not_kept(
    registry: FaultyRegistry, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.auth = BearerAuth("ada", "s3cret")
    result = login(monkeypatch, registry.host, "pa55word")
    assert result.code == 4
    assert "refused the credentials of 'ada'" in result.err
    assert "pa55word" not in result.err
    assert not config.exists()


def test_a_registry_that_does_not_ask(
    registry: FaultyRegistry, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = login(monkeypatch, registry.host, "s3cret")
    assert "stored without a check" in result.err
    assert registry.host in json.loads(config.read_text())["auths"]


def test_a_link_stays_a_link(
    registry: FaultyRegistry, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dotfiles").mkdir()
    config.parent.mkdir()
    config.symlink_to(tmp_path / "dotfiles" / "docker.json")
    assert login(monkeypatch, registry.host, "s3cret").code == 0
    assert config.is_symlink()
    assert registry.host in (tmp_path / "dotfiles" / "docker.json").read_text()


def test_the_helper_keeps_it(
    registry: FaultyRegistry, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.auth = BasicAuth("ada", "s3cret")
    folder = tmp_path / "helper"
    add_helper(folder, monkeypatch, f"[ $1 = get ] && cat {folder}/store.in; exit 0")
    config.parent.mkdir()
    config.write_text('{"credsStore": "test"}')
    result = login(monkeypatch, registry.host, "s3cret")
    assert result.code == 0, result.err
    assert "plain text" not in result.err
    kept = json.loads((folder / "store.in").read_text())
    assert kept == {"ServerURL": registry.host, "Username": "ada", "Secret": "s3cret"}
    assert config.read_text() == '{"credsStore": "test"}'
    assert default_credentials().credential(registry.host) == Credential(
        "ada", "s3cret", source="docker-credential-test"
    )
    succeed("logout", registry.host)
    assert (folder / "erase.in").read_text() == registry.host
    assert "s3cret" not in (folder / "arguments").read_text()


def test_a_helper_that_fails_and_tells(
    registry: FaultyRegistry, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "helper"
    add_helper(folder, monkeypatch, f"echo cannot keep; cat {folder}/store.in; exit 1")
    config.parent.mkdir()
    config.write_text('{"credsStore": "test"}')
    result = login(monkeypatch, registry.host, "s3cret", "--debug")
    assert result.code == 4
    assert "cannot keep" in result.err
    assert "s3cret" not in result.err


def test_an_identity_token(
    registry: FaultyRegistry, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.auth = BearerAuth("ada", "s3cret", identity_token="long-lived")
    monkeypatch.setattr(sys, "stdin", io.StringIO("long-lived\n"))
    succeed("login", registry.host, "-u", "<token>", "--password-stdin")
    found = DockerConfig().credential(registry.host)
    assert found is not None
    assert (found.username, found.identity_token) == ("", "long-lived")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["https://r.example", "-u", "ada", "--password-stdin"], "leave out https"),
        (["r.example/team", "-u", "ada", "--password-stdin"], "expected HOST"),
        (["r.example", "--password-stdin"], "requires --username"),
        (["r.example", "-u", "a:b", "--password-stdin"], "without a colon"),
        (["r.example", "-u", "ada"], "ask for the password: stdin is not a terminal"),
        (["r.example"], "ask for the user name: stdin is not a terminal"),
        (["r.example", "-u", "ada", "--client-key", __file__], "requires --client-cert"),
    ],
)
def test_what_makes_no_sense(
    config: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], problem: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("s3cret"))
    result = modelpack("login", *arguments)
    assert result.code == 2
    assert problem in result.err
    assert not config.exists()


@pytest.mark.parametrize("password", ["", "\n", "a\nb", "a\0b"])
def test_what_is_no_password(config: Path, monkeypatch: pytest.MonkeyPatch, password: str) -> None:
    result = login(monkeypatch, "r.example", password)
    assert result.code == 2
    assert "password" in result.err


def test_the_password_is_asked_for_and_not_echoed(registry: FaultyRegistry, config: Path) -> None:
    registry.auth = BasicAuth("ada", "s3cret")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "modelpack", "login", registry.host]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, cwd=ROOT
    ) as process:
        os.close(theirs)
        said = b""
        for prompt, answer in ((b"Username", b"ada\n"), (b"Password", b"s3cret\n")):
            while prompt not in said:
                said += os.read(ours, 1000)
            os.write(ours, answer)
        while True:
            try:
                part = os.read(ours, 1000)
            except OSError:  # the error of Linux if the other end is closed
                break
            if not part:
                break
            said += part
    os.close(ours)
    assert process.returncode == 0, said
    assert b"logged in" in said
    assert b"s3cret" not in said
    assert registry.host in config.read_text()


def auths(path: Path, **entries: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    value = {k: {"auth": base64.b64encode(v.encode()).decode()} for k, v in entries.items()}
    path.write_text(json.dumps({"auths": value}))


def username(host: str, repository: str = "") -> str | None:
    found = default_credentials(repository).credential(host)
    return found.username if found else None


def test_the_order_of_sources(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    host = "r.example"
    assert username(host) is None
    places = [
        (tmp_path / "xdg" / "containers" / "auth.json", "kept-by-podman"),
        (tmp_path / "run" / "containers" / "auth.json", "podman"),
        (config, "docker"),
        (tmp_path / "chosen.json", "chosen"),
    ]
    for path, name in places[:3]:
        auths(path, **{host: f"{name}:pw"})
        assert username(host) == name
    auths(places[3][0], **{host: "chosen:pw"})
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(places[3][0]))
    assert username(host) == "chosen"
    monkeypatch.setenv("MODELPACK_USERNAME", "environment")
    monkeypatch.setenv("MODELPACK_PASSWORD", "pw")
    with pytest.raises(AuthError, match="need MODELPACK_REGISTRY, which is not set") as caught:
        username(host)
    assert f"MODELPACK_REGISTRY={host}" in str(caught.value.hint)
    monkeypatch.setenv("MODELPACK_REGISTRY", "elsewhere.example")
    assert username(host) == "chosen", "bound to another host"
    monkeypatch.setenv("MODELPACK_REGISTRY", host)
    assert username(host) == "environment"
    monkeypatch.delenv("MODELPACK_PASSWORD")
    with pytest.raises(AuthError, match="MODELPACK_PASSWORD is not set"):
        username(host)


def test_podman_has_credentials_for_namespaces(config: Path) -> None:
    entries = {"r.example": "all:x", "r.example/team": "team:x", "r.example/team/model": "one:x"}
    auths(config, **entries)
    assert username("r.example") == "all"
    assert username("r.example", "other/model") == "all"
    assert username("r.example", "team/other") == "team"
    assert username("r.example", "team/model") == "one"
    assert username("r.example", "teammate/model") == "all"


def test_a_pull_uses_what_is_for_its_namespace(registry: FaultyRegistry, config: Path) -> None:
    registry.auth = BasicAuth("ada", "s3cret")
    auths(config, **{registry.host: "eve:x", f"{registry.host}/team": "ada:s3cret"})
    manifest_for(registry)
    succeed("manifest", "--remote", f"{registry.host}/team/model:v1")


def test_secrets_do_not_leave_over_plain_http(
    registry: FaultyRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelpack.registry import StaticCredentials
    from modelpack.registry.auth import RegistryAuthenticator

    notes: list[Any] = []

    def authenticator(host: str, **options: Any) -> RegistryAuthenticator:
        source = StaticCredentials({host: Credential("ada", "s3cret")})
        return RegistryAuthenticator(
            host, source, lambda *_, **__: b"", report=notes.append, **options
        )

    challenge = 'Basic realm="r"'
    with pytest.raises(AuthError, match="none are stored for it") as caught:
        authenticator("r.example", plain_http=True).answer(challenge, None, frozenset())
    assert "--insecure r.example" in str(caught.value.hint)
    assert "not sent to r.example over plain http" in notes[0].message
    for host, options in (
        ("r.example", {}),
        ("127.0.0.1:5000", {"plain_http": True}),
        ("localhost", {"plain_http": True}),
        ("r.example:80", {"plain_http": True, "insecure": {"r.example:80"}}),
    ):
        assert (
            authenticator(host, **options).answer(challenge, None, frozenset()).startswith("Basic")
        )


def test_an_identity_token_may_be_replaced(registry: FaultyRegistry) -> None:
    from modelpack.registry import StaticCredentials
    from modelpack.registry.auth import RegistryAuthenticator

    forms: list[bytes] = []

    def request(url: str, *, body: bytes, **_: Any) -> bytes:
        forms.append(body)
        return b'{"access_token": "t%d", "refresh_token": "next"}' % len(forms)

    source = StaticCredentials({"r.example": Credential(identity_token="first")})
    made = RegistryAuthenticator("r.example", source, request, report=lambda _: None)
    challenge = 'Bearer realm="https://t.example/",service="s"'
    first = made.answer(challenge, None, frozenset())
    assert made.answer(challenge, first, frozenset()) == "Bearer t2"
    assert b"refresh_token=first" in forms[0]
    assert b"refresh_token=next" in forms[1]


def test_storage_gets_no_credentials_though_there_are_some(
    registry: FaultyRegistry, storage: FaultyRegistry, config: Path
) -> None:
    registry.auth = BasicAuth("ada", "s3cret")
    auths(config, **{registry.host: "ada:s3cret", storage.host: "ada:s3cret"})
    blob = registry.put_blob(b"weights")
    storage.put_blob(b"weights")
    registry.faults.add("GET", "/blobs/", faults.redirecting(storage))
    from modelpack.registry import Registry

    with Registry(registry.host) as client:
        repository = client.repository("team/model")
        with repository.blob(blob).open() as stream:
            assert stream.readinto(memoryview(bytearray(7))) == 7
    (request,) = storage.requests
    assert "authorization" not in request.headers
