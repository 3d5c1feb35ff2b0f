"""Parts are emitted as soon as they are final, and no earlier."""

from __future__ import annotations

import re

import pytest

from modelpack_server.tool_parsers.families import OutputFormat
from modelpack_server.tool_parsers.parser import OutputParser
from modelpack_server.tool_parsers.parts import Reasoning, Text, Tool, ToolArguments, ToolStart
from tests.engine.output.reading import TOOLS, call, joined, parts_of, read, text, thought

HERMES = OutputFormat.named("hermes")


def parser(family: str = "hermes", *, starts_reasoning: bool = False) -> OutputParser:
    return OutputParser(OutputFormat.named(family), TOOLS, starts_reasoning=starts_reasoning)


STREAMING = {
    "hermes": ('<tool_call>\n{"name": "get_weather", "arguments": ', "}\n</tool_call>"),
    "llama3": ('{"name": "get_weather", "parameters": ', "}"),
    "mistral": ('[TOOL_CALLS] [{"name": "get_weather", "arguments": ', "}]"),
    "mistral_v11": ("[TOOL_CALLS]get_weather", ""),
    "mistral_v13": ("[TOOL_CALLS]get_weather[ARGS]", ""),
    "harmony": ("<|channel|>commentary to=functions.get_weather<|message|>", "<|call|>"),
    "deepseek_v3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n",
        "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "deepseek_v31": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>",
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|><|tool_calls_section_end|>",
    ),
    "nemotron": ('<TOOLCALL>[{"name": "get_weather", "arguments": ', "}]</TOOLCALL>"),
    "granite": ('<|tool_call|>[{"name": "get_weather", "arguments": ', "}]"),
    "xlam": ('[{"name": "get_weather", "arguments": ', "}]"),
    "functionary": ("get_weather\n<|content|>", "<|stop|>"),
}


@pytest.mark.parametrize("family", STREAMING)
def test_argument_text_streams_as_it_comes(family: str) -> None:
    opening, closing = STREAMING[family]
    p = parser(family)
    assert [part for c in opening for part in p.feed(c)] == []
    start, begun = p.feed("{")
    assert isinstance(start, ToolStart)
    assert start.name == "get_weather"
    assert begun == ToolArguments(0, "{")
    assert p.feed('"ci') == []
    assert p.feed('ty": "') == [ToolArguments(0, '"city": "')]
    assert p.feed("Par") == [ToolArguments(0, "Par")]
    assert p.feed("is") == [ToolArguments(0, "is")]
    assert p.feed('"}' + closing) == [ToolArguments(0, '"}')]
    assert p.finish() == []


BY_PARAMETER = {
    "qwen3_coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>",
        "\n<parameter=days>\n3\n</parameter>",
        "\n</function>\n</tool_call>",
    ),
    "glm": (
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>",
        "\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>",
        "\n</tool_call>",
    ),
    "minimax_m2": (
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter'
        ' name="city">Paris</parameter>',
        '\n<parameter name="days">3</parameter>',
        "\n</invoke>\n</minimax:tool_call>",
    ),
    "gemma4": ('<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,', "days:3,", "}<tool_call|>"),
}


@pytest.mark.parametrize("family", BY_PARAMETER)
def test_other_arguments_in_tags_come_one_by_one(family: str) -> None:
    first, second, last = BY_PARAMETER[family]
    p = parser(family)
    *_, arguments = p.feed(first)
    assert arguments == ToolArguments(0, '{"city": "Paris"')
    assert p.feed(second) == [ToolArguments(0, ', "days": 3')]
    assert p.feed(last) == [ToolArguments(0, "}")]


STRINGS = {
    "qwen3_coder": ("<tool_call>\n<function=get_weather>\n<parameter=city>\n", "\n</parameter>"),
    "glm": ("<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>", "</arg_value>"),
    "minimax_m2": (
        '<minimax:tool_call><invoke name="get_weather"><parameter name="city">',
        "</parameter>",
    ),
    "deepseek_v32": (
        '<｜DSML｜function_calls><｜DSML｜invoke name="get_weather">'
        '<｜DSML｜parameter name="city" string="true">',
        "</｜DSML｜parameter>",
    ),
    "gemma4": ('<|tool_call>call:get_weather{city:<|"|>', '<|"|>}'),
}


