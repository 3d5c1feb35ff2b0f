"""Fixtures of the scheduling tests."""

from __future__ import annotations

import pytest

from modelpack_engine.core import block_manager


@pytest.fixture(autouse=True)
def hashes_in_twos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the hashes of two blocks at once, as the sequences of these tests have few."""
    monkeypatch.setattr(block_manager, "HASHED_AT_ONCE", 2)
