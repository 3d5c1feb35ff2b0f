"""All tests of the engine compute with the BLAS that users get; it has to come before MLX."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from modelpack_engine.platform import blas

blas.prepare()


@pytest.fixture(scope="session")
def smollm2_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the models of `real_server`."""
    from tests.engine.real_server import real_server

    with real_server(tmp_path_factory.mktemp("real")) as url:
        yield url
