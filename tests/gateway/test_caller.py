"""The caller of a request: its key and its models, as applications behind `protect` see them."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from modelpack_server.gateway import KeyFile, add_key
from modelpack_server.gateway.caller import ANYONE, Caller, caller_of, put_caller
from tests.gateway.servers import protected, respond


@pytest.mark.parametrize(
    ("models", "names", "allowed"),
    [
        (None, (), True),
        (None, ("ai/any:latest",), True),
        (("ai/*",), ("ai/public:latest",), True),
        (("ai/*",), ("corp/secret:latest", "ai/public:latest"), True),
        (("ai/*",), ("corp/secret:latest",), False),
        (("*",), (), False),
        (("ai/public",), ("AI/PUBLIC",), False),
    ],
)
def test_a_caller_may_use_a_model_by_one_of_its_names(
    models: tuple[str, ...] | None, names: tuple[str, ...], allowed: bool
) -> None:
    assert Caller("alice", models).allows(names) is allowed
    assert Caller("alice", models).is_restricted is (models is not None)


def test_the_caller_is_found_in_the_scope() -> None:
    scope: dict[str, object] = {"type": "http"}
    assert caller_of(scope) is ANYONE
    put_caller(scope, Caller("alice", ("ai/*",)))
    assert caller_of(scope) == Caller("alice", ("ai/*",))
    assert caller_of({"modelpack.caller": "alice"}) is ANYONE


@pytest.mark.parametrize(
    ("path", "key", "expected"),
    [
        ("/v1/models", "free", Caller("free")),
        ("/v1/models", "narrow", Caller("narrow", ("ai/smollm2*",))),
        # The server has no keys and ignores credentials.
        ("/version", "free", Caller(models=())),
    ],
)
def test_an_application_sees_whose_key_it_was(
    tmp_path: Path, path: str, key: str, expected: Caller
) -> None:
    file = tmp_path / "keys.toml"
    secrets = {
        "free": add_key(file, "free"),
        "narrow": add_key(file, "narrow", models=("ai/smollm2*",)),
    }
    callers = []

    async def app(scope: Scope, _: Receive, send: Send) -> None:
        callers.append(caller_of(scope))
        await respond(send, 200, {"data": []})

    with protected(app, keys=KeyFile(file)) as served:
        headers = {"authorization": f"Bearer {secrets[key]}"}
        assert served.client.get(path, headers=headers).status_code == 200
    assert callers == [expected]


def test_without_keys_everybody_is_anyone() -> None:
    callers = []

    async def app(scope: Scope, _: Receive, send: Send) -> None:
        callers.append(caller_of(scope))
        await respond(send, 200, {})

    with protected(app) as served:
        assert served.client.get("/v1/models").status_code == 200
    assert callers == [ANYONE]
