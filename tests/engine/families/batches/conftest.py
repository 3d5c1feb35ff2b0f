"""A server for each test, since batches and files are what it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.families.batches.served import Desk, desk


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Desk]:
    with desk(tmp_path / "state") as opened:
        yield opened
