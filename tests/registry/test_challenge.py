"""The header grammars: challenges, scopes, Retry-After, URLs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from urllib.parse import parse_qsl, urljoin, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack.errors import RegistryError
from modelpack.registry.auth import (
    Challenge,
    parse_challenges,
    parse_scopes,
    repository_scopes,
    spelled,
)
from modelpack.registry.limits import parse_retry_after
from modelpack.registry.urls import (
    checked_url,
    joined_url,
    origin_of,
    with_query,
    without_query,
)

TOKEN = st.text("abcXYZ019!#$%&'*+.^_`|~-", min_size=1, max_size=12)
VALUE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=30)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", []),
        (" , ,", []),
        ("Basic", [Challenge("basic")]),
        ('Basic realm="R"', [Challenge("basic", {"realm": "R"})]),
        ("BASIC  realm = R", [Challenge("basic", {"realm": "R"})]),
        (
            'Bearer realm="https://a/t",service="s",scope="repository:a/b:pull,push"',
            [
                Challenge(
                    "bearer",
                    {
                        "realm": "https://a/t",
                        "service": "s",
                        "scope": "repository:a/b:pull,push",
                    },
                )
            ],
        ),
        (
            'Newauth realm="apps", type=1,  title="Login to \\"apps\\"", Basic realm="simple"',
            [
                Challenge("newauth", {"realm": "apps", "type": "1", "title": 'Login to "apps"'}),
                Challenge("basic", {"realm": "simple"}),
            ],
        ),
        (
            'Negotiate, Basic realm="x"',
            [Challenge("negotiate"), Challenge("basic", {"realm": "x"})],
        ),
        (
            'NTLM YWJj==, Bearer realm="x"',
            [Challenge("ntlm", {}, "YWJj=="), Challenge("bearer", {"realm": "x"})],
        ),
        (', Bearer realm="x" ,, service=y', [Challenge("bearer", {"realm": "x", "service": "y"})]),
        ('Bearer realm="x", realm="y"', [Challenge("bearer", {"realm": "x"})]),
        ('Bearer realm="unfinished', [Challenge("bearer")]),
        ('Bearer realm=""', [Challenge("bearer", {"realm": ""})]),
        ("=x", []),
        ('"Basic"', []),
    ],
)
def test_challenges(header: str, expected: list[Challenge]) -> None:
    assert parse_challenges(header) == expected


@given(
    st.lists(st.tuples(TOKEN, st.dictionaries(TOKEN, VALUE, min_size=1, max_size=4)), max_size=4),
    st.sampled_from([", ", ",", " , ", ",,"]),
)
def test_written_challenges_are_read_back(
    written: list[tuple[str, dict[str, str]]], comma: str
) -> None:
    def quoted(value: str) -> str:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    header = comma.join(
        f"{scheme} " + comma.join(f"{name}={quoted(value)}" for name, value in parameters.items())
        for scheme, parameters in written
    )
    expected = []
    for scheme, parameters in written:
        first: dict[str, str] = {}
        for name, value in parameters.items():
            first.setdefault(name.lower(), value)
        expected.append(Challenge(scheme.lower(), first))
    assert parse_challenges(header) == expected


@given(st.text())
def test_any_header_is_read_somehow(header: str) -> None:
    for challenge in parse_challenges(header):
        assert challenge.scheme


@given(st.text('Basic ,="\\=x', max_size=3000))
def test_no_header_takes_long(header: str) -> None:
    parse_challenges(header * 5)


def test_scopes() -> None:
    both = parse_scopes("repository:a/b:pull,push registry:catalog:* repository:a/b:delete")
    assert spelled(both) == ["registry:catalog:*", "repository:a/b:delete,pull,push"]
    assert repository_scopes("a/b", "pull") < both
    assert parse_scopes("repository:host:5000/x:pull") == {("repository:host:5000/x", "pull")}
    assert parse_scopes("") == parse_scopes("nonsense") == parse_scopes("a:") == frozenset()


@given(st.frozensets(st.tuples(TOKEN, st.text("abc*", min_size=1, max_size=4)), max_size=6))
def test_spelled_scopes_are_read_back(scopes: frozenset[tuple[str, str]]) -> None:
    assert parse_scopes(" ".join(spelled(scopes))) == scopes


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", 0.0),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("9" * 40, 999999999999.0),
        ("-1", None),
        ("1.5", None),
        ("٣", None),
        ("", None),
        ("soon", None),
        ("Thu, 99 Jan 1970 00:00:00 GMT", None),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90.0),
        ("Thursday, 01-Jan-70 00:01:40 GMT", 90.0),
        ("Thu, 01 Jan 1970 00:00:01 GMT", 0.0),
    ],
)
def test_retry_after(value: str, expected: float | None) -> None:
    assert parse_retry_after({"Retry-After": value}, now=10.0) == expected
    assert parse_retry_after({}, now=10.0) is None


@given(st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1)), st.integers(0, 10**6))
def test_a_date_counts_from_the_answers_own(sent: datetime, seconds: int) -> None:
    date = sent.replace(microsecond=0, tzinfo=UTC)
    headers = {
        "Date": format_datetime(date, usegmt=True),
        "Retry-After": format_datetime(date + timedelta(seconds=seconds), usegmt=True),
    }
    assert parse_retry_after(headers, now=0.0) == seconds


@given(st.text())
def test_any_retry_after_is_read_somehow(value: str) -> None:
    seconds = parse_retry_after({"Retry-After": value, "Date": value[::-1]}, now=0.0)
    assert seconds is None or seconds >= 0


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        (
            "/v2/x/uploads/1?_state=a%2Bb%3D&x=",
            "https://r.example/v2/x/uploads/1?_state=a%2Bb%3D&x=",
        ),
        ("2?x=y#fragment", "https://r.example/v2/x/blobs/uploads/2?x=y"),
        ("//s.example/u", "https://s.example/u"),
        ("https://s.example:8443/u?a=1&a=2", "https://s.example:8443/u?a=1&a=2"),
        ("https://[::1]:5000/u", "https://[::1]:5000/u"),
        ("?only=query", "https://r.example/v2/x/blobs/uploads/?only=query"),
        ("/ünï", "https://r.example/%C3%BCn%C3%AF"),
        ("/%7e~%2f", "https://r.example/%7e~%2f"),
    ],
)
def test_locations(location: str, expected: str) -> None:
    assert joined_url("https://r.example/v2/x/blobs/uploads/", location, "x") == expected


@pytest.mark.parametrize(
    "location",
    [
        "http://r.example/plain",
        "ftp://r.example/",
        "javascript:alert(1)",
        "https://u:p@r.example/",
        "https://r.example\\@evil.example/",
        "https://r.example:0/",
        "https://r.example:99999/",
        "https://r.example:x/",
        "https://[::1/",
        "https://r.exam ple/",
        "/a\r\nX: y",
        "/a\tb",
        "https://r%2eexample/",
        "/" + "x" * 20_000,
    ],
)
def test_locations_that_are_refused(location: str) -> None:
    with pytest.raises(RegistryError, match=r"^upload:"):
        joined_url("https://r.example/v2/", location, "upload")


PATH = st.text("abc/%2F.~-_?=&;:@é ", max_size=20)


@given(st.sampled_from(["http", "https"]), PATH, PATH)
def test_what_is_joined_is_where_the_standard_leads(scheme: str, base: str, other: str) -> None:
    start = f"{scheme}://r.example:5000/v2/{base.replace(' ', '')}".partition("?")[0]
    try:
        start = checked_url(start, "x")
        url = joined_url(start, other, "x")
    except RegistryError:
        return
    assert " " not in other
    assert url.isascii()
    assert origin_of(url).scheme == scheme or scheme == "http"
    expected = urlsplit(urljoin(start, other))
    if other.isascii():
        assert urlsplit(url) == expected._replace(fragment="")


@given(PATH.filter(lambda text: " " not in text), st.text(max_size=10))
def test_a_query_is_added_and_nothing_else_changes(path: str, value: str) -> None:
    url = checked_url(f"https://r.example/v2/{path}", "x")
    longer = with_query(url, digest=value)
    assert longer.startswith(url)
    assert longer[len(url) :][0] in "?&"
    added = parse_qsl(urlsplit(longer).query, keep_blank_values=True)[-1]
    assert added == ("digest", value.encode(errors="replace").decode()) or value >= "\ud800"
    assert with_query(url) == url
    assert "?" not in without_query(longer)


def test_origins() -> None:
    assert origin_of("https://r.example/") == origin_of("https://R.example:443/x?y")
    assert origin_of("http://r.example/") != origin_of("https://r.example/")
    assert origin_of("http://r.example/") != origin_of("http://r.example:81/")
    assert origin_of("http://[::1]:5000/").netloc == "[::1]:5000"
    assert origin_of("https://r.example:443/").netloc == "r.example"
