"""One server for the tests of all API families."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.families.served import CALLER, LARGE_CONTEXT, Served, serving


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


@pytest.fixture
def large(served: Served) -> Iterator[Served]:
    """The server, with a model that has a large context."""
    engine = served.engines[CALLER]
    before = engine.max_model_len
    engine.max_model_len = LARGE_CONTEXT
    yield served
    engine.max_model_len = before
