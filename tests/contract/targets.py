"""The targets that the contract holds for.

To add one, write a factory: a context manager that gets an empty directory and yields a new, empty
target with what the tests must know about it. Then put it into `FACTORIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from modelpack.storage import Target
from modelpack.stores.layout import LayoutStore
from modelpack.stores.memory import MemoryStore


@dataclass(frozen=True)
class Subject:
    """A target under test; `name` turns a tag into what this kind of target calls it."""

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


FACTORIES: dict[str, Factory] = {"memory": memory, "layout": layout}
