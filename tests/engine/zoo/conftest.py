"""Fixtures of the zoo."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

from modelpack_engine.attention import gather


@pytest.fixture(scope="session")
def rows() -> dict[str, str]:
    """Lines of the table of models by configuration, which the tests add."""
    return {}


@pytest.fixture(scope="package")
def uncompiled() -> Iterator[None]:
    """Switch off mx.compile, whose kernels g++ would compile one by one.

    Also use the CPU attention for many keys, although there are few.
    """
    mx.disable_compile()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "FEW_SCORES", 0)
        patch.setattr(gather, "BLOCK", 8)
        yield
    mx.enable_compile()
