"""The routes of the console: the latest requests, their content, and details of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import modelpack
from modelpack.store.layout import LayoutStore
from modelpack_server.api.app import create_app
from modelpack_server.api.console import KEPT_REQUESTS
from modelpack_server.gateway import KeyFile, Protection, add_key, protect
from modelpack_server.pool.pool import ModelPool
from tests.engine.families.runner.conftest import StoredScripts
from tests.weights import write_safetensors

CHAT = {"model": "ai/tiny", "messages": [{"role": "user", "content": "a secret question"}]}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LayoutStore:
    directory = tmp_path_factory.mktemp("console")
    files = directory / "files"
    write_safetensors(files / "model.safetensors", b"weights")
    (files / "README.md").write_text("# About it\n")
    store = LayoutStore(directory / "store")
    modelpack.package("ai/tiny", modelpack.PackageRequest(safetensors_dir=files), store=store)
    store.tag("ai/tiny", modelpack.Reference.parse("ai/second:v1"))
    modelpack.attach(
        "ai/tiny", [files / "README.md"], artifact_type="application/example", store=store
    )
    return store


@contextmanager
def client(
    store: LayoutStore, *, show_content: bool = False, keys: KeyFile | None = None
) -> Iterator[TestClient]:
    app = create_app(ModelPool(StoredScripts(store)), show_content=show_content)
    protection = Protection(keys=keys, report=lambda trace: None)
    with TestClient(app) as http:
        inner = TestClient(protect(app, protection), base_url="http://127.0.0.1")
        inner.portal = http.portal
        yield inner


def test_the_latest_requests_are_listed_without_content(store: LayoutStore) -> None:
    with client(store) as http:
        http.post("/v1/chat/completions", json=CHAT | {"stream": True})
        http.post("/api/chat", json=CHAT | {"model": "absent"})
        http.post("/api/show", json={"model": "ai/tiny"})
        http.get("/v1/models")
        found = http.get("/pool/requests").json()
        assert [one["path"] for one in found["requests"]] == ["/api/chat", "/v1/chat/completions"]
        failed, done = found["requests"]
        assert (failed["status"], done["status"], done["finish"]) == (404, 200, "stop")
        assert done["completion_tokens"] > 0
        assert (done["running"], found["content"]) == (False, False)
        assert "secret question" not in str(found)
        refused = http.get(f"/pool/requests/{done['id']}")
        assert refused.status_code == 403
        assert "--show-content" in refused.text


@pytest.mark.long
def test_only_so_many_requests_are_kept(store: LayoutStore) -> None:
    with client(store) as http:
        for _ in range(KEPT_REQUESTS + 1):
            http.post("/v1/completions", json={})
        assert len(http.get("/pool/requests").json()["requests"]) == KEPT_REQUESTS


def test_content_is_shown_by_a_server_that_may(store: LayoutStore) -> None:
    with client(store, show_content=True) as http:
        http.post("/v1/chat/completions", json=CHAT, headers={"X-Request-ID": "mine"})
        record = http.get("/pool/requests/mine").json()
        assert "a secret question" in record["request"]
        assert record["status_code"] == 200
        assert http.get("/pool/requests/other").status_code == 404


def test_keys_that_are_limited_to_models_may_not_look(store: LayoutStore, tmp_path: Path) -> None:
    limited = add_key(tmp_path / "keys", "limited", models=("ai/*",))
    admin = add_key(tmp_path / "keys", "admin")
    with client(store, show_content=True, keys=KeyFile(tmp_path / "keys")) as http:
        for path in ("/pool/requests", "/pool/requests/mine", "/pool/models/ai/tiny"):
            assert http.get(path, headers={"x-api-key": limited}).status_code == 403, path
        assert http.get("/pool/requests", headers={"x-api-key": admin}).status_code == 200


@pytest.mark.parametrize("name", ["ai/tiny", "ai/second:v1", "digest"])
def test_details_of_a_model(store: LayoutStore, name: str) -> None:
    digest = str(store.resolve("ai/tiny").digest)
    with client(store) as http:
        found = http.get(f"/pool/models/{digest if name == 'digest' else name}").json()
        assert found["digest"] == digest
        assert found["names"] == ["docker.io/ai/second:v1", "docker.io/ai/tiny:latest"]
        assert {file["role"] for file in found["files"]} >= {"weight", "doc"}
        assert found["card"] == "# About it\n"
        assert [one["artifact_type"] for one in found["attached"]] == ["application/example"]
        assert http.get("/pool/models/ai/absent").status_code == 404
