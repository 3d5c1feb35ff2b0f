"""What the gateway's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gateway.servers import Place


@pytest.fixture(scope="package", autouse=True)
def _servers() -> Iterator[None]:
    yield
    Place.close_all()
