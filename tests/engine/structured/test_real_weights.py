"""SmolLM2 at a high temperature: its output under a mask is valid."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.models import ModelFiles, load
from modelpack_engine.outputs import FinishReason, RequestEvent
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_server.structured_output import Constraint, compile_constraint, grammar_vocabulary

pytestmark = [pytest.mark.weights, pytest.mark.long]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "grün"]}, "n": {"type": "integer", "maximum": 99}},
    "required": ["colour", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    loaded = load(ModelFiles.from_directory(smollm2_gguf()), device="cpu")
    return Engine(loaded, EngineConfig(max_num_seqs=8, device="cpu", self_test=False))


def test_different_grammars_in_one_batch(engine: Engine) -> None:
    vocabulary = grammar_vocabulary(engine.tokenizer, engine.vocab_size)
    chosen = compile_constraint(Constraint("json_schema", SCHEMA), vocabulary)
    dated = compile_constraint(Constraint("regex", r"\d{4}-\d\d"), vocabulary)
    prompt = engine.tokenizer.encode("A colour and a number as JSON:")
    hot = SamplingParams(max_tokens=40, temperature=1.5, seed=1, mask=chosen.mask)
    free = SamplingParams(max_tokens=6, temperature=0)
    engine.add_request("json", EngineRequest(prompt, hot, n=4))
    engine.add_request(
        "date", EngineRequest(prompt, SamplingParams(max_tokens=9, seed=2, mask=dated.mask))
    )
    engine.add_request("free", EngineRequest(prompt, free))
    events: dict[tuple[str, int], list[RequestEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault((event.request_id, event.index), []).append(event)
    texts = {key: "".join(event.text for event in found) for key, found in events.items()}
    assert all(
        found[-1].finish_reason is FinishReason.STOP
        for k, found in events.items()
        if k[0] != "free"
    )
    for (name, _), text in texts.items():
        if name == "json":
            jsonschema.validate(json.loads(text), SCHEMA)
    assert re.fullmatch(r"\d{4}-\d\d", texts["date", 0])
    [alone] = engine.generate([prompt], free)
    assert texts["free", 0] == "".join(event.text for event in alone)
