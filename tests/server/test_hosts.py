"""The `Host` headers that the registry accepts."""

from __future__ import annotations

import pytest

from modelpack.http.hosts import AllowedHosts, host_of


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("Localhost:5000", "localhost"),
        ("127.0.0.1", "127.0.0.1"),
        ("[::1]:5000", "::1"),
        ("[::1]", "::1"),
        ("::1", "::1"),
        ("", ""),
        ("a.b:1:2", "a.b:1:2"),
    ],
)
def test_host_of(text: str, host: str) -> None:
    assert host_of(text) == host


@pytest.mark.parametrize(
    ("allowed", "host", "expected"),
    [
        ((), "localhost:5000", True),
        ((), "127.0.0.1:5000", True),
        ((), "127.8.9.1", True),
        ((), "[::1]:5000", True),
        ((), "", False),
        ((), "evil.example", False),
        ((), "evil.example:5000", False),
        ((), "localhost.evil.example", False),
        ((), "127.0.0.1.evil.example", False),
        ((), "10.0.0.7:5000", False),
        ((), "2130706433", False),
        (("models.lan",), "models.lan:80", True),
        (("models.lan",), "MODELS.LAN", True),
        (("models.lan",), "x.models.lan", False),
        (("10.0.0.7",), "10.0.0.7:5000", True),
        (("10.0.0.7",), "10.0.0.8:5000", False),
        (("0.0.0.0",), "10.0.0.7:5000", True),
        (("0.0.0.0",), "evil.example", False),
        (("::",), "[fe80::1]:5000", True),
    ],
)
def test_allows(allowed: tuple[str, ...], host: str, expected: bool) -> None:
    assert AllowedHosts(allowed).allows(host) is expected
