"""A model in a registry, and keys to sign it with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.testing import registry
from modelpack.trust.keys import PrivateKey, generate_key_pair, read_private_key
from tests.models import package, tiny_safetensors

PASSWORD = b"a password"


@dataclass
class Published:
    """A model in an embedded registry; `store` is an empty one."""

    host: str
    reference: str
    digest: Digest
    origin: modelpack.Store
    store: modelpack.Store


@contextmanager
def publishing(directory: Path, files: Path) -> Iterator[Published]:
    """Serve the model in `files` from a registry within the context; all is in `directory`."""
    with registry(directory / "registry") as server:
        reference = f"{server.host}/team/model:v1"
        origin = modelpack.Store(directory / "origin")
        made = package(reference, files, origin, push=True)
        store = modelpack.Store(directory / "store")
        yield Published(server.host, reference, made.digest, origin, store)


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Published]:
    with publishing(tmp_path, tiny_safetensors(tmp_path)) as made:
        yield made


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
