"""All tests of the engine compute with the BLAS that users get; it has to come before MLX."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from modelpack_engine.platform import blas

blas.prepare()

if TYPE_CHECKING:
    from tests.engine.kernels.onhost import Compiled


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Return what `emulated` needs to compile each kernel of a module once."""
    return tmp_path_factory.mktemp("emulated"), {}


@pytest.fixture(scope="session")
def smollm2_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the models of `real_server`."""
    from tests.engine.real_server import real_server

    with real_server(tmp_path_factory.mktemp("real")) as url:
        yield url
