"""The cluster of the tests, with an image of this checkout and a registry with models beside it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelpack.testing.weights import smollm2_gguf
from tests.cluster.cluster import (
    PAUSE,
    REGISTRY,
    Cluster,
    build_programs,
    program_image,
    remove_tree,
    until,
)
from tests.cluster.workloads import IMAGE, MODELPACK, SMOLLM2, package
from tests.engine.serving.tiny import write_tiny
from tests.interop.compose import ROOT
from tests.interop.engine import require_engine
from tests.interop.python_image import import_python_image


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of the image of this checkout, with the engine."""
    require_engine()
    subprocess.run(
        ["docker", "build", "--quiet", "--network", "host", "--tag", IMAGE,
         "--build-arg", f"BASE={import_python_image()}",
         "--build-arg", "EXTRAS=engine,gateway,tokens", str(ROOT)],
        env={**os.environ, "DOCKER_BUILDKIT": "0"}, check=True, capture_output=True, timeout=1200,
    )  # fmt: skip
    archive = tmp_path_factory.mktemp("image") / "engine.tar"
    subprocess.run(["docker", "save", IMAGE, "-o", archive], check=True)
    return archive


@pytest.fixture(scope="session")
def cluster(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster with its images, and a registry with models beside it."""
    programs = build_programs(ROOT / ".cache")
    directory = tmp_path_factory.mktemp("cluster")
    found = Cluster(directory, programs)
    try:
        found.start()
        program_image(PAUSE, programs / "pause", directory / "pause.tar")
        found.import_image(directory / "pause.tar")
        found.import_image(image)
        host, port = REGISTRY.split(":")
        store = str(directory / "registry")
        with found.serving(MODELPACK, "--store", store, "registry", "serve", "--host", host,
                           "--port", port, "--allow-anonymous"):  # fmt: skip
            until(
                "the registry answers",
                lambda: "{}" in found.run("curl", "-s", f"http://{REGISTRY}/v2/", check=False),
                30, lambda: "",
            )  # fmt: skip
            for version, temperature in (("v1", 0.0), ("v2", 0.5)):
                files = write_tiny(directory / version, temperature=temperature)
                package(found, f"{REGISTRY}/team/tiny:{version}", "--safetensors-dir", str(files))
            package(found, SMOLLM2, "--gguf", str(smollm2_gguf()))
            yield found
    finally:
        found.stop()
        remove_tree(directory)
