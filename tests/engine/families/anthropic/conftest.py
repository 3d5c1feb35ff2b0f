"""Anthropic's own client."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import pytest

from tests.engine.families.served import Served


@pytest.fixture(scope="session")
def client(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as made:
        yield made
