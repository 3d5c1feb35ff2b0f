"""Stored responses and conversations behind a gateway with several servers."""

from __future__ import annotations

from contextlib import ExitStack

import openai

from tests.engine.families.served import PLAIN, serving
from tests.gateway.servers import gateway


def test_turns_go_to_the_server_that_has_the_earlier_ones() -> None:
    with ExitStack() as opened:
        servers = [opened.enter_context(serving()) for _ in range(2)]
        for server in servers:
            server.says(PLAIN, "Hello")
        urls = [server.url for server in servers]
        served = opened.enter_context(gateway(*urls, policy="round-robin"))
        client = opened.enter_context(
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        )
        first = [client.responses.create(model=PLAIN, input=f"begin {i}") for i in range(4)]
        for i, response in enumerate(first):
            again = client.responses.create(
                model=PLAIN, input="go on", previous_response_id=response.id
            )
            [holder] = [server for server in servers if f"begin {i}" in server.prompt(PLAIN)]
            assert "go on" in holder.prompt(PLAIN)
            assert client.responses.retrieve(again.id).previous_response_id == response.id
        conversation = client.conversations.create()
        for text in ("one", "two", "three"):
            client.responses.create(model=PLAIN, input=text, conversation=conversation.id)
        items = client.conversations.items.list(conversation.id, order="asc")
        texts = [item.content[0].text for item in items if item.type == "message"]
        assert texts[::2] == ["one", "two", "three"]
