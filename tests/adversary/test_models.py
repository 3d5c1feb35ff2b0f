"""A key with a model list reaches no other model, however the request names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.adversary.house import OTHER, PUBLIC, SECRET, House, chat, house

pytestmark = pytest.mark.long

_MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """The server, with the secret model loaded by who may use it."""
    with house(tmp_path_factory.mktemp("house")) as started:
        with started.client("admin") as admin:
            answered = admin.post("/v1/chat/completions", json=chat(SECRET))
            assert answered.status_code == 200, answered.text
        yield started


@dataclass(frozen=True)
class Request:
    """A request that would use a model by the name it is given."""

    path: str
    body: Callable[[str], dict[str, Any]]
    method: str = "POST"


def _text(**fields: Any) -> Callable[[str], dict[str, Any]]:
    return lambda model: {"model": model, **fields}


#: Every route that uses a model or shows one, in each family of APIs.
ROUTES = {
    "chat": Request("/v1/chat/completions", chat),
    "chat under /engines": Request("/engines/v1/chat/completions", chat),
    "chat of a backend": Request("/engines/mlx/v1/chat/completions", chat),
    "completions": Request("/v1/completions", _text(prompt="x", max_tokens=1)),
    "responses": Request("/v1/responses", _text(input="x", max_output_tokens=16)),
    "input_tokens": Request("/v1/responses/input_tokens", _text(input="x")),
    "tokenize": Request("/tokenize", _text(prompt="x")),
    "detokenize": Request("/detokenize", _text(tokens=[1])),
    "embeddings": Request("/v1/embeddings", _text(input="x")),
    "rerank": Request("/v1/rerank", _text(query="x", documents=["y"])),
    "score": Request("/v1/score", _text(text_1="x", text_2="y")),
    "messages": Request("/v1/messages", _text(messages=_MESSAGES, max_tokens=1)),
    "anthropic messages": Request(
        "/anthropic/v1/messages", _text(messages=_MESSAGES, max_tokens=1)
    ),
    "count_tokens": Request("/v1/messages/count_tokens", _text(messages=_MESSAGES)),
    "ollama generate": Request(
        "/api/generate", _text(prompt="x", options={"num_predict": 1}, stream=False)
    ),
    "ollama chat": Request("/api/chat", _text(messages=_MESSAGES, stream=False)),
    "ollama embed": Request("/api/embed", _text(input="x")),
    "ollama show": Request("/api/show", _text()),
    "ollama copy": Request("/api/copy", lambda m: {"source": m, "destination": "ai/public:x"}),
    "ollama create": Request(
        "/api/create", lambda m: {"model": "ai/public:made", "from": m, "stream": False}
    ),
    "ollama delete": Request("/api/delete", _text(), "DELETE"),
    "ollama pull": Request("/api/pull", _text(stream=False)),
    "ollama push": Request("/api/push", _text(stream=False)),
    "configure": Request("/engines/_configure", lambda m: {"model": m, "context-size": 64}),
    "unload": Request("/engines/unload", lambda m: {"models": [m]}),
}


def _names(served: House) -> dict[str, str]:
    digest = served.digests[SECRET]
    short = digest.removeprefix("sha256:")
    return {
        "its name": SECRET,
        "its full name": f"docker.io/{SECRET}:latest",
        "its digest below an allowed name": f"{PUBLIC}@{digest}",
        "its digest below an allowed tag": f"{PUBLIC}:latest@{digest}",
        "its digest below a full name": f"docker.io/{PUBLIC}@{digest}",
        "its digest below a name that matches and is not there": f"{PUBLIC}-x@{digest}",
        "its own digest": f"{SECRET}@{digest}",
        "a digest alone": digest,
        "hex digits alone": short,
        "twelve digits": short[:12],
        "six digits": short[:6],
        "another case": SECRET.upper(),
        "another repository's": OTHER,
    }


NAMES = (
    "its name", "its full name", "its digest below an allowed name",
    "its digest below an allowed tag", "its digest below a full name",
    "its digest below a name that matches and is not there", "its own digest", "a digest alone",
    "hex digits alone", "twelve digits", "six digits", "another case", "another repository's",
)  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", NAMES)
def test_a_restricted_key_gets_no_other_model(served: House, route: str, name: str) -> None:
    request = ROUTES[route]
    with served.client("alice") as alice:
        reply = alice.request(request.method, request.path, json=request.body(_names(served)[name]))
    assert reply.status_code in (400, 401, 403, 404), (reply.status_code, reply.text[:500])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "path", ["/v1/models/{}", "/engines/v1/models/{}", "/models/{}", "/models/{}/json"]
)
def test_a_restricted_key_sees_no_other_model(served: House, path: str, name: str) -> None:
    asked = _names(served)[name]
    with served.client("alice") as alice:
        reply = alice.get(path.format(asked))
    assert reply.status_code in (400, 403, 404), (reply.status_code, reply.text[:500])


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/engines/v1/models", "/engines/mlx/v1/models", "/anthropic/v1/models",
     "/api/tags", "/api/ps", "/models", "/metrics", "/pool", "/engines/ps", "/engines/df",
     "/engines/requests", "/v1/logs", "/logs", "/engines/status"],
)  # fmt: skip
def test_no_list_shows_it(served: House, path: str) -> None:
    with served.client("admin") as admin:
        everything = admin.get(path)
    with served.client("alice") as alice:
        reply = alice.get(path)
    hidden = (SECRET, OTHER, served.digests[SECRET], served.digests[OTHER])
    text = reply.text if reply.status_code == 200 else ""
    assert not [word for word in hidden if word in text]
    assert everything.status_code in (200, 404), everything.text


@pytest.mark.parametrize(
    "path",
    ["//v1/models", "/v1//models", "/v1/models/", "/%761/models", "/v1%2Fmodels", "/V1/models",
     "//metrics", "/metrics/", "/%6detrics", "/./metrics", "/x/../metrics", "/metrics%00",
     "/metrics;x", "/engines//v1/models", "/exp/vDD4.40/metrics", "/%2e/metrics", "\\metrics"],
)  # fmt: skip
def test_a_path_that_is_written_otherwise_shows_no_more(served: House, path: str) -> None:
    """The route that was authorised is the one that answers."""
    for key in (None, "alice"):
        status, text = served.get_exactly(path, key)
        shown = text if status == 200 else ""
        assert SECRET not in shown
        assert "modelpack_" not in shown, shown[:300]


def test_the_key_still_gets_its_own(served: House) -> None:
    """The table above would pass if nothing were answered."""
    digest = served.digests[PUBLIC]
    with served.client("alice") as alice:
        for name in (PUBLIC, f"docker.io/{PUBLIC}:latest", f"{PUBLIC}@{digest}"):
            for route in ("chat", "completions", "messages", "ollama chat", "ollama show"):
                request = ROUTES[route]
                reply = alice.post(request.path, json=request.body(name))
                assert reply.status_code == 200, (route, name, reply.text)
        listed = alice.get("/v1/models").json()["data"]
        assert [model["id"].partition(":")[0] for model in listed] == [
            PUBLIC.removeprefix("ai/")
        ] or [model["id"] for model in listed] == [PUBLIC]
