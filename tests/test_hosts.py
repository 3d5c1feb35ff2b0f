"""Loopback hosts, to listen on and to connect to."""

from __future__ import annotations

import pytest

from modelpack.errors import UsageError
from modelpack.http.hosts import host_of, is_loopback
from modelpack.http.listener import AppServer
from modelpack.registry.urls import is_local


@pytest.mark.parametrize(
    ("host", "listening", "connecting"),
    [
        ("localhost", True, True),
        ("127.0.0.1", True, True),
        ("127.9.9.9", True, True),
        ("::1", True, True),
        ("localhost:5000", False, True),
        ("[::1]:5000", False, True),
        ("127.0.0.1:5000", False, True),
        ("LOCALHOST", False, True),
        ("localhost.", False, True),
        ("registry.localhost", False, True),
        ("registry.localhost:5000", False, True),
        ("localhost.example", False, False),
        ("notlocalhost", False, False),
        ("[localhost].example", False, False),
        ("[127.0.0.1].example", False, False),
        ("0.0.0.0", False, False),
        ("10.0.0.1", False, False),
        ("", False, False),
    ],
)
def test_which_hosts_are_this_machine(host: str, listening: bool, connecting: bool) -> None:
    assert is_loopback(host) is listening
    assert is_local(host) is connecting


@pytest.mark.parametrize(
    ("text", "host"),
    [("A:1", "a"), ("[::1]:2", "::1"), ("[::1]", "::1"), ("::1", "::1"), ("[a].b", "[a].b")],
)
def test_the_host_in_a_host_header(text: str, host: str) -> None:
    assert host_of(text) == host


def test_a_name_below_localhost_is_not_listened_on_without_a_guard() -> None:
    with pytest.raises(UsageError, match="not a loopback address"):
        AppServer(lambda: None, "evil.localhost:0", name="server")  # type: ignore[arg-type, return-value]
