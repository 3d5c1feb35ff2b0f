"""The engine's tokens are those of mlx-lm's single-request path, on SmolLM2's real weights."""

from __future__ import annotations

import pytest

from modelpack_engine.engine import Engine
from modelpack_engine.outputs import RequestEvent
from modelpack_engine.request import SamplingParams
from tests.engine.real.conftest import NUM_TOKENS
from tests.engine.real.prompts import PROMPTS

pytestmark = [pytest.mark.weights, pytest.mark.long]

GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0)


def tokens(events: list[RequestEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def test_alone(engine: Engine, prompts: list[list[int]], expected: list[list[int]]) -> None:
    for number in (0, 5, 11):
        [events] = engine.generate([prompts[number]], GREEDY)
        assert tokens(events) == expected[number], PROMPTS[number]


def test_twenty_together(
    engine: Engine, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """Eight at a time; prompts longer than a step come in chunks beside the others' answers."""
    assert len(set(map(tuple, prompts))) == 20
    assert sum(len(prompt) > 64 for prompt in prompts) >= 2
    before = engine.stats().num_mixed_steps
    answers = engine.generate(prompts, GREEDY)
    assert engine.stats().num_mixed_steps >= before + 10
    for prompt, events, reference in zip(PROMPTS, answers, expected, strict=True):
        assert tokens(events) == reference, prompt
    assert " Paris" in engine.tokenizer.decode(expected[0])
    assert engine.stats().blocks_used == 0
