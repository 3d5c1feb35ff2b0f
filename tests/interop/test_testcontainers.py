"""A registry in a container, started by testcontainers on a real Docker engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelpack
from tests.interop.engine import PORT, import_registry_image, require_engine
from tests.models import tiny_gguf

pytestmark = [
    pytest.mark.peer("docker"),
    # testcontainers leaves its client's socket to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    require_engine()
    # Its reaper is an image that would have to be pulled; the context below cleans up instead.
    os.environ["TESTCONTAINERS_RYUK_DISABLED"] = "true"
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.wait_strategies import PortWaitStrategy

    container = DockerContainer(import_registry_image()).with_exposed_ports(PORT)
    with container.waiting_for(PortWaitStrategy(PORT)) as running:
        yield f"127.0.0.1:{running.get_exposed_port(PORT)}"


def test_a_model_goes_through_a_container(host: str, tmp_path: Path) -> None:
    reference = f"{host}/team/tiny:v1"
    first, second = modelpack.Store(tmp_path / "first"), modelpack.Store(tmp_path / "second")
    request = modelpack.PackageRequest(gguf=tiny_gguf(tmp_path))
    made = modelpack.package(reference, request, push=True, store=first)
    assert made.pushed is not None
    assert made.pushed.transfer.written == 2

    pulled = modelpack.pull(reference, store=second)
    assert pulled.digest == made.digest
    [weight] = modelpack.resolve(reference, store=second).files
    assert weight.path.read_bytes() == (tmp_path / "tiny.gguf").read_bytes()

    again = modelpack.push(reference, store=first)
    assert again.transfer.bytes_written == 0


def test_the_container_holds_what_we_pushed(host: str, tmp_path: Path) -> None:
    reference = f"{host}/team/other:v1"
    store = modelpack.Store(tmp_path / "store")
    request = modelpack.PackageRequest(gguf=tiny_gguf(tmp_path), format="cncf")
    made = modelpack.package(reference, request, push=True, store=store)
    seen = modelpack.inspect(reference, from_registry=True)
    assert seen.digest == made.digest
    assert seen.manifest.raw == made.manifest.raw
