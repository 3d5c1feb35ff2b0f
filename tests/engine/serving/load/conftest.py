"""Servers for hostile requests: without protection, and protected like `modelpack serve`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.serving.load.served import Served, serving


@pytest.fixture(scope="module", params=[False, True], ids=["bare", "protected"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("store") / "models", protected=request.param) as server:
        yield server
