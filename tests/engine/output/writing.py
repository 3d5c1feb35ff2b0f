"""Functions that build outputs of models, for the tables of cases."""

from __future__ import annotations

from typing import NamedTuple

from tests.engine.output.reading import Found, call, text

PARIS = '{"city": "Paris", "days": 3}'
paris = call("get_weather", city="Paris", days=3)
DEEP = (
    '{"where": {"a": {"b": [1, {"c": "}"}]}}, '
    '"city": "<tool_call>{\\"name\\"} </tool_call> [TOOL_CALLS]"}'
)
deep = call(
    "get_weather",
    where={"a": {"b": [1, {"c": "}"}]}},
    city='<tool_call>{"name"} </tool_call> [TOOL_CALLS]',
)
now = call("now")
UNKNOWN = '{"name": "rm_rf", "arguments": {"path": "/"}}'


class Case(NamedTuple):
    family: str
    name: str
    written: str
    found: Found


def named(arguments: str, name: str = "get_weather", key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def hermes(*bodies: str) -> str:
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def coder(name: str, **parameters: str) -> str:
    inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in parameters.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def glm(name: str, **parameters: str) -> str:
    inner = "".join(
        f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in parameters.items()
    )
    return f"<tool_call>{name}\n{inner}</tool_call>"


def invoke(name: str, **parameters: str) -> str:
    inner = "".join(f'<parameter name="{k}">{v}</parameter>\n' for k, v in parameters.items())
    return f'<invoke name="{name}">\n{inner}</invoke>\n'


def dsml(name: str, **parameters: tuple[str, str]) -> str:
    inner = "".join(
        f'<｜DSML｜parameter name="{k}" string="{s}">{v}</｜DSML｜parameter>\n'
        for k, (s, v) in parameters.items()
    )
    return f'<｜DSML｜invoke name="{name}">\n{inner}</｜DSML｜invoke>\n'


def v3(name: str, arguments: str) -> str:
    return (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"
        "<｜tool▁call▁end｜>"
    )


def v31(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


def deepseek_calls(*calls: str) -> str:
    return "<｜tool▁calls▁begin｜>" + "\n".join(calls) + "<｜tool▁calls▁end｜>"


def kimi(*calls: tuple[str, str]) -> str:
    inner = "".join(
        f"<|tool_call_begin|>functions.{n}:{i}<|tool_call_argument_begin|>{a}<|tool_call_end|>"
        for i, (n, a) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def harmony_call(name: str, arguments: str) -> str:
    return (
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>"
    )


THINK = "<|channel|>analysis<|message|>Hm, \n so.<|end|><|start|>assistant"
Q = '<|"|>'
SMILE = '{"city": "S\\u00e3o \\ud83d\\ude00 Paulo 😀 \\"x\\" \\\\ \\n"}'
smile = call("get_weather", city='São 😀 Paulo 😀 "x" \\ \n')

TWO = [text("Let me see."), paris, now]
