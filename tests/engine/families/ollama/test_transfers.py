"""/api/pull and /api/push with our own registry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ollama
import pytest

import modelpack.testing
from modelpack.registry_server import RegistryServer, RequestRecord
from tests.engine.families.ollama.conftest import Stocked, serving


class Watched:
    """A registry, and the number of requests for each blob."""

    def __init__(self) -> None:
        self.server: RegistryServer
        self.blobs: Counter[str] = Counter()

    def saw(self, record: RequestRecord) -> None:
        if record.method == "GET" and "/blobs/" in record.path:
            self.blobs[record.path] += 1


@pytest.fixture
def registry() -> Iterator[Watched]:
    watched = Watched()
    with modelpack.testing.registry(on_request=watched.saw) as server:
        watched.server = server
        yield watched


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Stocked]:
    """A server with an empty store."""
    with serving(tmp_path / "store") as served:
        yield served


def pushed(stocked: Stocked, registry: Watched) -> str:
    """Push `tiny`; return its name in the registry."""
    name = f"{registry.server.host}/team/tiny:v1"
    stocked.client.copy("tiny", name)
    try:
        assert stocked.client.push(name).status == "success"
    finally:
        stocked.client.delete(name)
    return name


def test_push_and_pull_whole(stocked: Stocked, empty: Stocked, registry: Watched) -> None:
    name = pushed(stocked, registry)
    assert empty.client.list().models == []
    assert empty.client.pull(name).status == "success"
    [model] = empty.client.list().models
    assert model.model == name
    answer = empty.client.generate(name, "a", options={"num_predict": 2, "temperature": 0})
    assert answer.eval_count == 2


def test_push_and_pull_told(stocked: Stocked, empty: Stocked, registry: Watched) -> None:
    name = f"{registry.server.host}/team/told:v1"
    stocked.client.copy("tiny", name)
    lines = list(stocked.client.push(name, stream=True))
    stocked.client.delete(name)
    assert lines[0].status == "retrieving manifest"
    assert [line.status for line in lines[-2:]] == ["pushing manifest", "success"]
    lines = list(empty.client.pull(name, stream=True))
    assert lines[0].status == "pulling manifest"
    assert [line.status for line in lines[-3:]] == [
        "verifying sha256 digest", "writing manifest", "success",
    ]  # fmt: skip
    layers = [line for line in lines if line.digest is not None]
    largest = max(layers, key=lambda line: line.total or 0)
    assert largest.digest is not None
    assert largest.status == f"pulling {largest.digest.removeprefix('sha256:')[:12]}"
    last = [line for line in layers if line.digest == largest.digest][-1]
    assert last.completed == last.total
    assert (last.total or 0) > 100_000
    again = [line for line in empty.client.pull(name, stream=True) if line.digest]
    assert again
    assert all(line.completed == line.total for line in again)


def test_bad_references(stocked: Stocked, registry: Watched) -> None:
    gone = f"{registry.server.host}/team/nothing:v1"
    for stream in (False, True):
        with pytest.raises(ollama.ResponseError, match="nothing") as caught:
            list(stocked.client.pull(gone, stream=stream))  # type: ignore[call-overload]
        assert caught.value.status_code == (-1 if stream else 404)
        with pytest.raises(ollama.ResponseError, match="component") as caught:
            list(stocked.client.pull("a//b", stream=stream))  # type: ignore[call-overload]
        assert caught.value.status_code == 400
        with pytest.raises(ollama.ResponseError, match="not found") as caught:
            list(stocked.client.push(gone, stream=stream))  # type: ignore[call-overload]
        assert caught.value.status_code == 404


def test_pulls_of_the_same_share(stocked: Stocked, empty: Stocked, registry: Watched) -> None:
    name = pushed(stocked, registry)
    registry.blobs.clear()
    with ThreadPoolExecutor(4) as threads:
        pulls = [threads.submit(empty.client.pull, name, stream=False) for _ in range(4)]
        assert [done.result(60).status for done in pulls] == ["success"] * 4
    assert registry.blobs
    assert set(registry.blobs.values()) == {1}
