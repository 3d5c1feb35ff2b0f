"""Preparing a conversation for its template takes linear time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from modelpack_engine.errors import RequestError
from modelpack_server.api.ollama.bodies import ChatMessage
from modelpack_server.api.ollama.chat import template_messages
from modelpack_server.api.openai.responses import requests as items
from modelpack_server.conversation.prompt import fit_turns, results_with_calls
from tests.engine.serving.tiny import TEMPLATE

MOST = 4096  # items of a list in a request
TEXT = "x" * 3000
HALF = MOST // 2


def neighbours() -> int:
    turns = fit_turns([{"role": "user", "content": TEXT}] * MOST, TEMPLATE)
    return len(turns[0]["content"]) if len(turns) == 1 else 0


def answers() -> int:
    given = items.items_of([{"role": "assistant", "content": TEXT}] * MOST, lambda name: None)
    [turn] = items.template_messages(None, given)
    return len(turn["content"])


def thoughts() -> int:
    part = {"type": "summary_text", "text": TEXT}
    given = [{"type": "reasoning", "summary": [part]}] * MOST
    [turn] = items.template_messages(None, items.items_of(given, lambda name: None))
    return len(turn["reasoning_content"])


def calls(named: str) -> Callable[[], int]:
    """Return the number of results matched to a wrong call, by `named` or by their order."""

    def count() -> int:
        call = {"function": {"name": "a", "arguments": {}}}
        given = [{"role": "assistant", "tool_calls": [call] * HALF}]
        given += [{"role": "tool", "content": "x", "tool_name": named}] * HALF
        messages = [ChatMessage.model_validate(message) for message in given]
        found = template_messages(messages, "model")[1:]
        return len({message["tool_call_id"] for message in found})

    return count


def responses() -> int:
    made: list[dict[str, Any]] = [{"id": f"c{i}", "function": {"name": "a"}} for i in range(HALF)]
    results = [{"role": "tool", "tool_call_id": f"c{i}", "content": "x"} for i in range(HALF)]
    [turn] = results_with_calls([{"role": "assistant", "tool_calls": made}, *results])
    return len(turn["tool_responses"])


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (neighbours, MOST * (len(TEXT) + 2) - 2),
        (answers, MOST * len(TEXT)),
        (thoughts, MOST * len(TEXT)),
        (calls("a"), HALF),
        (calls("b"), HALF),
        (responses, HALF),
    ],
    ids=["neighbours", "answers", "thoughts", "calls by name", "calls in order", "responses"],
)
def test_as_many_as_a_request_may_have(work: Callable[[], int], expected: int) -> None:
    """With a loop over all earlier messages for each message, these took 5 to 200 seconds."""
    before = time.thread_time()
    assert work() == expected
    assert time.thread_time() - before < 3


def test_an_item_is_referred_to_once() -> None:
    """References are small, but each would repeat a large text."""
    message = items.items_of([{"role": "user", "content": TEXT}], lambda name: None)[0]
    reference = {"type": "item_reference", "id": message["id"]}
    assert items.items_of([reference], lambda name: message) == [message]
    with pytest.raises(RequestError, match="referenced 2 times"):
        items.items_of([reference, reference], lambda name: message)
