"""A model in a registry, and keys to sign it with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.testing import registry
from modelpack.trust.keys import PrivateKey, generate_key_pair, read_private_key
from tests.models import tiny_safetensors

PASSWORD = b"a password"


@dataclass
class Published:
    """A model in an embedded registry; `store` is an empty one."""

    host: str
    reference: str
    digest: Digest
    origin: modelpack.Store
    store: modelpack.Store


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Published]:
    with registry(tmp_path / "registry") as server:
        reference = f"{server.host}/team/model:v1"
        origin = modelpack.Store(tmp_path / "origin")
        request = modelpack.PackageRequest(safetensors_dir=tiny_safetensors(tmp_path))
        made = modelpack.package(reference, request, push=True, store=origin)
        yield Published(
            server.host, reference, made.digest, origin, modelpack.Store(tmp_path / "store")
        )


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the key pairs `ours` and `theirs`, encrypted with `PASSWORD`."""
    directory = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        generate_key_pair(directory / name, PASSWORD)
    return directory


@pytest.fixture(scope="session")
def ours(keys: Path) -> PrivateKey:
    return read_private_key(keys / "ours.key", PASSWORD)


@pytest.fixture(scope="session")
def theirs(keys: Path) -> PrivateKey:
    return read_private_key(keys / "theirs.key", PASSWORD)
