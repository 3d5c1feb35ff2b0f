"""One server for all families of APIs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.families.served import Served, serving


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server
