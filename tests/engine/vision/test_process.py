"""Pictures of prompts for an engine in a process of its own."""

from __future__ import annotations

import asyncio
import pickle
from dataclasses import replace
from functools import partial

import pytest

from modelpack_engine import process_engine
from modelpack_engine.process_engine import ProcessEngine
from modelpack_engine.request import EngineRequest
from modelpack_engine.vision.processor import PictureProcessor
from modelpack_server.conversation.pictures import PictureFile
from tests.engine.vision import tiny
from tests.engine.vision.media import file_of
from tests.engine.vision.test_processor_cache import asked as asked_of
from tests.engine.vision.tiny import picture, request, run


@pytest.mark.long
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_processor_in_another_process_makes_equal_inputs(kind: str) -> None:
    engine = tiny.tiny_engine(kind)
    assert engine.vision is not None
    made = engine.vision.processor
    found = pickle.loads(process_engine._dumped((engine.tokenizer, made), to_server=True))[1]
    assert isinstance(found, PictureProcessor)
    assert found is not made
    asked = [request(engine, "<image>What is it?", [picture(1)])]
    engine.vision = replace(engine.vision, processor=found)
    asked.append(request(engine, "<image>What is it?", [picture(1)]))
    assert asked[0].prompt_token_ids == asked[1].prompt_token_ids
    [one], [two] = (each.media for each in asked)
    assert (one.token_ids, one.digest, one.grid) == (two.token_ids, two.digest, two.grid)
    assert one.inputs.keys() == two.inputs.keys()
    assert all((one.inputs[name] == two.inputs[name]).all() for name in one.inputs)


@pytest.mark.long
def test_tokens_are_those_of_an_engine_in_this_process() -> None:
    make_engine = partial(tiny.tiny_engine, "llava", max_num_batched_tokens=256)
    local = make_engine()
    text = "<image>What is it?"
    asked = request(local, text, [picture(1)])
    [expected] = run(local, asked)
    file = PictureFile(file_of(picture(1)), "here")
    again = [asked_of(local, text, [file]) for _ in range(2)][1]
    assert not again.media[0].inputs, "its process makes them"
    engine = ProcessEngine(make_engine)
    engine.wait_until_ready(300)

    async def read(asked: EngineRequest) -> list[int]:
        async with await engine.submit(asked) as stream:
            return [token async for event in stream for token in event.token_ids]

    try:
        assert engine.picture_processor is not None
        assert asyncio.run(read(again)) == expected
        assert asyncio.run(read(asked)) == expected
    finally:
        engine.close()
