"""Real weights, fetched once."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpack.testing.weights import minilm_directory


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2."""
    return minilm_directory()