@pytest.mark.parametrize("family", STRINGS)
def test_strings_in_tags_stream_as_they_come(family: str) -> None:
    opening, closing = STRINGS[family]
    p = parser(family)
    start, begun = p.feed(opening)
    assert isinstance(start, ToolStart)
    assert begun == ToolArguments(0, '{"city": "')
    assert p.feed("a\nb") == [ToolArguments(0, "a\\nb")]
    assert p.feed('"<') == [ToolArguments(0, '\\"')]
    assert p.feed("b>") == [ToolArguments(0, "<b>")]
    (end, *_) = p.feed(closing)
    assert isinstance(end, ToolArguments)
    assert end.fragment.startswith('"')


@pytest.mark.parametrize("family", STRINGS)
def test_strings_in_tags_are_completed_unless_the_limit_cuts_them(family: str) -> None:
    for cut, expected in ((True, '{"city": "a'), (False, '{"city": "a"}')):
        p = parser(family)
        parts = [*p.feed(STRINGS[family][0]), *p.feed("a"), *p.finish(cut=cut)]
        assert "".join(x.fragment for x in parts if isinstance(x, ToolArguments)) == expected


@pytest.mark.parametrize(
    ("begun", "completed"),
    [
        ("{", "{}"),
        ('{"city": "Par', '{"city": "Par"}'),
        ('{"city": "a\\u00', '{"city": "a"}'),
        ('{"city": "Paris", "da', '{"city": "Paris"}'),
        ('{"days": [1, 12', '{"days": [1]}'),
        ('{"days": {"a": tr', '{"days": {}}'),
        ('{"city": "Paris"}', '{"city": "Paris"}'),
    ],
)
def test_objects_are_completed_unless_the_limit_cuts_them(begun: str, completed: str) -> None:
    for cut, expected in ((True, begun), (False, completed)):
        p = parser("hermes")
        written = '<tool_call>\n{"name": "get_weather", "arguments": ' + begun
        parts = [*p.feed(written), *p.finish(cut=cut)]
        assert "".join(x.fragment for x in parts if isinstance(x, ToolArguments)) == expected
        assert not any(isinstance(part, Text) for part in parts)


def test_text_is_held_back_only_while_it_may_be_a_marker() -> None:
    p = parser()
    assert p.feed("a <tool") == [Text("a")]
    assert p.feed("s> b") == [Text(" <tools> b")]
    assert p.feed(" <tool_c") == []
    assert p.finish() == [Text(" <tool_c")]


def test_whitespace_at_the_end_is_text_if_no_call_came() -> None:
    assert read("hermes", ["a \n"]) == [text("a \n")]
    assert joined(parts_of(HERMES, ["a", " \n", "b"], tools=())) == [text("a \nb")]


def test_without_tools_markup_is_text() -> None:
    written = '<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>'
    p = OutputParser(HERMES, (), starts_reasoning=False)
    assert p.feed(written) == [Text(written)]
    assert read("hermes", [written], tools=[Tool("other")]) == [text(written)]


def test_a_single_call_ends_the_answer() -> None:
    two = '<tool_call>{"name": "now", "arguments": {}}</tool_call>\n' * 2
    assert read("hermes", [two + "rest"], parallel=False) == [call("now")]
    assert read("hermes", two + "rest", parallel=False) == [call("now")]
    listed = '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]'
    assert read("mistral", listed, parallel=False) == [call("now")]
    harmony = "<|channel|>commentary to=functions.now<|message|>{}<|call|><|start|>assistant" * 2
    assert read("harmony", harmony, parallel=False) == [call("now")]
    p = OutputParser(HERMES, TOOLS, starts_reasoning=False, parallel=False)
    assert not p.done
    p.feed(two)
    assert p.done
    assert p.tool_calls == 1


