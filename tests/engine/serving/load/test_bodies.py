"""Each hostile body gets an error in its API's format, and the connection survives."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.engine.serving.load.bodies import NO_OBJECT, ODD
from tests.engine.serving.load.served import Served, is_error

pytestmark = pytest.mark.long

#: By design: the model, or what it takes, is not there.
UNAVAILABLE = (501, 503, 529)
JSON = {"Content-Type": "application/json"}


@dataclass
class Asking:
    """Sends requests over one connection, and records invalid responses."""

    served: Served
    faults: list[tuple[object, ...]] = field(default_factory=list)
    seen: set[tuple[str, str, int]] = field(default_factory=set)

    def __enter__(self) -> Asking:
        self._connection = self.served.connect()
        return self

    def __exit__(self, *raised: object) -> None:
        self._connection.close()

    def ask(
        self, method: str, path: str, body: Any = None, headers: Any = JSON, name: str = ""
    ) -> None:
        try:
            self._connection.request(method, path, body, headers, encode_chunked=True)
            response = self._connection.getresponse()
            content = response.read()
        except OSError as error:
            self.faults.append((method, path, name, repr(error)))
            self._connection.close()
            return
        self.seen.add((path, name, response.status))
        is_ours = response.status >= 500 and response.status not in UNAVAILABLE
        is_known = (
            response.status < 400 or method == "HEAD" or is_error(path.partition("?")[0], content)
        )
        if response.will_close or is_ours or not is_known:
            self.faults.append((method, path, name, response.status, content[:300]))


@pytest.fixture
def asking(served: Served) -> Iterator[Asking]:
    with Asking(served) as asking:
        yield asking
        assert asking.seen
        faults = [repr(fault)[:300] for fault in asking.faults]
        assert not faults, "\n".join(faults)


def test_bodies_that_are_no_object(asking: Asking) -> None:
    for path in asking.served.posts():
        for name, body in NO_OBJECT.items():
            asking.ask("POST", path, body, name=name)
    refused = {path for path, name, status in asking.seen if status == 400 and name == "half"}
    assert refused >= set(asking.served.posts(json_only=True)) >= {"/v1/messages"}


def test_odd_bodies(asking: Asking) -> None:
    for path in asking.served.posts():
        for name, body in ODD.items():
            asking.ask("POST", path, body, name=name)
    for path in ("/engines/requests", "/engines/ps", "/api/ps", "/pool", "/metrics", "/logs"):
        asking.ask("GET", path)
        assert (path, "", 200) in asking.seen
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages"):
        assert (path, "as it should be", 200) in asking.seen
        assert (path, "not a number", 400) in asking.seen


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/xml", "multipart/form-data; boundary=x", "multipart/form-data",
     "application/x-www-form-urlencoded", "application/json; charset=nothing", "application/x+json",
     "nonsense", "/", "", "application/json, text/html", "\xff"],
)  # fmt: skip
def test_content_types(asking: Asking, kind: str) -> None:
    for path in asking.served.posts():
        asking.ask("POST", path, ODD["as it should be"], {"Content-Type": kind})


def test_bodies_in_chunks(asking: Asking) -> None:
    def pieces(body: bytes) -> Iterator[bytes]:
        for at in range(len(body)):
            yield body[at : at + 1]

    for path in asking.served.posts():
        for body in (ODD["as it should be"], NO_OBJECT["half"], b"\x00"):
            asking.ask("POST", path, pieces(body))


def test_methods_that_routes_do_not_have(asking: Asking) -> None:
    paths = sorted({re.sub("[{}]", "", path) for _, path in asking.served.operations()})
    for path in paths:
        for method in ("HEAD", "OPTIONS", "PUT", "PATCH", "TRACE", "BREW"):
            asking.ask(method, path, headers={})
    assert ("/v1/chat/completions", "", 405) in asking.seen


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity"])
def test_bodies_that_say_to_be_compressed(asking: Asking, encoding: str) -> None:
    headers = JSON | {"Content-Encoding": encoding}
    asking.ask("POST", "/v1/chat/completions", b"\x1f\x8b\x00", headers)
