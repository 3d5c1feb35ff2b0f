"""Prompts match the prefix cache although clients put a new line before each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from modelpack_server.api.anthropic.requests import system_text
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from tests.engine.serving.tiny import TinyCatalogue

BILLING = "x-anthropic-billing-header: cc_version=2.1.0; cc_entrypoint=cli; cch={};"


@pytest.fixture(scope="module")
def client() -> Iterator[anthropic.Anthropic]:
    """A client of a real engine with a tiny model."""
    catalogue = TinyCatalogue()
    with (
        ModelServer(lambda: ModelPool(catalogue, grace=5), address="127.0.0.1:0") as server,
        anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as made,
    ):
        yield made


def ask(client: anthropic.Anthropic, number: str, **body: Any) -> Any:
    instructions = "Be brief. " * 8
    given: Any = {
        "model": "tiny",
        "max_tokens": 2,
        "system": [
            {"type": "text", "text": BILLING.format(number)},
            {"type": "text", "text": instructions, "cache_control": {"type": "ephemeral"}},
        ],
        "messages": [{"role": "user", "content": "hello"}],
    } | body
    return client.messages.create(**given)


def test_a_changing_billing_header(client: anthropic.Anthropic) -> None:
    first = ask(client, "12ab").usage
    assert first.cache_read_input_tokens == 0
    second = ask(client, "98fe").usage
    assert second.cache_read_input_tokens > 0
    total = second.input_tokens + second.cache_read_input_tokens
    assert total == first.input_tokens
    counted = client.messages.count_tokens(
        model="tiny",
        system=[{"type": "text", "text": "Be brief. " * 8}],
        messages=[{"role": "user", "content": "hello"}],
    )
    assert counted.input_tokens == total


def test_a_stream_begins_and_ends_with_the_same_counts_of_prompt_tokens(
    client: anthropic.Anthropic,
) -> None:
    first = ask(client, "12ab").usage
    events = list(ask(client, "98fe", stream=True))
    counts = [
        (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens)
        for usage in (events[0].message.usage, events[-2].usage)
    ]
    assert counts[0] == counts[1]
    assert counts[0][1] > 0
    assert sum(counts[0]) == first.input_tokens + first.cache_read_input_tokens


def test_later_instructions_leave_the_beginning_as_it_was(client: anthropic.Anthropic) -> None:
    turns: Any = [{"role": "user", "content": "what is it?"}]
    before = ask(client, "1", messages=turns).usage
    turns = [*turns, {"role": "system", "content": "10 left"}]
    after = ask(client, "2", messages=turns).usage
    assert after.cache_read_input_tokens >= before.input_tokens // 2


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (None, ""),
        ("Be brief.", "Be brief."),
        (BILLING, ""),
        (BILLING + "\n\nBe brief.", "Be brief."),
        ([{"type": "text", "text": BILLING}], ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\n\nb"),
        ([{"type": "text", "text": "about x-anthropic-billing-header: 1"}],
         "about x-anthropic-billing-header: 1"),
    ],
)  # fmt: skip
def test_what_is_left_out(system: Any, expected: str) -> None:
    assert system_text(system) == expected
