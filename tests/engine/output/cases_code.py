"""Outputs with calls that resemble code, and their parts."""

from __future__ import annotations

from tests.engine.output.reading import call, text, thought
from tests.engine.output.writing import PARIS, TWO, Case, Q, named, now, paris

CASES = [
    Case(
        "gemma4",
        "two",
        f"Let me see.<|tool_call>call:get_weather{{city:{Q}Paris{Q},days:3}}<tool_call|>"
        "<|tool_call>call:now{}<tool_call|>",
        TWO,
    ),
    Case(
        "gemma4",
        "two in a block",
        f"<|tool_call>call:get_weather{{city:{Q}Paris{Q},days:3}}call:now{{}}<tool_call|>",
        TWO[1:],
    ),
    Case(
        "gemma4",
        "nested",
        f'<|tool_call>call:get_weather{{where:{{a:[1,{{b-c:{Q}}},"{Q}}}],d:true}},city:{Q}7{Q}}}<tool_call|>',
        [call("get_weather", where={"a": [1, {"b-c": '},"'}], "d": True}, city="7")],
    ),
    Case(
        "gemma4",
        "bare text",
        "<|tool_call>call:get_weather{city:New York,days:2}<tool_call|>",
        [call("get_weather", city="New York", days=2)],
    ),
    Case(
        "gemma4",
        "text",
        'call:get_weather(city="Pa)ris", days=3)',
        [call("get_weather", city="Pa)ris", days=3)],
    ),
    Case("gemma4", "prose", "I will call: get_weather", [text("I will call: get_weather")]),
    Case(
        "gemma4",
        "reasoning",
        "<|channel>thought\nHm.<channel|>Hi<turn|>",
        [thought("Hm."), text("Hi")],
    ),
    Case(
        "gemma4",
        "reasoning twice",
        "<|channel>thought\na<channel|><|channel>thought\nb<channel|>Hi",
        [thought("ab"), text("Hi")],
    ),
    Case("gemma4", "response", "<|channel>response\nHi<channel|>", [text("Hi")]),
    Case(
        "gemma4",
        "unknown",
        f"<|tool_call>call:rm{{p:{Q}/{Q}}}<tool_call|>",
        [text(f"<|tool_call>call:rm{{p:{Q}/{Q}}}<tool_call|>")],
    ),
    Case(
        "gemma4",
        "cut",
        f"<|tool_call>call:get_weather{{city:{Q}P{Q},days:",
        [call("get_weather", city="P")],
    ),
    Case(
        "function_gemma",
        "two",
        "<start_function_call>call:get_weather{city:<escape>Paris<esc"
        "ape>,days:3}<end_function_call>"
        "<start_function_call>call:now{}<end_function_call>",
        TWO[1:],
    ),
    Case(
        "function_gemma",
        "braces",
        "<start_function_call>call:get_weather{where:{a:<escape>}<esc"
        "ape>},days:1}<end_function_call>",
        [call("get_weather", where={"a": "}"}, days=1)],
    ),
    Case(
        "gemma_code",
        "fence",
        'Let me see.\n```tool_code\nget_weather(city="Paris", days=3)\nprint(now())\n```',
        TWO,
    ),
    Case(
        "gemma_code",
        "lines",
        '```tool_code\nprint(default_api.get_weather(\n  city="Paris",\n  days=3,\n))\n```',
        [paris],
    ),
    Case(
        "gemma_code",
        "other code",
        "```tool_code\nimport os\n```",
        [text("```tool_code\nimport os\n```")],
    ),
    Case(
        "lfm2",
        "two",
        '<|tool_call_start|>[get_weather(city="Paris", days=3), now()'
        "]<|tool_call_end|>Let me see.<|im_end|>",
        [paris, now, text("Let me see.")],
    ),
    Case(
        "lfm2",
        "values",
        "<|tool_call_start|>[get_weather(city='\\d', tags=(1, 2.5), w"
        "here={'a': null, 'b': True})]<|tool_call_end|>",
        [call("get_weather", city="\\d", tags=[1, 2.5], where={"a": None, "b": True})],
    ),
    Case("lfm2", "JSON", "<|tool_call_start|>[" + named(PARIS) + "]<|tool_call_end|>", [paris]),
    Case(
        "lfm2",
        "a name as a value",
        "<|tool_call_start|>[now(x=y)]<|tool_call_end|>",
        [text("<|tool_call_start|>[now(x=y)]<|tool_call_end|>")],
    ),
]
