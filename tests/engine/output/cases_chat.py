"""Outputs with JSON objects, with or without markers, and their parts."""

from __future__ import annotations

from tests.engine.output.reading import call, text, thought
from tests.engine.output.writing import (
    DEEP,
    PARIS,
    SMILE,
    TWO,
    UNKNOWN,
    Case,
    deep,
    hermes,
    named,
    now,
    paris,
    smile,
)

CASES = [
    Case("hermes", "two", "Let me see.\n" + hermes(named(PARIS), named("{}", "now")), TWO),
    Case("hermes", "deep", hermes(named(DEEP)), [deep]),
    Case("hermes", "unicode", hermes(named(SMILE)), [smile]),
    Case(
        "hermes",
        "arguments first",
        hermes('{"arguments": {"city": "x"}, "name": "get_weather"}'),
        [call("get_weather", city="x")],
    ),
    Case(
        "hermes",
        "arguments in a string",
        hermes('{"name": "get_weather", "arguments": "{\\"city\\": \\"x\\"}"}'),
        [call("get_weather", city="x")],
    ),
    Case("hermes", "no arguments", hermes('{"name": "now"}'), [now]),
    Case("hermes", "no closing tag", "<tool_call>" + named(PARIS), [paris]),
    Case(
        "hermes",
        "closing brace missing",
        f"<tool_call>{named(PARIS)[:-1]}</tool_call> ok",
        [paris, text("ok")],
    ),
    Case("hermes", "two in a block", hermes(named(PARIS) + "\n" + named("{}", "now")), TWO[1:]),
    Case("hermes", "bare", named(PARIS), [paris]),
    Case("hermes", "bare but unknown", UNKNOWN, [text(UNKNOWN)]),
    Case("hermes", "bare but not alone", "See " + named(PARIS), [text("See " + named(PARIS))]),
    Case("hermes", "unknown", hermes(UNKNOWN), [text(hermes(UNKNOWN))]),
    Case(
        "hermes",
        "unknown, then known",
        hermes(UNKNOWN) + "\n" + hermes(named(PARIS)),
        [text(hermes(UNKNOWN)), paris],
    ),
    Case(
        "hermes",
        "between texts",
        "a\n" + hermes(named(PARIS)) + "\nb",
        [text("a"), paris, text("\n\nb")],
    ),
    Case(
        "hermes",
        "tag in prose",
        "The <tool_call> tag. " + hermes(named(PARIS)),
        [text("The <tool_call> tag."), paris],
    ),
    Case(
        "hermes",
        "never closed",
        '<tool_call>{"name": "get_weather',
        [text('<tool_call>{"name": "get_weather')],
    ),
    Case(
        "hermes",
        "cut in a string",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Par',
        [call("get_weather", city="Par")],
    ),
    Case(
        "hermes",
        "cut after a key",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "P", "days":',
        [call("get_weather", city="P")],
    ),
    Case(
        "hermes",
        "cut in a number",
        '<tool_call>{"name": "get_weather", "arguments": {"days": 1',
        [call("get_weather")],
    ),
    Case(
        "hermes",
        "cut in an escape",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "P\\u00e',
        [call("get_weather", city="P")],
    ),
    Case(
        "hermes",
        "broken, then whole",
        '<tool_call>{"name": "get_weather", "arguments": {"city": oops}}</tool_call>'
        + hermes(named(PARIS)),
        [call("get_weather"), paris],
    ),
    Case(
        "hermes",
        "raw line break in a string",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "a\n'
        'b\\d", "tags": [1,],}}</tool_call>',
        [call("get_weather", city="a\nb\\d", tags=[1])],
    ),
    Case(
        "hermes",
        "reasoning",
        "<think>\nHm.\n</think>\n\n" + hermes(named(PARIS)),
        [thought("Hm."), paris],
    ),
    Case(
        "hermes",
        "call in reasoning",
        "<think>" + hermes(named(PARIS)) + "</think>x",
        [thought(hermes(named(PARIS))), text("x")],
    ),
    Case("hermes", "end token", "Hi<|im_end|>\n", [text("Hi\n")]),
    Case(
        "llama3", "tag", "<|python_tag|>" + named(PARIS, key="parameters") + "<|eom_id|>", [paris]
    ),
    Case(
        "llama3",
        "bare",
        '{"type": "function", "name": "get_weather", "parameters": ' + PARIS + "}<|eot_id|>",
        [paris],
    ),
    Case(
        "llama3",
        "two",
        named(PARIS, key="parameters") + "; " + named("{}", "now", "parameters"),
        TWO[1:],
    ),
    Case("llama3", "old tag", "<function=get_weather>" + PARIS + "</function>", [paris]),
    Case("llama3", "code", "<|python_tag|>print(1)", [text("<|python_tag|>print(1)")]),
    Case("llama3", "other JSON", '{"answer": 42}', [text('{"answer": 42}')]),
    Case("llama3", "list", "[1, 2]", [text("[1, 2]")]),
    Case(
        "llama3",
        "not at the start",
        "So: " + named(PARIS, key="parameters"),
        [text("So: " + named(PARIS, key="parameters"))],
    ),
    Case(
        "llama4",
        "pythonic",
        '[get_weather(city="Pa)]ris", days=3), now()]<|eot|>',
        [call("get_weather", city="Pa)]ris", days=3), now],
    ),
    Case(
        "llama4",
        "between tokens",
        '<|python_start|>[get_weather(city="Paris", days=3)]<|python_end|>',
        [paris],
    ),
    Case(
        "llama4",
        "evaluates nothing",
        "[get_weather(city=__import__('os').getcwd())]",
        [text("[get_weather(city=__import__('os').getcwd())]")],
    ),
    Case("llama4", "never closed", '[get_weather(city="Par', [text('[get_weather(city="Par')]),
    Case(
        "mistral",
        "list",
        "[TOOL_CALLS] [" + named(PARIS) + ", " + named("{}", "now") + "]</s>",
        TWO[1:],
    ),
    Case("mistral", "deep", "[TOOL_CALLS][" + named(DEEP) + "]", [deep]),
    Case(
        "mistral_v11",
        "names",
        "Let me see.[TOOL_CALLS]get_weather" + PARIS + "[TOOL_CALLS]now{}",
        TWO,
    ),
    Case("mistral_v11", "dotted", "[TOOL_CALLS]time.now-utc{}", [call("time.now-utc")]),
    Case("mistral_v11", "deep", "[TOOL_CALLS]get_weather" + DEEP, [deep]),
    Case(
        "mistral_v13",
        "two",
        "[TOOL_CALLS]get_weather[ARGS]" + PARIS + "[TOOL_CALLS]now[ARGS]{}</s>",
        TWO[1:],
    ),
    Case("mistral_v13", "id", "[TOOL_CALLS]get_weather[CALL_ID]abcdEFG12[ARGS]" + PARIS, [paris]),
    Case(
        "mistral_v13",
        "reasoning",
        "[THINK]Hm.[/THINK]Yes </s> and</s>",
        [thought("Hm."), text("Yes </s> and")],
    ),
    Case("mistral_v13", "unknown", "[TOOL_CALLS]rm[ARGS]{}", [text("[TOOL_CALLS]rm[ARGS]{}")]),
    Case(
        "nemotron",
        "two",
        "<TOOLCALL>[" + named(PARIS) + ", " + named("{}", "now") + "]</TOOLCALL>",
        TWO[1:],
    ),
    Case("nemotron", "prose", "<TOOLCALL> is a tag", [text("<TOOLCALL> is a tag")]),
    Case(
        "granite",
        "list",
        "<|tool_call|>[" + named(PARIS) + "," + named("{}", "now") + "]<|end_of_text|>",
        TWO[1:],
    ),
    Case(
        "granite",
        "tag",
        "Let me see. <tool_call>["
        + named(PARIS)
        + "]</tool_call><tool_call>"
        + named("{}", "now")
        + "</tool_call>",
        TWO,
    ),
    Case("xlam", "two", "[" + named(PARIS) + ", " + named("{}", "now") + "]", TWO[1:]),
    Case("xlam", "fence", "```json\n[" + named(PARIS) + "]\n```", [paris]),
    Case("xlam", "other list", '[{"name": "rm_rf"}]', [text('[{"name": "rm_rf"}]')]),
]
