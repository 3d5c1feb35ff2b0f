"""Speculation with SmolLM2's real weights, whose output repeats itself, changes no output."""

from __future__ import annotations

import pytest

from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.models import ModelFiles, load
from modelpack_engine.outputs import RequestEvent
from modelpack_engine.request import EngineRequest, SamplingParams

pytestmark = [pytest.mark.weights, pytest.mark.long]

TEXT = """def add(first, second):
    return first + second


def subtract(first, second):
    return first - second
"""
PROMPTS = [f"{TEXT}\n\n\n# The same again:\n{TEXT[:20]}", "The capital of France is", TEXT]
SAMPLED = [
    SamplingParams(max_tokens=30, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=30, temperature=0.7, top_p=0.9, seed=3, logprobs=2),
    SamplingParams(max_tokens=30, temperature=0, repetition_penalty=1.1, stop=("return",)),
]


def test_outputs_are_the_same() -> None:
    loaded = load(ModelFiles.from_directory(smollm2_gguf()), device="cpu")
    found = {method: answers(loaded, method) for method in (None, "ngram", "draft")}
    for method in ("ngram", "draft"):
        assert found[method][0] == found[None][0], method
    proposed, accepted = found["draft"][1:]
    assert accepted >= 0.95 * proposed > 0
    assert found["ngram"][2] > 5


def answers(loaded: object, method: str | None) -> tuple[list[object], int, int]:
    config = EngineConfig(
        device="cpu", max_num_seqs=4, max_model_len=512, speculative_method=method,
    )  # type: ignore[arg-type]  # fmt: skip
    draft = loaded if method == "draft" else None
    engine = Engine(loaded, config, draft=draft)  # type: ignore[arg-type]
    for number, (prompt, params) in enumerate(zip(PROMPTS, SAMPLED, strict=True)):
        engine.add_request(str(number), EngineRequest(engine.tokenizer.encode(prompt), params))
    events: dict[str, list[RequestEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    shown: list[object] = [
        (
            [token for event in events[key] for token in event.token_ids],
            "".join(event.text for event in events[key]),
            events[key][-1].finish_reason,
        )
        for key in sorted(events)
    ]
    stats = engine.stats()
    return shown, stats.proposed_tokens, stats.accepted_tokens
