"""Fixtures of the gateway's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.houses import House, open_house
from tests.gateway.servers import Place


@pytest.fixture(scope="package", autouse=True)
def _servers() -> Iterator[None]:
    yield
    Place.close_all()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with open_house(tmp_path) as opened:
        yield opened
