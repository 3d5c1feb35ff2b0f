"""Pulls that fail after they began: wrong bytes, clients that disconnect."""

from __future__ import annotations

import asyncio
import html
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

import modelpack
from modelpack.http.listener import AppServer
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from tests.engine.families.runner.conftest import StoredScripts
from tests.models import tiny_safetensors

pytestmark = pytest.mark.long


@dataclass
class Middleman:
    """A proxy of a registry that replaces one blob with `wrong`."""

    origin: str
    digest: str
    wrong: Callable[[bytes], bytes]
    holds: bool = False  # hold the end of the blob back until the client disconnects
    asked: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        headers = {k.decode(): v.decode() for k, v in scope["headers"] if k != b"host"}
        async with httpx.AsyncClient() as client:
            url = f"http://{self.origin}{path}"
            answer = await client.request(scope["method"], url, headers=headers)
        content = answer.content
        is_blob = path.endswith(self.digest) and scope["method"] == "GET"
        if is_blob:
            content = self.wrong(content)
        start = [(k.encode(), v.encode()) for k, v in answer.headers.items()]
        await send({"type": "http.response.start", "status": answer.status_code, "headers": start})
        if is_blob and self.holds:
            half = content[: len(content) // 2]
            await send({"type": "http.response.body", "body": half, "more_body": True})
            self.asked.set()
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left.set()
            return
        await send({"type": "http.response.body", "body": content})


@contextmanager
def pulling(tmp_path: Path, **about: Any) -> Iterator[tuple[Middleman, str, str, LayoutStore]]:
    """A server, and a registry that controls the largest layer of a model."""
    request = modelpack.PackageRequest(safetensors_dir=tiny_safetensors(tmp_path))
    store = LayoutStore(tmp_path / "store")
    with registry() as far:
        made = modelpack.package(
            f"{far.host}/team/m:v1", request, push=True, store=LayoutStore(tmp_path / "far")
        )
        largest = max(made.manifest.layers, key=lambda layer: layer.size)
        middleman = Middleman(far.host, str(largest.digest), **about)
        near = AppServer(lambda: middleman, "127.0.0.1:0", name="middleman")
        near.start()
        try:
            with ModelServer(
                lambda: ModelPool(StoredScripts(store), grace=0.0), address="127.0.0.1:0"
            ) as server:
                name = near.url.removeprefix("http://") + "/team/m:v1"
                yield middleman, server.url, name, store
        finally:
            near.stop()


def test_a_layer_with_other_bytes_ends_the_stream_with_an_error(tmp_path: Path) -> None:
    with pulling(tmp_path, wrong=lambda content: bytes(len(content))) as (_, url, name, store):
        response = httpx.post(
            f"{url}/models/create",
            json={"from": name},
            headers={"Accept": "application/json"},
            timeout=30,
        )
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert response.status_code == 200
    kinds = [line["type"] for line in lines]
    assert kinds[-1] == "error"
    assert "warning" in kinds
    assert "success" not in kinds
    assert "sha256:" in lines[-1]["message"]
    assert store.models() == ()


def test_a_client_that_leaves_ends_the_pull(tmp_path: Path) -> None:
    """More pulls than the limit of concurrent pulls: each must return its slot."""
    with pulling(tmp_path, wrong=bytes, holds=True) as (middleman, url, name, store):
        for _ in range(3):
            body = {"from": name}
            with httpx.stream("POST", f"{url}/models/create", json=body, timeout=30) as response:
                assert response.status_code == 200
                pieces = response.iter_lines()  # closes the response at its end
                assert json.loads(html.unescape(next(pieces)))["type"] == "progress"
                assert middleman.asked.wait(20)
            assert middleman.left.wait(20)
            middleman.asked.clear()
            middleman.left.clear()
        assert store.models() == ()
        middleman.holds = False
        again = httpx.post(f"{url}/models/create", json={"from": name}, timeout=30)
        assert "Model pulled successfully" in again.text
        assert len(store.models()) == 1


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_client_that_leaves_before_the_first_line(tmp_path: Path, method: str) -> None:
    """The registry never responds, but the pull ends when the client disconnects."""

    async def silent(scope: Any, receive: Any, send: Any) -> None:
        asked.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    asked, left = threading.Event(), threading.Event()
    far = AppServer(lambda: silent, "127.0.0.1:0", name="silent")
    far.start()
    try:
        store = LayoutStore(tmp_path / "store")
        with ModelServer(
            lambda: ModelPool(StoredScripts(store), grace=0.0), address="127.0.0.1:0"
        ) as server:
            name = far.url.removeprefix("http://") + "/team/m:v1"
            place = "create" if method == "POST" else f"{name}?remote=true"

            async def leave() -> None:
                async with httpx.AsyncClient() as client:
                    asking = asyncio.ensure_future(
                        client.request(
                            method, f"{server.url}/models/{place}", json={"from": name}, timeout=60
                        )
                    )
                    assert await asyncio.to_thread(asked.wait, 20)
                    asking.cancel()
                    await asyncio.gather(asking, return_exceptions=True)

            asyncio.run(leave())
            assert left.wait(20)
            assert httpx.get(f"{server.url}/models", timeout=20).json() == []
    finally:
        far.stop()
