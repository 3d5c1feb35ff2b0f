"""Outputs with JSON between special tokens, and their parts."""

from __future__ import annotations

from tests.engine.output.reading import call, text, thought
from tests.engine.output.writing import (
    DEEP,
    PARIS,
    THINK,
    TWO,
    Case,
    deep,
    deepseek_calls,
    harmony_call,
    kimi,
    now,
    paris,
    v3,
    v31,
)

CASES = [
    Case(
        "harmony",
        "call",
        THINK + harmony_call("get_weather", PARIS),
        [thought("Hm, \n so."), paris],
    ),
    Case(
        "harmony",
        "final",
        THINK + "<|channel|>final<|message|>Hi <b>.<|return|>",
        [thought("Hm, \n so."), text("Hi <b>.")],
    ),
    Case(
        "harmony",
        "constrained",
        "<|channel|>final <|constrain|>JSON<|message|>{}<|return|>",
        [text("{}")],
    ),
    Case(
        "harmony",
        "preamble",
        "<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant"
        + harmony_call("get_weather", PARIS)
        + "<|start|>assistant"
        + harmony_call("now", "{}"),
        TWO,
    ),
    Case(
        "harmony",
        "in the role",
        " to=functions.time.now-utc<|channel|>commentary json<|message|>{}<|call|>",
        [call("time.now-utc")],
    ),
    Case(
        "harmony",
        "in the role, again",
        THINK + " to=functions.now<|channel|>analysis<|message|>{}<|call|>",
        [thought("Hm, \n so."), now],
    ),
    Case(
        "harmony",
        "marker in a string",
        harmony_call("get_weather", '{"city": "<|call|>{"}'),
        [call("get_weather", city="<|call|>{")],
    ),
    Case("harmony", "unknown", harmony_call("rm", '{"path": "/"}'), [text('{"path": "/"}')]),
    Case("harmony", "no structure", "Hello. to=x", [text("Hello. to=x")]),
    Case("harmony", "cut in a header", THINK + "<|channel|>comm", [thought("Hm, \n so.")]),
    Case(
        "harmony",
        "cut in arguments",
        harmony_call("get_weather", '{"city": "P')[:-8],
        [call("get_weather", city="P")],
    ),
    Case("harmony", "empty body", harmony_call("now", ""), [now]),
    Case(
        "harmony",
        "two thoughts",
        "<|channel|>analysis<|message|>a<|end|>" + THINK,
        [thought("a\n\nHm, \n so.")],
    ),
    Case(
        "deepseek_v3",
        "two",
        "Let me see."
        + deepseek_calls(v3("get_weather", PARIS), v3("now", "{}"))
        + "<｜end▁of▁sentence｜>",
        TWO,
    ),
    Case(
        "deepseek_v31", "two", deepseek_calls(v31("get_weather", PARIS), v31("now", "{}")), TWO[1:]
    ),
    Case("deepseek_v31", "deep", deepseek_calls(v31("get_weather", DEEP)), [deep]),
    Case(
        "deepseek_v31",
        "unknown",
        deepseek_calls(v31("rm", "{}")),
        [text(deepseek_calls(v31("rm", "{}")))],
    ),
    Case("deepseek_v31", "not closed", deepseek_calls(v31("get_weather", PARIS))[:-20], [paris]),
    Case("kimi_k2", "two", "Let me see." + kimi(("get_weather", PARIS), ("now", "{}")), TWO),
    Case(
        "kimi_k2",
        "in reasoning",
        "<think>a" + kimi(("now", "{}")) + "b</think>c",
        [thought("a"), now, thought("b"), text("c")],
    ),
    Case("kimi_k2", "unknown", kimi(("rm", "{}")), [text(kimi(("rm", "{}")))]),
    Case(
        "kimi_k2",
        "cut",
        kimi(("get_weather", '{"city": "P')).split("P")[0] + "P",
        [call("get_weather", city="P")],
    ),
    Case("functionary", "call", "get_weather\n<|content|>" + PARIS + "<|stop|>", [paris]),
    Case(
        "functionary",
        "text and call",
        "all\n<|content|> Let me see.\n<|from|>assistant\n<|recipient|>get_weather\n<|content|>"
        + PARIS
        + "\n<|from|>assistant\n<|recipient|>now\n<|content|>{}<|stop|>",
        TWO,
    ),
    Case("functionary", "no structure", "Hello there", [text("Hello there")]),
]
