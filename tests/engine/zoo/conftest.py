"""Fixtures of the zoo."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest


@pytest.fixture(scope="session")
def rows() -> dict[str, str]:
    """Lines of the table of models, by configuration, as the tests make them."""
    return {}


@pytest.fixture(scope="package")
def uncompiled() -> Iterator[None]:
    """Do not fuse: g++ would compile kernels one by one, which would take most of the time."""
    mx.disable_compile()
    yield
    mx.enable_compile()
