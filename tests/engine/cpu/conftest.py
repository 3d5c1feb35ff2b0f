"""The library for CPUs: used with the kernels of one instruction set after the other.

A plain run tests the kernels that the processor gets, a long one those of the other sets too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from modelpack_engine.cpu.library import library
from tests.engine.cpu.programs import usable
from tests.peers import missing


@pytest.fixture(scope="session")
def built() -> None:
    """Skip tests of the library where it was not built."""
    if library() is None:
        missing("the library for CPUs was not built")


def _instruction_sets() -> list[Any]:
    """Return those of the processor; a plain run tests the best one only."""
    *others, best = usable()
    return [*(pytest.param(name, marks=pytest.mark.long) for name in others), best]


@pytest.fixture(scope="module", params=_instruction_sets())
def kernels(request: pytest.FixtureRequest, built: None) -> Iterator[str]:
    """Use the kernels of an instruction set that the processor has."""
    name: str = request.param
    best = library().mp_kernels()
    assert library().mp_use_kernels(name.encode()) == 0
    try:
        yield name
    finally:
        library().mp_use_kernels(best)
