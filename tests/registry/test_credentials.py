"""Credentials from Docker's config.json and its helpers."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from modelpack.errors import AuthError
from modelpack.registry import Credential, DockerConfig
from tests.registry.faults import with_headers
from tests.registry.faulty import FaultyRegistry
from tests.registry.sources import Client


def encoded(pair: str) -> str:
    return base64.b64encode(pair.encode()).decode()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config.json"


@pytest.fixture
def helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


def add_helper(directory: Path, name: str, script: str) -> None:
    path = directory / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def lookup(config: Path, value: Any, host: str = "r.example:5000") -> Credential | None:
    config.write_text(json.dumps(value))
    return DockerConfig(config).credential(host)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"auth": encoded("ada:pw")}, ("ada", "pw", "", "")),
        ({"auth": encoded("ada:p:w:")}, ("ada", "p:w:", "", "")),
        ({"username": "ada", "password": "pw"}, ("ada", "pw", "", "")),
        ({"identitytoken": "long"}, ("", "", "long", "")),
        ({"auth": encoded("00000000:"), "identitytoken": "long"}, ("00000000", "", "long", "")),
        ({"auth": encoded("<token>:long")}, ("", "", "long", "")),
        ({"registrytoken": "bearer"}, ("", "", "", "bearer")),
    ],
)
def test_entries(config: Path, entry: dict[str, str], expected: tuple[str, ...]) -> None:
    found = lookup(config, {"auths": {"r.example:5000": entry}})
    assert found is not None
    parts = found.username, found.password, found.identity_token, found.registry_token
    assert parts == expected
    assert str(config) in found.source


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"auths": {}},
        {"auths": {"r.example:5000": {}}},
        {"auths": {"r.example": {"auth": encoded("a:b")}}},
        {"auths": {"other:5000": {"auth": encoded("a:b")}}},
        {"auths": []},
        {"auths": {"r.example:5000": "x"}},
        {"credHelpers": {"other": "none"}},
    ],
)
def test_no_entry(config: Path, value: Any) -> None:
    assert lookup(config, value) is None


@pytest.mark.parametrize("key", ["r.example:5000", "https://r.example:5000", "r.example:5000/v1/"])
def test_keys_may_be_urls(config: Path, key: str) -> None:
    assert lookup(config, {"auths": {key: {"auth": encoded("ada:pw")}}}) is not None


@pytest.mark.parametrize("key", ["https://index.docker.io/v1/", "docker.io", "index.docker.io"])
def test_docker_hub_has_several_keys(config: Path, key: str) -> None:
    found = lookup(config, {"auths": {key: {"auth": encoded("ada:pw")}}}, "docker.io")
    assert found is not None
    assert found.username == "ada"


def test_this_machine_has_one_key_only(config: Path) -> None:
    assert lookup(config, {"auths": {"localhost": {"auth": encoded("a:b")}}}, "127.0.0.1") is None


def test_a_missing_and_an_empty_file(config: Path) -> None:
    assert DockerConfig(config).credential("r.example") is None
    config.write_text("")
    assert DockerConfig(config).credential("r.example") is None


@pytest.mark.parametrize("text", ["{", "[]", '{"auths":{"r":{"auth":"!"}}}', "\xff"])
def test_a_broken_file_names_itself_and_shows_nothing(config: Path, text: str) -> None:
    config.write_bytes(text.encode("latin-1"))
    with pytest.raises(AuthError, match=r"config\.json") as caught:
        DockerConfig(config).credential("r")
    assert "!" not in str(caught.value)


def test_a_file_that_cannot_be_read(config: Path) -> None:
    config.mkdir()
    with pytest.raises(AuthError, match="cannot be read"):
        DockerConfig(config).credential("r")


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = json.dumps({"auths": {"r.example": {"auth": encoded("ada:pw")}}})
    home, other = tmp_path / "home" / ".docker", tmp_path / "other"
    for directory in (home, other):
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(value)
    monkeypatch.setenv("HOME", str(home.parent))
    found = DockerConfig().credential("r.example")
    assert found is not None
    assert found.source.startswith(str(home))
    monkeypatch.setenv("DOCKER_CONFIG", str(other))
    found = DockerConfig().credential("r.example")
    assert found is not None
    assert found.source.startswith(str(other))


def test_a_helper_for_one_host_goes_first(config: Path, helpers: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    answer = json.dumps({"ServerURL": "x", "Username": "eve", "Secret": "helped"})
    add_helper(helpers, "one", f"[ $1 = get ] && cat >{asked} && echo '{answer}'")
    value = {
        "auths": {"r.example:5000": {"auth": encoded("ada:pw")}},
        "credHelpers": {"r.example:5000": "one"},
        "credsStore": "missing",
    }
    found = lookup(config, value)
    assert found == Credential("eve", "helped", source="docker-credential-one")
    assert asked.read_text() == "r.example:5000"


def test_the_helper_for_all(config: Path, helpers: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    answer = json.dumps({"Username": "<token>", "Secret": "long"})
    add_helper(helpers, "all", f"cat >{asked}; echo '{answer}'")
    found = lookup(config, {"credsStore": "all"}, "docker.io")
    assert found == Credential(identity_token="long", source="docker-credential-all")
    assert asked.read_text() == "https://index.docker.io/v1/"


def test_a_helper_that_knows_nothing(config: Path, helpers: Path) -> None:
    add_helper(helpers, "none", "echo 'credentials not found in native keychain'; exit 1")
    assert lookup(config, {"credsStore": "none"}) is None


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo 'keychain is locked'; exit 1", "keychain is locked"),
        ("exit 3", "no message"),
        ("echo secret-and-no-json", "is not JSON"),
        ('echo \'{"Username":"ada"}\'', "without Username and Secret"),
    ],
)
def test_a_helper_that_fails(config: Path, helpers: Path, script: str, problem: str) -> None:
    add_helper(helpers, "bad", script)
    with pytest.raises(AuthError, match=problem) as caught:
        lookup(config, {"credsStore": "bad"})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["../../bin/sh", "a b", "", 7, "x;y"])
def test_a_helper_with_a_bad_name_is_not_run(config: Path, name: object) -> None:
    if not name:
        assert lookup(config, {"credsStore": name}) is None
        return
    with pytest.raises(AuthError, match="not the name"):
        lookup(config, {"credsStore": name})


def test_a_helper_that_is_not_there(config: Path) -> None:
    with pytest.raises(AuthError, match=r"docker-credential-nowhere.*not on PATH"):
        lookup(config, {"credsStore": "nowhere"})


def test_netrc_is_not_read(
    registry: FaultyRegistry, client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login eve password from-netrc\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    client.registry.ping()
    assert "authorization" not in registry.requests[0].headers


def test_cookies_are_not_kept(registry: FaultyRegistry, client: Client) -> None:
    registry.faults.add("GET", "/v2/", with_headers(Set_Cookie="sid=1; Path=/"))
    client.registry.ping()
    client.registry.ping()
    assert "cookie" not in registry.requests[1].headers


def test_secrets_are_in_no_repr() -> None:
    secrets = Credential("ada", "pw-secret", "id-secret", "reg-secret", "here")
    assert "secret" not in repr(secrets)
    assert "secret" not in str(secrets)
    assert "'ada'" in repr(secrets)
