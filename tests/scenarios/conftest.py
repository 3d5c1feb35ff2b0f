"""What the scenarios share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.registry.faulty import FaultyRegistry
from tests.scenarios.published import Published


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Published]:
    with FaultyRegistry() as registry:
        yield Published(registry, tmp_path)