def test_ids() -> None:
    def ids(family: str, written: str) -> list[str]:
        parts = parts_of(OutputFormat.named(family), [written])
        return [part.id for part in parts if isinstance(part, ToolStart)]

    one = '<tool_call>{"name": "now"}</tool_call>'
    first, second = ids("hermes", one + one)
    assert first != second
    assert all(re.fullmatch("call_[0-9a-f]{24}", i) for i in (first, second))
    (made,) = ids("mistral_v13", "[TOOL_CALLS]now[ARGS]{}")
    assert re.fullmatch("[a-zA-Z0-9]{9}", made)
    assert ids("mistral_v13", "[TOOL_CALLS]now[CALL_ID]abcdEFG12[ARGS]{}") == ["abcdEFG12"]
    (other,) = ids("mistral_v13", "[TOOL_CALLS]now[CALL_ID]abc[ARGS]{}")
    assert re.fullmatch("[a-zA-Z0-9]{9}", other)
    given = '[TOOL_CALLS][{"id": "abcdEFG12", "name": "now", "arguments": {}}]'
    assert ids("mistral", given) == ["abcdEFG12"]
    kimi = "<|tool_call_begin|>{}<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    section = "<|tool_calls_section_begin|>" + kimi.format("functions.now:7") + kimi.format("now")
    assert ids("kimi_k2", section) == ["functions.now:7", "functions.now:1"]


def test_reasoning_that_the_prompt_began() -> None:
    assert read("hermes", "a\n</think>\n\nb", starts_reasoning=True) == [thought("a"), text("b")]
    assert read("hermes", "<think>\na</think>b", starts_reasoning=True) == [thought("a"), text("b")]
    assert read("hermes", "cut off ", starts_reasoning=True) == [thought("cut off ")]
    assert read("hermes", "</think>b", starts_reasoning=True) == [text("b")]
    assert read("hermes", "<think>\n\n</think>\n\nb") == [text("b")]
    harmony = "a<|end|><|start|>assistant<|channel|>final<|message|>b"
    assert read("harmony", harmony, starts_reasoning=True) == [thought("a"), text("b")]


def test_reasoning_begins_an_answer_or_is_text() -> None:
    written = "The tag <think> opens, </think> closes."
    assert read("hermes", written) == [text(written)]
    after_call = '<tool_call>{"name": "now"}</tool_call>\n<think>a</think>b'
    assert read("hermes", after_call) == [call("now"), thought("a"), text("b")]
    assert read("mistral_v13", "a[THINK]b[/THINK]c") == [text("a"), thought("b"), text("c")]


def test_reasoning_that_was_switched_off_is_not_looked_for() -> None:
    off = HERMES.without_reasoning()
    assert read(off, "<think>a</think>b") == [text("<think>a</think>b")]
    glm = OutputFormat.named("glm").without_reasoning()
    assert read(glm, "<|begin_of_box|>4<|end_of_box|>") == [text("4")]
    assert read(off, "a</think>b", starts_reasoning=True) == [text("a</think>b")]
    harmony = OutputFormat.named("harmony")
    assert harmony.without_reasoning() == harmony


def test_tokens_of_reasoning_are_counted() -> None:
    p = parser(starts_reasoning=True)
    assert p.in_reasoning
    assert p.feed("a", (1, 2)) == [Reasoning("a")]
    p.feed("b</think>", (3, 4))
    assert not p.in_reasoning
    p.feed("c", (5,))
    assert p.reasoning_tokens == 4


def test_an_end_token_is_no_text() -> None:
    for token in ("<|im_end|>", "</s>", "<|eot_id|>", "<｜end▁of▁sentence｜>"):
        assert read("hermes", "Hi" + token) == [text("Hi")]
        assert read("hermes", "Hi" + token, starts_reasoning=True) == [thought("Hi")]
    assert read("hermes", "a </s> b") == [text("a </s> b")]
    assert read("hermes", "a<|im_end|>b") == [text("ab")]
    plain = OutputFormat()
    assert read(plain, "Hi<|im_end|>") == [text("Hi<|im_end|>")]
