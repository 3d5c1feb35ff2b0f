"""OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.engine.families.served import Served


@pytest.fixture(scope="session")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made
