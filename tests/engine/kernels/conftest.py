"""The marker of tests that need a GPU: those in gpu_check.py, which is collected by name only."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU that MLX can use; see gpu_check.py")
