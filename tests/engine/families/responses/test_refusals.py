"""Refusals of the Responses API, and unusual input."""

from __future__ import annotations

from typing import Any

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpack_engine.errors import RequestError
from modelpack_server.api.openai.responses.requests import items_of, template_messages
from tests.engine.families.served import PLAIN, Served

WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"background": True, "store": False}, "store"),
        ({"conversation": 5}, "conversation"),
        ({"conversation": {"id": 5}}, "conversation"),
        ({"conversation": {}}, "conversation"),
        ({"conversation": "conv_1", "previous_response_id": "resp_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "namespace"}]}, "tools[0].name"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "custom"}]}]},
         "tools[0].tools[0].type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"previous_response_id": "resp_nope"}, "previous_response_id"),
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input[0].content[0]"),
        ({"input": [{"type": "item_reference", "id": "msg_x"}]}, "input[0].id"),
        ({"input": [{"type": "function_call", "call_id": "1"}]}, "input[0].name"),
        ({"input": 5}, "input"),
        ({"temperature": 9}, "temperature"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"n": 2}, "n"),
        ({"metadata": {"a": "x" * 2**20}}, "metadata"),
        ({"user": "x" * 2**20}, "metadata"),
        ({"tools": [WEATHER | {"description": "x" * 2**20}]}, "metadata"),
    ],
)  # fmt: skip
def test_what_is_refused(served: Served, body: dict[str, Any], param: str) -> None:
    sent = {"model": PLAIN, "input": "hello"} | body
    response = requests.post(f"{served.url}/v1/responses", json=sent, timeout=60)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


def test_what_cannot_be_written_again(served: Served) -> None:
    headers = {"Content-Type": "application/json"}
    model = served.says(PLAIN, "a")
    half = f'{{"model": "{model}", "input": "a\\ud800", "metadata": {{"a": "\\udfff"}}}}'
    response = requests.post(f"{served.url}/v1/responses", half, headers=headers, timeout=60)
    assert response.json()["metadata"] == {"a": "?"}
    nan = f'{{"model": "{model}", "input": "a", "metadata": {{"a": NaN}}}}'
    response = requests.post(f"{served.url}/v1/responses", nan, headers=headers, timeout=60)
    assert response.status_code == 400


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_KINDS = st.sampled_from(
    ["message", "function_call", "function_call_output", "reasoning", "item_reference",
     "input_text", "output_text", "refusal", "user", "assistant", "developer"]
)  # fmt: skip
_KEYS = st.sampled_from(
    ["type", "role", "content", "text", "refusal", "call_id", "name", "arguments", "output", "id",
     "summary", "encrypted_content"]
)  # fmt: skip
_JSON = st.recursive(
    _SCALARS | _KINDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=6),
    max_leaves=12,
)


@given(st.lists(st.dictionaries(_KEYS, _JSON | _KINDS, max_size=8), max_size=3))
@settings(max_examples=100, deadline=None)
def test_any_items_are_taken_or_refused(sent: list[dict[str, Any]]) -> None:
    try:
        messages = template_messages(None, items_of(sent, lambda name: None))
    except RequestError:
        return
    for message in messages:
        assert isinstance(message["content"], str)
