"""Outputs with arguments in tags, and their parts."""

from __future__ import annotations

from tests.engine.output.reading import call, text, thought
from tests.engine.output.writing import (
    PARIS,
    TWO,
    Case,
    coder,
    dsml,
    glm,
    hermes,
    invoke,
    named,
    now,
    paris,
)

CASES = [
    Case(
        "qwen3_coder",
        "two",
        "Let me see.\n" + coder("get_weather", city="Paris", days="3") + "\n" + coder("now"),
        TWO,
    ),
    Case(
        "qwen3_coder",
        "types",
        coder(
            "get_weather",
            city="42",
            metric="True",
            where='{"a": [1]}',
            tags="[1, 'x']",
            note="null",
            days="soon",
        ),
        [
            call(
                "get_weather",
                city="42",
                metric=True,
                where={"a": [1]},
                tags=[1, "x"],
                note=None,
                days="soon",
            )
        ],
    ),
    Case(
        "qwen3_coder",
        "text as it is",
        coder("get_weather", city="\n  a < b\n</tool_call> "),
        [call("get_weather", city="\n  a < b\n</tool_call> ")],
    ),
    Case(
        "qwen3_coder",
        "undeclared",
        coder("get_weather", x="5", y="[1]", z="word", w='"q"'),
        [call("get_weather", x=5, y=[1], z="word", w='"q"')],
    ),
    Case(
        "qwen3_coder",
        "no outer tag",
        "<function=get_weather>\n<parameter=city>\nx\n</parameter>\n</function>",
        [call("get_weather", city="x")],
    ),
    Case(
        "qwen3_coder",
        "JSON inside",
        "<tool_call><function=get_weather>" + PARIS + "</function></tool_call>",
        [paris],
    ),
    Case("qwen3_coder", "unknown", coder("rm", path="/"), [text(coder("rm", path="/"))]),
    Case(
        "qwen3_coder",
        "cut in the first string",
        "<tool_call><function=get_weather><parameter=city>\nPar\n",
        [call("get_weather", city="Par")],
    ),
    Case(
        "qwen3_coder",
        "cut in the first number",
        "<tool_call><function=get_weather><parameter=days>1",
        [text("<tool_call><function=get_weather><parameter=days>1")],
    ),
    Case(
        "qwen3_coder",
        "line breaks",
        coder("get_weather", city="\n", note="") + coder("get_weather", city=""),
        [call("get_weather", city="\n", note=""), call("get_weather", city="")],
    ),
    Case(
        "qwen3_coder",
        "cut in the second value",
        "<tool_call><function=get_weather><parameter=city>P</parameter><parameter=days>1",
        [call("get_weather", city="P")],
    ),
    Case(
        "glm",
        "two",
        "Let me see.\n" + glm("get_weather", city="Paris", days="3") + glm("now"),
        TWO,
    ),
    Case(
        "glm",
        "4.7",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>12</arg_value></tool_call>",
        [call("get_weather", city="12")],
    ),
    Case("glm", "no arguments", "<tool_call>now</tool_call>", [now]),
    Case("glm", "JSON", hermes(named(PARIS)), [paris]),
    Case(
        "glm",
        "values",
        glm("get_weather", where='{"a": "x"}', note="null", tags="['x']", x="1.5"),
        [call("get_weather", where={"a": "x"}, note=None, tags=["x"], x=1.5)],
    ),
    Case("glm", "unknown", glm("rm", path="/"), [text(glm("rm", path="/"))]),
    Case(
        "glm",
        "box",
        "<think>a</think>\n<|begin_of_box|>42<|end_of_box|><|user|>",
        [thought("a"), text("42")],
    ),
    Case(
        "deepseek_v32",
        "two",
        "Let me see.\n\n<｜DSML｜function_calls>\n"
        + dsml("get_weather", city=("true", "Paris"), days=("false", "3"))
        + dsml("now")
        + "</｜DSML｜function_calls>",
        TWO,
    ),
    Case(
        "deepseek_v32",
        "typed",
        "<｜DSML｜function_calls>"
        + dsml(
            "get_weather", city=("true", "3"), where=("false", '{"a": 1}'), days=("false", '"x"')
        )
        + "</｜DSML｜function_calls>",
        [call("get_weather", city="3", where={"a": 1}, days="x")],
    ),
    Case(
        "minimax_m2",
        "two",
        "Let me see.\n<minimax:tool_call>\n"
        + invoke("get_weather", city="Paris", days="3")
        + invoke("now")
        + "</minimax:tool_call>",
        TWO,
    ),
    Case(
        "minimax_m2",
        "in reasoning",
        "<think>\na\n<minimax:tool_call>" + invoke("now") + "</minimax:tool_call>\n</think>\nb",
        [thought("a"), now, text("b")],
    ),
    Case(
        "minimax_m2",
        "one unknown",
        "<minimax:tool_call>" + invoke("now") + invoke("rm") + "</minimax:tool_call>",
        [now, text(invoke("rm") + "</minimax:tool_call>")],
    ),
    Case(
        "longcat",
        "call",
        "<longcat_tool_call>get_weather\n<longcat_arg_key>city</longcat_arg_key>\n"
        "<longcat_arg_value>12</longcat_arg_value>\n</longcat_tool_call>",
        [call("get_weather", city="12")],
    ),
    Case(
        "longcat",
        "nonsense",
        "<longcat_tool_call>x</longcat_tool_call>",
        [text("<longcat_tool_call>x</longcat_tool_call>")],
    ),
    Case(
        "minicpm5",
        "call",
        '<function name="get_weather"><param name="city">x</param></function>',
        [call("get_weather", city="x")],
    ),
    Case(
        "kimi_k3",
        "answer",
        "<|open|>think<|sep|>a<|close|>think<|sep|><|open|>response<|sep|>b<|close|>response<|sep|>"
        "<|close|>message<|sep|><|end_of_msg|>",
        [thought("a"), text("b")],
    ),
    Case(
        "kimi_k3",
        "unknown",
        '<|open|>tools<|sep|><|open|>call tool="rm"<|sep|><|close|>ca'
        "ll<|sep|><|close|>tools<|sep|>",
        [
            text(
                '<|open|>tools<|sep|><|open|>call tool="rm"<|sep|><|close|>ca'
                "ll<|sep|><|close|>tools<|sep|>"
            )
        ],
    ),
    Case(
        "kimi_k3",
        "call",
        '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1'
        '"<|sep|><|open|>argument key="city" '
        'type="string"<|sep|>x<|close|>argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|>',
        [call("get_weather", city="x")],
    ),
]
