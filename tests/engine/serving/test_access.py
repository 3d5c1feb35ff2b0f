"""API keys with a list of models, with a real store: access depends on the resolved model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

import modelpack
from modelpack.store.layout import LayoutStore
from modelpack_server.api.app import create_app
from modelpack_server.gateway import KeyFile, Protection, add_key, protect
from modelpack_server.pool.names import spellings
from modelpack_server.pool.pool import ModelPool
from tests.engine.families.runner.conftest import StoredScripts
from tests.models import tiny_gguf

PUBLIC, SECRET, TWIN = "ai/public:latest", "corp/secret:latest", "corp/twin:latest"
MESSAGES = [{"role": "user", "content": "hi"}]


@dataclass
class Guarded:
    """A client of a server with keys, the store's models, and the keys."""

    http: TestClient
    pool: ModelPool
    store: LayoutStore
    digests: dict[str, str]
    keys: dict[str, str]

    def ask(
        self, key: str, path: str, body: Any = None, method: str | None = None, **headers: str
    ) -> httpx.Response:
        """Send a request with a key."""
        method = method or ("GET" if body is None else "POST")
        headers = {"x-api-key": self.keys[key]} | headers
        url = "http://127.0.0.1" + path  # `//x` alone would mean a host
        reply: httpx.Response = self.http.request(method, url, json=body, headers=headers)
        return reply


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    directory = tmp_path_factory.mktemp("access")
    gguf = tiny_gguf(directory)
    store = LayoutStore(directory / "store")
    digests = {}
    for size, name in enumerate((PUBLIC, SECRET, "ai/pulled", "ai/nick", "ai/other"), 100):
        request = modelpack.PackageRequest(gguf=gguf, context_size=size)
        digests[name] = str(modelpack.package(name, request, store=store).digest)
    # The same content under a name that the key may not see,
    store.tag(PUBLIC, modelpack.Reference.parse(TWIN))
    # and a model that was pulled by its digest, of which only the repository is known.
    store.note_origin([modelpack.Digest.parse(digests["ai/pulled"])], "docker.io/ai/pulled")
    store.change_index(lambda index: index.untagged(lambda e: "ai/pulled" in (e.name or "")))
    file = directory / "keys.toml"
    keys = {
        "admin": add_key(file, "admin"),
        "narrow": add_key(file, "narrow", models=("ai/public*", "ai/pulled@*", "nickname")),
        "corp": add_key(file, "corp", models=("docker.io/corp/*",)),
    }
    pool = ModelPool(StoredScripts(store), grace=0.0)
    pool.alias("nickname", digests["ai/nick"])
    app = protect(create_app(pool), Protection(keys=KeyFile(file)), resolves=True)
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as http:
        yield Guarded(http, pool, store, digests, keys)


INFERENCE: list[tuple[str, dict[str, Any]]] = [
    (prefix + path, body)
    for prefix in ("/v1", "/engines/v1", "/engines/llama.cpp/v1", "//exp/vDD4.40//v1")
    for path, body in (
        ("/chat/completions", {"messages": MESSAGES}),
        ("/completions", {"prompt": "hi"}),
        ("/embeddings", {"input": "hi"}),
        ("/responses", {"input": "hi"}),
        ("/responses", {"input": "hi", "background": True}),
        ("/responses/input_tokens", {"input": "hi"}),
        ("/tokenize", {"prompt": "hi"}),
        ("/detokenize", {"tokens": [1]}),
        ("/messages", {"messages": MESSAGES, "max_tokens": 5}),
        ("/messages/count_tokens", {"messages": MESSAGES}),
        ("/rerank", {"query": "hi", "documents": ["a"]}),
        ("/score", {"text_1": "hi", "text_2": "a"}),
    )
] + [
    ("/anthropic/v1/messages", {"messages": MESSAGES, "max_tokens": 5}),
    ("/api/generate", {"prompt": "hi"}),
    ("/api/generate", {}),
    ("/api/generate", {"keep_alive": 0}),
    ("/api/chat", {"messages": MESSAGES}),
    ("/api/chat", {"messages": MESSAGES, "options": {"num_ctx": 4096}}),
    ("/api/embed", {"input": "hi"}),
    ("/api/embeddings", {"prompt": "hi"}),
    ("/api/show", {}),
    ("/api/show", {"verbose": True}),
]  # fmt: skip


def names_of(digest: str, other: str) -> list[str]:
    """Return names with which a client might reach the model corp/secret."""
    encoded = digest.removeprefix("sha256:")
    return [
        "corp/secret", SECRET, "docker.io/corp/secret", "index.docker.io/corp/secret:latest",
        "CORP/secret", " corp/secret ", digest, encoded, encoded[:12], encoded[:20],
        f"ai/public@{digest}", f"docker.io/ai/public@{digest}", f"nickname@{digest}",
        f"ai/public:latest@{digest}", f"corp/secret@{digest}", f"corp/secret:latest@{digest}",
        f"corp/secret:latest@{other}", f"ai/pulled@{digest}",
    ]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(("path", "body"), INFERENCE)
