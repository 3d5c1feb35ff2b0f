"""Fixtures of the tests of stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelpack.store.layout import LayoutStore
from tests.contract.parts import Watcher
from tests.stores.workers import Worker


@pytest.fixture
def store(tmp_path: Path) -> LayoutStore:
    return LayoutStore(tmp_path / "store")


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    """Start processes of `tests.stores.worker`, which end with the test."""
    workers: list[Worker] = []

    def start_one(*arguments: object) -> Worker:
        workers.append(Worker(*arguments))
        return workers[-1]

    yield start_one
    for worker in workers:
        worker.kill()
