"""Pull and push: the progress lines, and errors before and after the first line."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.reference import Reference
from modelpack.errors import RegistryError
from modelpack.progress import Action, Progress
from modelpack.registry_server import RegistryServer
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from modelpack_server.api.model_runner.progress import BearerToken, Lines
from tests.engine.families.runner.conftest import Runner

LAYER = Digest.of(b"a layer")


@pytest.fixture(scope="module")
def remote(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A registry with team/far:v1."""
    store = LayoutStore(tmp_path_factory.mktemp("far"))
    with registry() as server:
        modelpack.package(
            f"{server.host}/team/far:v1",
            modelpack.PackageRequest(gguf=gguf),
            push=True,
            store=store,
        )
        yield server


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(html.unescape(line)) for line in response.text.splitlines()]


@pytest.mark.parametrize("accept", ["application/json", "*/*", "text/plain"])
def test_pulling_tells_of_each_layer(runner: Runner, remote: RegistryServer, accept: str) -> None:
    name = f"{remote.host}/team/far:v1"
    runner.store.remove("tiny")
    response = runner.http.post("/models/create", json={"from": name}, headers={"Accept": accept})
    assert response.status_code == 200
    is_json = accept == "application/json"
    assert response.headers["content-type"].startswith("application/json" if is_json else "text/")
    assert ("&#34;" in response.text) is not is_json
    *told, last = lines(response)
    assert last == {
        "type": "success", "message": "Model pulled successfully", "total": 0,
        "layer": {"size": 0, "current": 0}, "mode": "pull",
    }  # fmt: skip
    assert {line["type"] for line in told} == {"progress"}
    ends = {line["layer"]["id"]: line["layer"] for line in told}
    assert all(layer["current"] == layer["size"] for layer in ends.values())
    assert {line["total"] for line in told} == {sum(layer["size"] for layer in ends.values())}
    [model] = runner.http.get("/models").json()
    assert model["tags"] == [name]


def test_pulling_again_says_that_it_is_all_there(runner: Runner, remote: RegistryServer) -> None:
    for _ in range(2):
        response = runner.http.post("/models/create", json={"from": f"{remote.host}/team/far:v1"})
        *told, last = lines(response)
        assert last["type"] == "success"
        assert all(line["layer"]["current"] == line["layer"]["size"] for line in told)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"from": "HOST/team/none:v1"}, 404, "Model not found"),
        ({"from": "a b"}, 400, "Invalid model reference"),
        ({"from": ""}, 400, "from is required"),
        ({}, 400, "from is required"),
        ({"from": 7}, 400, "from"),
        ("{", 400, "JSON"),
        ("[]", 400, "object"),
    ],
)
def test_what_cannot_be_pulled(
    shared: Runner, remote: RegistryServer, body: Any, status: int, words: str
) -> None:
    text = body if isinstance(body, str) else json.dumps(body).replace("HOST", remote.host)
    response = shared.http.post("/models/create", content=text)
    assert response.status_code == status, response.text
    assert words.lower() in response.text.lower()
    assert response.headers["content-type"].startswith("text/plain")


def test_what_is_no_model_is_unsupported(shared: Runner, remote: RegistryServer) -> None:
    config = b"{}"
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": str(Digest.of(config)),
            "size": len(config),
        },
        "layers": [],
    }
    base = f"http://{remote.host}/v2/team/image"
    digest = str(Digest.of(config))
    httpx.post(f"{base}/blobs/uploads/", params={"digest": digest}, content=config)
    put = httpx.put(
        f"{base}/manifests/v1",
        content=json.dumps(manifest),
        headers={"Content-Type": manifest["mediaType"]},  # type: ignore[dict-item]
    )
    assert put.status_code == 201
    response = shared.http.post("/models/create", json={"from": f"{remote.host}/team/image:v1"})
    assert response.status_code == 422
    assert "is not a supported model" in response.text


