"""The targets that the contract holds for.

To add one, write a factory: a context manager that gets an empty directory and yields a new, empty
target with what the tests must know about it. Then put it into `FACTORIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from modelpack.registry import Registry
from modelpack.storage import Target
from modelpack.store.layout import LayoutStore
from modelpack.store.memory import MemoryStore
from tests.peers import docker_registry
from tests.registry.faulty import FaultyRegistry


@dataclass(frozen=True)
class Subject:
    """A target under test; `name` turns a tag into a name of this kind of target."""

    target: Target
    name: Callable[[str], str]


Factory = Callable[[Path], AbstractContextManager[Subject]]


def _reference(tag: str) -> str:
    return f"registry.example.com/team/model:{tag}"


@contextmanager
def memory(_: Path) -> Iterator[Subject]:
    """A store in memory."""
    yield Subject(MemoryStore(), _reference)


@contextmanager
def layout(directory: Path) -> Iterator[Subject]:
    """A store on disk."""
    yield Subject(LayoutStore(directory / "store"), _reference)


@contextmanager
def repository(_: Path) -> Iterator[Subject]:
    """A repository in a registry of ours."""
    with FaultyRegistry() as server, Registry(server.host) as registry:
        yield Subject(registry.repository("team/model"), str)


@contextmanager
def docker_repository(directory: Path) -> Iterator[Subject]:
    """A repository in Debian's docker-registry."""
    with docker_registry(directory / "registry") as host, Registry(host) as registry:
        yield Subject(registry.repository("team/model"), str)


FACTORIES: dict[str, Factory] = {
    "memory": memory,
    "layout": layout,
    "repository": repository,
    "docker-registry": docker_repository,
}
