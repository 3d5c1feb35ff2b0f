"""Instructions within a conversation, repeated roles, replies to be continued."""

from __future__ import annotations

import asyncio

import pytest

from modelpack_server.conversation.chat import start_chat
from modelpack_server.conversation.prompt import fit_turns
from modelpack_server.conversation.spec import ChatSpec
from tests.engine.scripted import THINKING, scripted
from tests.engine.serving.tiny import TEMPLATE

FIRST_ONLY = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('no') }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
HOISTING = (
    "{% for m in messages if m.role == 'system' %}{{ m.content }}\n{% endfor %}"
    "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "a"},
    {"role": "system", "content": "T"},
    {"role": "assistant", "content": "b"},
]


def roles(messages: list[dict[str, str]]) -> list[str]:
    return [message["role"] for message in messages]


def test_instructions_stay_where_they_are() -> None:
    assert fit_turns(TALK, TEMPLATE) == TALK


@pytest.mark.parametrize("template", [FIRST_ONLY, HOISTING])
def test_instructions_go_into_the_users_turn(template: str) -> None:
    fitted = fit_turns(TALK, template)
    assert roles(fitted) == ["system", "user", "assistant"]
    assert fitted[1]["content"] == "a\n\n<system-reminder>\nT\n</system-reminder>"


def test_a_template_without_system_messages() -> None:
    fitted = fit_turns(TALK, NO_SYSTEM)
    assert roles(fitted) == ["user", "assistant"]
    assert fitted[0]["content"].startswith("<system-reminder>\nS\n</system-reminder>\n\na")


def test_neighbours_of_one_role_are_one_message() -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "system", "content": "T"},
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "", "reasoning_content": "hm"},
        {"role": "assistant", "content": "c", "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    fitted = fit_turns(messages, TEMPLATE)
    assert roles(fitted) == ["system", "user", "assistant", "tool", "tool"]
    assert [m["content"] for m in fitted[:3]] == ["S\n\nT", "a\n\nb", "c"]
    assert fitted[2]["reasoning_content"] == "hm"
    assert fitted[2]["tool_calls"] == [{"id": "1"}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATE, "user: hi\nassistant:One, two"),
        (THINKING, "user: hi\nassistant:<think>\n</think>\n\nOne, two"),
    ],
)
def test_an_answer_that_was_begun_goes_on(template: str, expected: str) -> None:
    model, engine = scripted(", three", template=template)
    spec = ChatSpec(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "One, two"}],
        continues=True,
    )

    async def run() -> None:
        async with await start_chat(model, spec) as stream:
            assert not stream.starts_reasoning
            async for _ in stream:
                pass

    asyncio.run(run())
    assert engine.prompt == expected
