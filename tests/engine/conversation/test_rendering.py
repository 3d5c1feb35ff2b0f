"""Prompts of conversations with tools: calls and results in the form for templates."""

from __future__ import annotations

from typing import Any

import pytest

from modelpack_server.conversation.prompt import render, wants_results_with_calls
from modelpack_server.conversation.spec import ChatSpec
from modelpack_server.tool_parsers.families import find_format
from tests.engine.scripted import scripted

# A template that renders results like Gemma 4's: the first, and the later ones.
WITH_CALLS = """\
{%- for m in messages %}<|turn>{{ m['role'] }}
{% if m['tool_calls'] %}{% for c in m['tool_calls'] -%}
<|tool_call>call:{{ c['function']['name'] }}{{ c['function']['arguments'] | tojson }}<tool_call|>
{%- endfor %}{% endif %}
{%- if m['tool_responses'] %}{% for r in m['tool_responses'] -%}
<|tool_response>{{ r['name'] }}:{{ r['response'] | tojson }}<tool_response|>
{%- endfor %}{% endif %}{{ m['content'] or '' }}
{%- if m['content'] or not m['tool_responses'] %}<turn|>
{% endif %}{% endfor %}
{%- if not (messages[-1]['tool_responses'] and not messages[-1]['content']) %}<|turn>model
{% endif %}"""
BY_ROLE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}<|tool_response>{{ m['content'] }}"
    "{% elif m.tool_calls %}<|tool_call>call:{{ m.tool_calls[0].function.name }}<tool_call|>"
    "{% elif m.get('tool_responses') %}legacy{% else %}{{ m['role'] }}:{{ m['content'] }}"
    "{% endif %}{% endfor %}{% if tools %}{{ tools }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | tojson }}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.tool_call_id }}[/TOOL_RESULTS]{% endif %}"
    "{% endfor %}"
)


def called(call_id: str, name: str, arguments: str, content: str = "") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    calls = [{"id": call_id, "type": "function", "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(call_id: str, content: str, **more: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content, **more}


def prompt(template: str, *messages: dict[str, Any]) -> str:
    model, _ = scripted("a", template=template)
    format = find_format(template)  # noqa: A001
    asked = {"role": "user", "content": "How is it?"}
    return render(ChatSpec([asked, *messages]), model.tokenizer, format)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        pytest.param(
            [called("1", "weather", '{"city": "Paris"}'), result("1", '{"degrees": 9}')],
            '<|turn>assistant\n<|tool_call>call:weather{"city": "Paris"}<tool_call|>'
            '<|tool_response>weather:{"degrees": 9}<tool_response|>',
            id="an object, and the turn goes on",
        ),
        pytest.param(
            [called("1", "weather", "{}"), result("1", "cold"),
             {"role": "assistant", "content": "It is cold."}],
            "<|turn>assistant\n<|tool_call>call:weather{}<tool_call|>"
            '<|tool_response>weather:"cold"<tool_response|>It is cold.<turn|>\n<|turn>model\n',
            id="a text, and the answer in the same turn",
        ),
        pytest.param(
            [called("1", "weather", "{}", "Let me see."), result("1", "cold")],
            "<|turn>assistant\nLet me see.<turn|>\n<|turn>assistant\n"
            "<|tool_call>call:weather{}<tool_call|>"
            '<|tool_response>weather:"cold"<tool_response|>',
            id="what was said before a call is a turn before it",
        ),
        pytest.param(
            [called("1", "weather", "{}"), result("2", "cold", name="other")],
            "<|turn>assistant\n<|tool_call>call:weather{}<tool_call|>"
            '<|tool_response>other:"cold"<tool_response|>',
            id="a result of no call that there is",
        ),
    ],
)  # fmt: skip
def test_results_with_the_calls(messages: list[dict[str, Any]], expected: str) -> None:
    assert prompt(WITH_CALLS, *messages) == f"<|turn>user\nHow is it?<turn|>\n{expected}"


def test_results_stay_messages_where_a_template_takes_them() -> None:
    assert wants_results_with_calls(WITH_CALLS)
    assert not wants_results_with_calls(BY_ROLE)
    text = prompt(BY_ROLE, called("1", "weather", "{}"), result("1", "cold"))
    assert text.endswith("<|tool_response>cold")


def test_ids_and_arguments_are_what_the_family_takes() -> None:
    """Mistral's ids have nine letters and digits; incomplete arguments are completed."""
    text = prompt(MISTRAL, called("call_1", "weather", '{"city": "Par'), result("call_1", "cold"))
    before, _, after = text.partition("[TOOL_RESULTS]")
    given = after.removesuffix("[/TOOL_RESULTS]")
    assert len(given) == 9
    assert given.isalnum()
    assert f'"id": "{given}"' in before
    assert '"arguments": {"city": "Par"}' in before
