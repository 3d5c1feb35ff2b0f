"""Which files are collected where vLLM is installed."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m vllm`, import no other files: vLLM's environment lacks MLX and other peers."""
    name = collection_path.name
    is_other = name.startswith("test_") and not name.startswith("test_vllm")
    return True if config.getoption("markexpr") == "vllm" and is_other else None