def test_a_model_that_a_key_may_not_use_is_answered_as_none(
    guarded: Guarded, path: str, body: dict[str, Any]
) -> None:
    digest = guarded.digests[SECRET]
    nothing = "sha256:" + "0" * 64
    names = names_of(digest, guarded.digests[PUBLIC])
    missing = names_of(nothing, nothing)
    for name, none in zip(names, missing, strict=True):
        none = none.replace("secret", "secrex")
        found = guarded.ask("narrow", path, {"model": name} | body)
        lost = guarded.ask("narrow", path, {"model": none} | body)
        assert (found.status_code, lost.status_code) == (404, 404), (name, found.text)
        assert _plain(found, name) == _plain(lost, none)
        assert guarded.ask("narrow", path, {"model": name} | body,
                           **{"x-preload-only": "true"}).status_code == 404  # fmt: skip
    assert guarded.digests[SECRET] not in [m.stored.key for m in guarded.pool.running()]


def _plain(reply: httpx.Response, name: str) -> tuple[str, str | None]:
    """Return a reply without the request's name and id."""
    request_id = reply.headers["x-request-id"]
    text = reply.text.replace(request_id, "ID").replace(json.dumps(name)[1:-1], "NAME")
    return text.replace(name.strip(), "NAME"), reply.headers.get("content-type")


@pytest.mark.sample(1)
@pytest.mark.parametrize("prefix", ["/v1", "/engines/v1", "/engines/vllm/v1", "/anthropic/v1"])
def test_cards_of_such_models_are_not_there(guarded: Guarded, prefix: str) -> None:
    for name in names_of(guarded.digests[SECRET], guarded.digests[PUBLIC]):
        reply = guarded.ask("narrow", f"{prefix}/models/{name.strip()}")
        assert reply.status_code == 404, name
        for headers in ({}, {"anthropic-version": "2023-06-01"}):
            path = f"{prefix}/models/{name.strip().replace('/', '%2F')}"
            assert guarded.ask("narrow", path, **headers).status_code == 404, name


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("narrow", "public"), ("narrow", "ai/public"), ("narrow", "docker.io/ai/public:latest"),
        ("narrow", "ai/public@DIGEST"), ("narrow", "DIGEST"), ("narrow", "HEX"),
        ("narrow", "SHORT"), ("narrow", "corp/twin"), ("narrow", "nickname"), ("narrow", "ai/nick"),
        ("narrow", "ai/pulled@PULLED"), ("narrow", "PULLED"), ("corp", "corp/secret"),
        ("corp", "corp/twin"), ("corp", "public"), ("admin", "corp/secret"), ("admin", "ai/other"),
    ],
)  # fmt: skip
def test_a_model_is_allowed_by_its_own_names(guarded: Guarded, key: str, name: str) -> None:
    digest = guarded.digests[PUBLIC]
    name = name.replace("PULLED", guarded.digests["ai/pulled"]).replace("DIGEST", digest)
    name = name.replace("HEX", digest[7:]).replace("SHORT", digest[7:19])
    for path, body in INFERENCE[:2]:
        assert guarded.ask(key, path, {"model": name} | body).status_code == 200
    for path in ("/v1/models/", "/anthropic/v1/models/"):
        assert guarded.ask(key, path + name).json()["id"] == name


def listed(guarded: Guarded, key: str) -> dict[str, set[str]]:
    """Return the names of models in the lists, by path."""
    tags = guarded.ask(key, "/api/tags").json()["models"]
    own = guarded.ask(key, "/models").json()
    return {
        "/v1/models": {m["id"] for m in guarded.ask(key, "/v1/models").json()["data"]},
        "/engines/v1/models": {
            m["id"] for m in guarded.ask(key, "/engines/v1/models").json()["data"]
        },
        "/engines/vllm/v1/models": {
            m["id"] for m in guarded.ask(key, "/engines/vllm/v1/models").json()["data"]
        },
        "/v1/models, Anthropic's": {
            m["id"]
            for m in guarded.ask(
                key, "/v1/models?limit=1000", **{"anthropic-version": "2023-06-01"}
            ).json()["data"]
        },
        "/anthropic/v1/models": {
            m["id"] for m in guarded.ask(key, "/anthropic/v1/models").json()["data"]
        },
        "/api/tags": {m["name"] for m in tags},
        "/models": {tag for m in own for tag in m.get("tags", [m["id"]])},
    }


