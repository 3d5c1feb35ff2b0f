"""The Dockerfile builds, and its image is what compose.yaml and Kubernetes take it for."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelpack
from modelpack.deploy.local_server import container_host
from modelpack.store.layout import LayoutStore
from modelpack_server.api.app import ModelServer
from modelpack_server.gateway.keys import add_key
from modelpack_server.gateway.limits import Limits
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.engine.serving.tiny import write_tiny
from tests.interop.compose import ROOT, Compose, build_compose
from tests.interop.docker_model import CONFIG
from tests.interop.engine import require_engine
from tests.interop.python_image import import_python_image
from tests.peers import require

pytestmark = [pytest.mark.peer("docker"), pytest.mark.long]
IMAGE = "modelpack-test/tool:here"


@pytest.fixture(scope="module")
def image() -> str:
    """The image, on a base that is made here."""
    require_engine()
    subprocess.run(
        ["docker", "build", "--quiet", "--network", "host", "--tag", IMAGE,
         "--build-arg", f"BASE={import_python_image()}", str(ROOT)],
        env={**os.environ, "DOCKER_BUILDKIT": "0"}, check=True, capture_output=True, timeout=600,
    )  # fmt: skip
    return IMAGE


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["docker", "run", "--rm", *arguments], capture_output=True, text=True, timeout=120
    )


def test_it_is_the_command_line_and_nobody_in_particular(image: str) -> None:
    assert run(image, "--version").stdout.strip() == f"modelpack {modelpack.__version__}"
    who = run("--entrypoint", "python", image, "-c", "import os; print(os.getuid(), os.getgid())")
    assert who.stdout.split() == ["10001", "10001"]


def test_its_store_can_be_written_to(image: str) -> None:
    fixtures = ROOT / "fixtures" / "models"
    gguf = next((fixtures / "tiny-gguf").glob("*.gguf"))
    done = run("-v", f"{gguf}:/in/tiny.gguf:ro", "--read-only", "--tmpfs", "/tmp", image,
               "package", "--gguf", "/in/tiny.gguf", "team/tiny")  # fmt: skip
    assert done.stdout.startswith("sha256:"), done.stderr


def test_the_gateway_wants_keys_where_others_reach_it(image: str) -> None:
    refused = run(image, "gateway", "--host", "0.0.0.0", "--upstream", "http://127.0.0.1:1")
    assert refused.returncode == 2
    assert "no API keys are configured" in refused.stderr


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ModelServer]:
    """A server with team/tiny, where containers reach it."""
    store = LayoutStore(tmp_path / "store")
    files = write_tiny(tmp_path / "files", temperature=0.0)
    modelpack.package("team/tiny", modelpack.PackageRequest(safetensors_dir=files), store=store)
    pool = lambda: ModelPool(StoreCatalogue(store, CONFIG), memory=2**32, grace=0.0)  # noqa: E731
    with ModelServer(pool, address=f"{container_host()}:0", allow_remote=True) as running:
        yield running


def test_the_compose_example(image: str, server: ModelServer, tmp_path: Path) -> None:
    require("go")
    example = tmp_path / "example"
    shutil.copytree(ROOT / "examples" / "compose", example)
    file = example / "compose.yaml"
    file.write_text(file.read_text().replace("4096", "128"))  # more than a tiny model has
    key = add_key(example / "keys.toml", "app", limits=Limits(None, None, None), models=())
    (example / "app.key").write_text(key)
    for name in ("keys.toml", "app.key"):
        (example / name).chmod(0o644)
    compose = Compose(
        build_compose(), example,
        {"MODELPACK_HOST": server.url, "MODELPACK_IMAGE": image, "MODEL": "team/tiny"},
    )  # fmt: skip
    try:
        log = compose("up", "--no-build", "--abort-on-container-exit", "--exit-code-from", "app")
        assert "the model says:" in log
        # Without its key it is nobody.
        (example / "app.key").write_text("wrong")
        refused = compose.try_("up", "--no-build", "--force-recreate",
                               "--abort-on-container-exit", "--exit-code-from", "app")  # fmt: skip
        assert refused.returncode == 1
        assert "401" in refused.stdout + refused.stderr
    finally:
        compose.try_("down", "--timeout", "0")
