"""Conversations with a scripted engine."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from modelpack_engine.async_engine import Abort
from modelpack_engine.errors import ContextLengthError, RequestError
from modelpack_engine.outputs import FinishReason
from modelpack_engine.request import LogitsMask, SamplingParams
from modelpack_server.conversation.chat import count_prompt, start_chat
from modelpack_server.conversation.masks import ReasoningBudget
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.conversation.spec import ChatDelta, ChatSpec
from modelpack_server.tool_parsers.parts import (
    Reasoning,
    Text,
    Tool,
    ToolArguments,
    ToolChoice,
    ToolStart,
)
from tests.engine.scripted import HERMES, THINKING, scripted

HELLO = ChatSpec([{"role": "user", "content": "hello"}], SamplingParams(max_tokens=64))
WEATHER = Tool(
    "weather", "how it is", {"type": "object", "properties": {"city": {"type": "string"}}}
)
CALL = ('<tool_call>\n{"name": "weather", "arg', 'uments": {"city": ', '"Paris"}}\n</tool_call>')


def answer(model: ServedModel, spec: ChatSpec) -> list[ChatDelta]:
    async def run() -> list[ChatDelta]:
        async with await start_chat(model, spec) as stream:
            return [delta async for delta in stream]

    return asyncio.run(run())


def text_of(deltas: list[ChatDelta], kind: type = Text) -> str:
    return "".join(part.text for d in deltas for part in d.parts if isinstance(part, kind))


def test_text_comes_as_it_is_with_an_end() -> None:
    model, engine = scripted("Hello", " world")
    deltas = answer(model, HELLO)
    assert text_of(deltas) == "Hello world"
    assert [d.finish for d in deltas] == [None, "stop"]
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == 2
    assert deltas[-1].usage.cached_tokens == 1
    assert engine.prompt == "user: hello\nassistant:"


def test_choices_keep_their_index_and_logprobs() -> None:
    model, _ = scripted("a", "b")
    deltas = answer(model, replace(HELLO, n=2, params=SamplingParams(logprobs=1)))
    for index in (0, 1):
        mine = [d for d in deltas if d.index == index]
        assert text_of(mine) == "ab"
        assert sum(len(d.logprobs or ()) for d in mine) == 2


def test_a_call_becomes_parts_and_the_reason() -> None:
    model, engine = scripted("Let me see. ", *CALL, template=HERMES)
    deltas = answer(model, replace(HELLO, tools=(WEATHER,)))
    parts = [part for d in deltas for part in d.parts]
    [start] = [part for part in parts if isinstance(part, ToolStart)]
    assert (start.index, start.name) == (0, "weather")
    arguments = "".join(p.fragment for p in parts if isinstance(p, ToolArguments))
    assert json.loads(arguments) == {"city": "Paris"}
    assert text_of(deltas).strip() == "Let me see."
    assert deltas[-1].finish == "tool_calls"
    assert '"weather"' in engine.prompt


def test_no_call_is_read_where_none_may_be() -> None:
    model, engine = scripted(*CALL, template=HERMES)
    spec = replace(HELLO, tools=(WEATHER,), tool_choice=ToolChoice("none"))
    deltas = answer(model, spec)
    assert text_of(deltas) == "".join(CALL)
    assert deltas[-1].finish == "stop"
    assert "weather" not in engine.prompt


def test_a_second_call_ends_an_answer_that_may_have_one() -> None:
    model, engine = scripted(*CALL, *CALL, "more", template=HERMES)
    deltas = answer(model, replace(HELLO, tools=(WEATHER,), parallel_tool_calls=False))
    starts = [p for d in deltas for p in d.parts if isinstance(p, ToolStart)]
    assert len(starts) == 1
    assert deltas[-1].finish == "tool_calls"
    assert Abort("request-0", 0) in engine.aborted
    assert "more" not in text_of(deltas)


def test_a_template_without_tools_gets_them_as_text() -> None:
    model, engine = scripted(*CALL)
    history: list[dict[str, Any]] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "1", "type": "function",
             "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]  # fmt: skip
    deltas = answer(model, replace(HELLO, messages=history, tools=(WEATHER,)))
    assert deltas[-1].finish == "tool_calls"
    assert engine.prompt.startswith("system: You may call")
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}' in engine.prompt
    assert "user: The function returned this result." in engine.prompt
    assert "<tool_response>\nrain\n</tool_response>" in engine.prompt


def test_reasoning_is_apart_counted_and_not_stopped() -> None:
    model, engine = scripted("I th", "ink STOP", "</think>", "yes ", "STOP no", template=THINKING)
    deltas = answer(model, replace(HELLO, params=SamplingParams(stop=("STOP",))))
    assert text_of(deltas, Reasoning).strip() == "I think STOP"
    assert text_of(deltas).strip() == "yes"
    last = deltas[-1]
    assert (last.finish, last.stop_sequence) == ("stop", "STOP")
    assert last.usage is not None
    assert 2 <= last.usage.reasoning_tokens <= 3
    assert engine.params.stop == ()


def test_thinking_that_is_switched_off_is_not_looked_for() -> None:
    model, engine = scripted("a <think> b", template=THINKING)
    deltas = answer(model, replace(HELLO, reasoning=False))
    assert text_of(deltas) == "a <think> b"
    assert engine.prompt.endswith("assistant:")


def test_a_cut_thought_is_no_answer() -> None:
    model, _ = scripted("thinking", " more", template=THINKING, ends=FinishReason.LENGTH)
    deltas = answer(model, HELLO)
    assert text_of(deltas) == ""
    assert text_of(deltas, Reasoning).strip() == "thinking more"
    assert deltas[-1].finish == "length"


def test_a_stop_string_over_pieces_ends_and_aborts() -> None:
    model, engine = scripted("a S", "TO", "P b", "c", template=THINKING)
    engine.pieces = ["</think>", *engine.pieces]
    deltas = answer(model, replace(HELLO, params=SamplingParams(stop=("STOP",)), n=2))
    for index in (0, 1):
        mine = [d for d in deltas if d.index == index]
        assert text_of(mine) == "a "
        assert mine[-1].stop_sequence == "STOP"
        assert mine[-1].usage is not None
        assert mine[-1].usage.prompt_tokens > 0
        assert Abort("request-0", index) in engine.aborted


def test_leaving_aborts() -> None:
    model, engine = scripted("a", "b", "c")

    async def run() -> None:
        async with await start_chat(model, HELLO) as stream:
            async for _ in stream:
                break
        assert engine.aborted == [Abort("request-0")]

    asyncio.run(run())


def test_what_cannot_be_rendered_or_does_not_fit() -> None:
    model, _ = scripted("a", template="{{ raise_exception('no system messages') }}")
    with pytest.raises(RequestError, match="template"):
        answer(model, HELLO)
    model, _ = scripted("a", max_model_len=10)
    with pytest.raises(ContextLengthError, match="model's maximum context length is 10"):
        answer(model, HELLO)


def test_prompts_are_counted_as_they_are_rendered() -> None:
    model, _ = scripted("a")
    assert asyncio.run(count_prompt(model, HELLO)) == len("user: hello\nassistant:")


def test_a_required_call_and_a_constraint_make_masks() -> None:
    from modelpack_server.structured_output import Constraint

    model, engine = scripted("a", template=HERMES)
    required = replace(HELLO, tools=(WEATHER,), tool_choice=ToolChoice("required"))
    for spec in (required, replace(HELLO, constraint=Constraint("regex", "a+"))):
        answer(model, spec)
        assert engine.params.mask is not None
        allowed = engine.params.mask().allowed()
        assert allowed is not None
        assert any(allowed)
    answer(model, HELLO)
    assert engine.params.mask is None


def test_a_forced_call_that_is_cut_leaves_no_markup() -> None:
    spec = replace(HELLO, tools=(WEATHER,), tool_choice=ToolChoice("required"))
    begun = '\n<tool_call>\n{"name": "wea'
    for pieces, calls in (((*CALL, begun), 1), ((begun,), 0)):
        model, _ = scripted(*pieces, template=HERMES, ends=FinishReason.LENGTH)
        deltas = answer(model, spec)
        assert text_of(deltas) == ""
        assert deltas[-1].finish == "length"
        assert sum(isinstance(part, ToolStart) for d in deltas for part in d.parts) == calls
        free = answer(model, replace(spec, tool_choice=ToolChoice()))
        assert text_of(free).strip() == begun.strip()


def test_a_budget_of_reasoning_forces_its_end() -> None:
    model, _ = scripted("a")
    mask = ReasoningBudget(
        2, model.tokenizer, opening="<think>", closing="</think>", closing_ids=(1, 2)
    )
    for token in model.tokenizer.encode("<think>ab"):
        assert mask.allowed() is None
        mask.accept(token)
    assert mask.allowed() == bytes([0b10])
    mask.accept(1)
    assert mask.allowed() == bytes([0b100])
    mask.accept(2)
    assert mask.allowed() is None


def test_an_answer_without_reasoning_has_no_budget() -> None:
    model, _ = scripted("a")
    mask = ReasoningBudget(
        0, model.tokenizer, opening="<think>", closing="</think>", closing_ids=(1,)
    )
    for token in model.tokenizer.encode("answer <think>"):
        mask.accept(token)
    assert mask.allowed() is None


def test_defaults_presets_and_what_is_given() -> None:
    model, _ = scripted("a")
    assert model.sampling_params({}).top_p == 0.5
    assert model.sampling_params({"top_p": 0.9}).top_p == 0.9
    assert model.sampling_params({}, preset="creative").temperature == 1.5
    assert model.sampling_params({"temperature": 0}, preset="creative").temperature == 0
    with pytest.raises(RequestError, match="creative"):
        model.sampling_params({}, preset="loud")


def may_say(mask: LogitsMask, model: ServedModel, text: str) -> bool:
    """Return whether a mask allows a text, token by token, followed by the end."""
    for token in [*model.tokenizer.encode(text), *model.tokenizer.eos_token_ids]:
        allowed = mask.allowed()
        if allowed is not None and not allowed[token // 8] >> token % 8 & 1:
            return False
        mask.accept(token)
    return True


@pytest.mark.parametrize("template", [HERMES, THINKING])
def test_a_constrained_answer_or_a_call(template: str) -> None:
    from modelpack_server.structured_output import Constraint

    model, engine = scripted("a", template=template)
    spec = replace(HELLO, tools=(WEATHER,), constraint=Constraint("regex", "a+"))
    call, thought = "".join(CALL), "hm</think>\n\n" if template == THINKING else ""
    two = f"{call}\n{call}"

    def allowed(spec: ChatSpec, text: str) -> bool:
        answer(model, spec)
        assert engine.params.mask is not None
        return may_say(engine.params.mask(), model, thought + text)

    assert [allowed(spec, text) for text in ("aa", call, two, "b", f"a{call}")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    single = replace(spec, parallel_tool_calls=False)
    assert [allowed(single, text) for text in ("aa", call, two)] == [True, True, False]
    silent = replace(spec, tool_choice=ToolChoice("none"))
    assert [allowed(silent, text) for text in ("aa", call)] == [True, False]
    forced = replace(spec, tool_choice=ToolChoice("required"), parallel_tool_calls=False)
    assert [allowed(forced, text) for text in ("aa", call, two)] == [False, True, False]


def test_a_tool_that_does_not_compile_is_named() -> None:
    from modelpack_server.structured_output import Constraint

    model, _ = scripted("a", template=HERMES)
    odd = Tool("odd", "", {"type": "object", "properties": {"x": {"type": "nothing"}}})
    spec = replace(HELLO, tools=(odd,), constraint=Constraint("regex", "a+"))
    with pytest.raises(RequestError, match="odd") as raised:
        answer(model, spec)
    assert raised.value.param == "tools"