def test_pushing(runner: Runner, remote: RegistryServer) -> None:
    name = f"{remote.host}/team/pushed:v1"
    runner.store.tag("tiny", Reference.parse(name))
    for body in (None, b"", b"{}", b'{"bearer-token": ""}'):
        response = runner.http.post(f"/models/{name}/push", content=body)
        assert response.status_code == 200
        *told, last = lines(response)
        assert (last["type"], last["message"]) == ("success", "Model pushed successfully")
        assert {line["mode"] for line in told} == {"push"}
    assert modelpack.inspect(name, from_registry=True).digest == runner.store.get("tiny").digest


@pytest.mark.parametrize(
    ("ref", "body", "status", "words"),
    [
        ("none", b"", 404, "Model not found"),
        ("a b", b"", 400, "Invalid model reference"),
        ("sha256:" + "0" * 64, b"", 400, "tag the model first"),
        ("tiny", b"{", 400, "JSON"),
    ],
)
def test_what_cannot_be_pushed(
    shared: Runner, ref: str, body: bytes, status: int, words: str
) -> None:
    response = shared.http.post(f"/models/{ref}/push", content=body)
    assert (response.status_code, words in response.text) == (status, True), response.text


def test_a_registry_that_wants_credentials(runner: Runner, gguf: Path) -> None:
    asked: list[str] = []

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        asked.append(headers.get(b"authorization", b"").decode())
        challenge = f'Bearer realm="http://127.0.0.1:{scope["server"][1]}/token",service="x"'
        start = [(b"www-authenticate", challenge.encode()), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 401, "headers": start})
        await send({"type": "http.response.body", "body": b""})

    from modelpack.http.listener import AppServer

    server = AppServer(lambda: refuse, "127.0.0.1:0", name="registry")
    server.start()
    try:
        host = server.url.removeprefix("http://")
        name = f"{host}/team/secret:v1"
        runner.store.tag("tiny", Reference.parse(name))
        body = {"from": name, "bearer-token": "sesame"}
        for path in ("create", f"{name}/push"):
            response = runner.http.post(f"/models/{path}", json=body)
            assert response.status_code == 401, response.text
            assert response.text.startswith("Unauthorized: ")
        assert "Bearer sesame" in asked
    finally:
        server.stop()


def test_a_token_goes_to_one_registry_only() -> None:
    token = BearerToken("a.example", "sesame")
    assert token.credential("b.example") is None
    found = token.credential("a.example")
    assert found is not None
    assert found.registry_token == "sesame"
    assert "sesame" not in repr(found)


def test_lines_come_in_steps() -> None:
    told = Lines("pull", 5_000_000, escaped=False)
    size = 3_000_000
    steps = [0, 1000, 500_000, 1_100_000, 1_200_000, size, size]
    shown = [told.progress(Progress(Action.FETCH, "w", LAYER, done, size)) for done in steps]
    currents = [json.loads(line)["layer"]["current"] for line in shown if line]
    assert currents == [0, 1_100_000, size]
    assert json.loads(shown[3]) == {
        "type": "progress", "message": "Downloaded: 1.05 MB", "total": 5_000_000,
        "layer": {"id": str(LAYER), "size": size, "current": 1_100_000}, "mode": "pull",
    }  # fmt: skip
    assert told.progress(Progress(Action.NOTE, message="x")) == ""
    retry = json.loads(told.progress(Progress(Action.RETRY, "w", LAYER, message="again")))
    assert (retry["type"], retry["message"]) == ("warning", "again")


def test_text_is_escaped_as_go_does() -> None:
    line = Lines("push", 0, escaped=True).error(RegistryError("""<a> & 'b' "c" """))
    assert "\\&#34;c\\&#34;" in line
    assert "&lt;a&gt; &amp; &#39;b&#39;" in line
    value = json.loads(html.unescape(line))
    assert (value["type"], value["message"]) == ("error", """<a> & 'b' "c" """)
