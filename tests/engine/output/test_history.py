"""Earlier calls in the form for a template."""

from __future__ import annotations

import json
from typing import Any

import jinja2
import pytest

from modelpack_server.tool_parsers.families import OutputFormat
from modelpack_server.tool_parsers.history import (
    complete_object,
    takes_argument_strings,
    template_messages,
)

TAKES_STRINGS = [
    "{% if tool_call['function']['arguments'] is string %}{{ tool_call['function']['arguments'] }}"
    "{% else %}{{ tool_call['function']['arguments'] | tojson }}{% endif %}",
    "{{'<｜tool▁sep｜>' + tool['function']['arguments'] + '<｜tool▁call▁end｜>'}}",
    "{{ call.function.arguments }}",
    "{{- call.name ~ call.arguments ~ '}' }}",
]
TAKES_OBJECTS = [
    "{{ tool_call.arguments | tojson }}",
    "{{ tool_call.function | tojson }}",
    "{% for k, v in call.arguments | items %}{{ k }}={{ v }}{% endfor %}",
    "{% set _args = tc.arguments %}{% for k, v in _args.items() %}{{ k }}{% endfor %}",
    "{% if function['arguments'] is mapping %}{% elif function['arguments'] is string %}"
    "{{- function['arguments'] -}}{% endif %}",
    "{% if message.content is string %}{{ message.content }}{% endif %}",
]


def test_a_template_shows_what_arguments_it_takes() -> None:
    assert [takes_argument_strings(t) for t in TAKES_STRINGS] == [True] * len(TAKES_STRINGS)
    assert [takes_argument_strings(t) for t in TAKES_OBJECTS] == [False] * len(TAKES_OBJECTS)


def conversation(arguments: Any, call_id: str = "call_1") -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": arguments}
    return [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": call_id, "function": function}]},
        {"role": "tool", "tool_call_id": call_id, "content": "42"},
    ]


def prepared(
    messages: list[dict[str, Any]], family: str = "hermes", template: str = "x"
) -> list[dict[str, Any]]:
    return template_messages(messages, OutputFormat.named(family), template)


def test_arguments_render_as_they_were_written() -> None:
    template = jinja2.Environment(autoescape=False).from_string(
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}"
        "{% endfor %}{% endfor %}"
    )
    messages = prepared(conversation('{"a": 1}'), template=TAKES_OBJECTS[0])
    assert template.render(messages=messages) == '{"a": 1}'


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ('{"a": [1, {"b": null}]}', {"a": [1, {"b": None}]}),
        ("", {}),
        (None, {}),
        ("{}", {}),
        ({"a": 1}, {"a": 1}),
        ('{"city": "Par', {"city": "Par"}),
        ("nonsense", {}),
        ("[1]", {}),
        ("[" * 100_000, {}),
        ('{"a":' * 100_000, None),
    ],
)
def test_arguments_become_objects(given: Any, expected: Any) -> None:
    messages = conversation(given)
    before = json.dumps(messages)
    call = prepared(messages)[1]["tool_calls"][0]
    assert isinstance(call["function"]["arguments"], dict)
    if expected is not None:
        assert call["function"]["arguments"] == expected
    assert call["type"] == "function"
    assert json.dumps(messages) == before, "the caller's messages were changed"


def test_arguments_stay_strings_where_the_template_takes_those() -> None:
    (call,) = prepared(conversation('{"a":  1}'), template=TAKES_STRINGS[1])[1]["tool_calls"]
    assert call["function"]["arguments"] == '{"a":  1}'
    (call,) = prepared(conversation('{"a": "x'), template=TAKES_STRINGS[1])[1]["tool_calls"]
    assert call["function"]["arguments"] == '{"a": "x"}'
    assert complete_object(' {"a": 1} tail') == '{"a": 1}'


def ids(family: str, call_id: str) -> tuple[str, str]:
    messages = prepared(conversation("{}", call_id), family)
    return messages[1]["tool_calls"][0]["id"], messages[2]["tool_call_id"]


@pytest.mark.parametrize("family", ["mistral", "mistral_v11", "mistral_v13"])
def test_ids_for_mistral(family: str) -> None:
    assert ids(family, "abcDEF123") == ("abcDEF123", "abcDEF123")
    made, result = ids(family, "call_0123456789abcdef01234567")
    assert made == result
    assert len(made) == 9
    assert made.isalnum()
    assert made.isascii()
    assert ids(family, "call_0123456789abcdef01234567")[0] == made
    assert ids(family, "call_other")[0] != made


def test_ids_for_kimi() -> None:
    assert ids("kimi_k2", "functions.f:3") == ("functions.f:3", "functions.f:3")
    assert ids("kimi_k2", "call_1") == ("functions.f:0", "functions.f:0")
    two = conversation("{}", "call_1") + conversation("{}", "call_2")
    assert prepared(two, "kimi_k2")[5]["tool_call_id"] == "functions.f:1"


def test_other_ids_and_messages_stay() -> None:
    assert ids("hermes", "toolu_01") == ("toolu_01", "toolu_01")
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert prepared(messages) == messages
