"""A registry with faults on demand, and clients of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.registry.faulty import FaultyRegistry
from tests.registry.sources import Client, Connect


@pytest.fixture
def registry() -> Iterator[FaultyRegistry]:
    with FaultyRegistry() as registry:
        yield registry


@pytest.fixture
def storage() -> Iterator[FaultyRegistry]:
    """A second server, to which the first one may redirect clients."""
    with FaultyRegistry() as storage:
        yield storage


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Make clients that are closed with the test."""
    with ExitStack() as stack:
        yield lambda host, **options: stack.enter_context(Client(host, **options))


@pytest.fixture
def client(registry: FaultyRegistry, connect: Connect) -> Client:
    return connect(registry.host)
