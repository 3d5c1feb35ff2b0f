"""The tokens are those of transformers, also where mlx-vlm has others."""

from __future__ import annotations

import json

import pytest

from tests.engine.vision import tiny
from tests.engine.vision.oracle import ANSWERS, ORACLE_KINDS, prompt
from tests.engine.vision.tiny import kinds, run


@pytest.mark.parametrize("kind", kinds(*ORACLE_KINDS))
def test_tokens_are_those_of_transformers(kind: str) -> None:
    """transformers 5.23.0 gave them, with torch 2.8.0 or 2.13.0."""
    assert run(tiny.tiny_engine(kind), prompt(kind)) == [json.loads(ANSWERS.read_text())[kind]]
