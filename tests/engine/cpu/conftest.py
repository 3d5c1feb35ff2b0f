"""The library for CPUs: used with the kernels of one instruction set after the other.

A plain run tests the kernels that the processor gets, a long one those of the other sets too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from modelpack_engine.cpu.library import library
from tests.engine.cpu.programs import INSTRUCTION_SETS
from tests.peers import missing


@pytest.fixture(scope="session")
def built() -> None:
    """Skip tests of the library where it was not built."""
    if library() is None:
        missing("the library for CPUs was not built")


def _instruction_sets() -> list[Any]:
    own = INSTRUCTION_SETS[-1] if library() is None else library().mp_kernels().decode()
    return [
        pytest.param(name, marks=[] if name == own else pytest.mark.long)
        for name in INSTRUCTION_SETS
    ]


@pytest.fixture(scope="module", params=_instruction_sets())
def kernels(request: pytest.FixtureRequest, built: None) -> Iterator[str]:
    """Use the kernels of an instruction set that the processor has."""
    name: str = request.param
    best = library().mp_kernels()
    if library().mp_use_kernels(name.encode()):
        pytest.skip(f"this processor has no {name}")
    try:
        yield name
    finally:
        library().mp_use_kernels(best)
