"""Chat templates in requests: only for admins, and only if the server allows them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from starlette.types import ASGIApp, Receive, Scope, Send

from modelpack.store.layout import LayoutStore
from modelpack_server.api.app import ModelServer
from modelpack_server.gateway.caller import Caller, put_caller
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.engine.families.ollama.conftest import CONFIG

TEMPLATE = "{{ messages[0].content }}!"
ENDLESS = "{% set s = 'a' * 8000000 %}{{ s.rfind(('a' * 4000) ~ 'b' ~ ('a' * 2000000)) }}"
ADMIN = Caller("root")
USER = Caller("bob", ("*",))


class Keyed:
    """The application, with the caller in a header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            name = dict(scope["headers"]).get(b"x-caller", b"")
            if name:
                put_caller(scope, {b"root": ADMIN, b"bob": USER}[name])
        await self._app(scope, receive, send)


@pytest.fixture(scope="module", params=[False, True], ids=["refused", "allowed"])
def server(request: pytest.FixtureRequest, stock: Path) -> Iterator[tuple[str, bool]]:
    """A server with the store, and whether it accepts templates of admins."""
    store = LayoutStore(stock)
    with ModelServer(
        lambda: ModelPool(StoreCatalogue(store, CONFIG), grace=5.0),
        address="127.0.0.1:0",
        request_templates=request.param,
        wrap=Keyed,
    ) as running:
        yield running.url, request.param


def post(url: str, path: str, caller: str = "", **body: Any) -> requests.Response:
    headers = {"x-caller": caller} if caller else {}
    return requests.post(
        f"{url}/api/{path}", json={"stream": False, **body}, headers=headers, timeout=60
    )


def generate(url: str, caller: str = "", **body: Any) -> requests.Response:
    given = {"model": "tiny", "prompt": "a", "options": {"num_predict": 1}, **body}
    return post(url, "generate", caller, **given)


@pytest.mark.parametrize("caller", ["", "root", "bob"])
def test_a_template_of_a_request(server: tuple[str, bool], caller: str) -> None:
    url, allowed = server
    create = {"model": "made", "from": "tiny"}
    for answer in (
        generate(url, caller, template=TEMPLATE),
        post(url, "create", caller, template=TEMPLATE, **create),
    ):
        if allowed and caller != "bob":
            assert answer.status_code == 200, answer.text
            continue
        assert answer.status_code == 403
        error = answer.json()["error"]
        assert "chat template" in error
        assert ("admins" in error) if allowed else ("--allow-request-templates" in error)


def test_no_template_and_the_models_own_pass(server: tuple[str, bool]) -> None:
    url, _ = server
    own = post(url, "show", model="tiny").json()["template"]
    assert own
    for template in ("", own):
        assert generate(url, "bob", template=template).status_code == 200
    made = post(url, "create", "", model="made", template=own, **{"from": "tiny"})
    assert made.status_code == 200, made.text


@pytest.mark.long
def test_an_endless_template_fails_its_request_only(server: tuple[str, bool]) -> None:
    url, allowed = server
    if not allowed:
        return
    answer = generate(url, template=ENDLESS)
    assert answer.status_code == 400
    assert "took longer than 5 s" in answer.json()["error"]
    assert generate(url).status_code == 200