def test_lists_name_only_what_a_key_may_use(guarded: Guarded) -> None:
    pulled = guarded.digests["ai/pulled"]
    narrow = listed(guarded, "narrow")
    assert narrow["/v1/models"] == {"public", pulled, "nickname"}
    for path in ("/engines/v1/models", "/engines/vllm/v1/models", "/v1/models, Anthropic's"):
        assert narrow[path] == narrow["/v1/models"]
    assert narrow["/anthropic/v1/models"] == narrow["/v1/models"]
    assert narrow["/api/tags"] == {"public:latest", pulled, "nickname:latest"}
    assert narrow["/models"] == {"ai/public:latest", pulled, guarded.digests["ai/nick"]}
    corp = listed(guarded, "corp")
    assert corp["/models"] == {TWIN, SECRET}
    assert corp["/api/tags"] == {TWIN, SECRET}
    everything = listed(guarded, "admin")
    assert {TWIN, SECRET, "ai/public:latest", "ai/other:latest"} <= everything["/models"]
    assert {"nickname:latest", SECRET, TWIN} <= everything["/api/tags"]


def test_running_models_are_named_only_to_those_who_may_use_them(guarded: Guarded) -> None:
    for name in (SECRET, "ai/public", "ai/nick"):
        assert guarded.ask("admin", INFERENCE[0][0],
                           {"model": name} | INFERENCE[0][1]).status_code == 200  # fmt: skip
    names = {m["name"] for m in guarded.ask("narrow", "/api/ps").json()["models"]}
    assert names <= {"public:latest", "nickname:latest", guarded.digests["ai/pulled"]}
    assert {"public:latest", "nickname:latest"} <= names
    names = {m["name"] for m in guarded.ask("corp", "/api/ps").json()["models"]}
    assert names == {SECRET, TWIN}
    assert "secret" in guarded.ask("admin", "/metrics").text


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/metrics", None), ("GET", "/pool", None), ("GET", "/engines/ps", None),
        ("GET", "/engines/requests", None), ("GET", "/engines/_configure", None),
        ("GET", "/engines/df", None), ("GET", "/logs", None),
        ("GET", "/models/corp/secret", None), ("GET", "/models/corp/secret/export", None),
        ("GET", "/models/example.com/x?remote=true", None),
        ("POST", "/api/copy", {"source": "corp/secret", "destination": "ai/public-2"}),
        ("POST", "/api/create", {"model": "ai/public-2", "from": "corp/secret"}),
        ("DELETE", "/api/delete", {"model": "corp/secret"}),
        ("POST", "/api/pull", {"model": "example.com/x"}),
        ("POST", "/models/corp/secret/tag?repo=ai/public-2&tag=x", {}),
        ("POST", "/engines/_configure", {"model": "corp/secret"}),
        ("POST", "/engines/unload", {"all": True}), ("POST", "/pool/unload", {"all": True}),
        ("POST", "/pool/configure", {"model": "ai/public"}),
        ("DELETE", "/models/corp/secret", None),
    ],
)  # fmt: skip
def test_managing_needs_a_key_for_all_models(
    guarded: Guarded, method: str, path: str, body: Any
) -> None:
    for key in ("narrow", "corp"):
        for spelled in (path, "/" + path, "/exp/vDD4.40" + path):
            assert guarded.ask(key, spelled, body, method).status_code == 403
    assert guarded.store.resolve("corp/secret")


def test_health_names_no_model_without_a_key(tmp_path: Path) -> None:
    store = LayoutStore(tmp_path / "store")
    pool = ModelPool(StoredScripts(store))
    pool.pin("corp/secret")
    add_key(tmp_path / "keys.toml", "admin")
    keys = KeyFile(tmp_path / "keys.toml")
    with TestClient(
        protect(create_app(pool), Protection(keys=keys), resolves=True),
        base_url="http://127.0.0.1",
    ) as http:
        reply = http.get("/health")
    assert reply.status_code == 503
    assert "secret" not in reply.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("public", {"public", "public:latest", "ai/public", "ai/public:latest",
                    "docker.io/ai/public", "docker.io/ai/public:latest"}),
        ("corp/secret:v1", {"corp/secret:v1", "docker.io/corp/secret:v1"}),
        ("huggingface.co/org/x:q4", {"huggingface.co/org/x:q4", "hf.co/org/x:q4"}),
        ("example.com/x", {"example.com/x", "example.com/x:latest"}),
        ("a name", {"a name"}),
        (f"public@sha256:{'a' * 64}", {f"{head}public@sha256:{'a' * 64}"
                                       for head in ("", "ai/", "docker.io/ai/")}),
    ],
)  # fmt: skip
def test_patterns_match_every_spelling_of_a_name(name: str, expected: set[str]) -> None:
    assert set(spellings(name)) == expected
