"""The Conversations API with OpenAI's own client, and responses that continue a conversation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from modelpack_engine.errors import EngineError, RequestError
from modelpack_engine.outputs import FinishReason
from modelpack_server.api.openai.responses.conversations import MAX_ITEMS, check_new
from tests.engine.families.served import CALLER, PLAIN, THINKER, Served
from tests.engine.serving.test_owners import direct

WEATHER: Any = {
    "type": "function", "name": "weather", "strict": False,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}  # fmt: skip
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'


def texts(client: openai.OpenAI, name: str) -> list[str]:
    items: Any = client.conversations.items.list(name, order="asc", limit=2)
    return [item.content[0].text for item in items]


def said(text: str, **more: Any) -> Any:
    return {"type": "message", "role": "user", "content": text} | more


def test_a_conversation_and_its_items(client: openai.OpenAI) -> None:
    made = client.conversations.create(metadata={"topic": "demo"}, items=[said("one"), said("two")])
    assert made.id.startswith("conv_")
    assert made.object == "conversation"
    assert made.metadata == {"topic": "demo"}
    assert client.conversations.retrieve(made.id) == made
    added = client.conversations.items.create(made.id, items=[said("three"), said("four")])
    assert [item.content[0].text for item in added.data] == ["three", "four"]  # type: ignore[union-attr]
    assert (added.first_id, added.last_id) == (added.data[0].id, added.data[1].id)
    assert texts(client, made.id) == ["one", "two", "three", "four"]
    page = client.conversations.items.list(made.id, limit=1)
    assert page.has_more
    assert page.last_id == added.last_id
    [third] = client.conversations.items.list(made.id, limit=1, after=added.last_id).data
    assert third == client.conversations.items.retrieve(added.first_id, conversation_id=made.id)
    rest = client.conversations.items.delete(added.first_id, conversation_id=made.id)
    assert rest == made
    assert texts(client, made.id) == ["one", "two", "four"]
    changed = client.conversations.update(made.id, metadata={"topic": "other"})
    assert changed.metadata == {"topic": "other"}
    assert client.conversations.retrieve(made.id) == changed
    gone = client.conversations.delete(made.id)
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "conversation.deleted")
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(made.id)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("store", [False, True])
def test_turns_are_prepended_and_appended(
    served: Served, client: openai.OpenAI, stream: bool, store: bool
) -> None:
    name = client.conversations.create(items=[said("zero"), said("0", role="assistant")]).id

    def respond(**fields: Any) -> Any:
        fields = {"model": PLAIN, "store": store, "stream": stream} | fields
        made: Any = client.responses.create(**fields)
        return list(made)[-1].response if stream else made

    served.says(PLAIN, "One.")
    first = respond(input="a", conversation=name, instructions="not kept")
    assert first.conversation.id == name
    second = respond(input="b", conversation={"id": name})
    assert second.previous_response_id is None
    assert served.prompt(PLAIN) == (
        "user: zero\nassistant: 0\nuser: a\nassistant: One.\nuser: b\nassistant:"
    )
    assert texts(client, name) == ["zero", "0", "a", "One.", "b", "One."]
    third = client.conversations.items.list(name, limit=1).data[0]
    assert third.id == second.output[0].id
    # Without input: reply to the items of the conversation.
    client.conversations.items.create(name, items=[said("c")])
    client.responses.create(model=PLAIN, conversation=name)
    assert served.prompt(PLAIN).endswith("user: c\nassistant:")
    count = client.responses.input_tokens.count(model=PLAIN, input="x", conversation=name)
    assert count.input_tokens > client.responses.input_tokens.count(
        model=PLAIN, input="x"
    ).input_tokens  # fmt: skip


def test_thoughts_and_calls_are_items(served: Served, client: openai.OpenAI) -> None:
    name = client.conversations.create().id
    served.says(THINKER, "I wonder.\n</think>\n\nSo: ", CALL)
    reply = client.responses.create(
        model=THINKER, input="weather?", tools=[WEATHER], conversation=name
    )
    kinds = [item.type for item in client.conversations.items.list(name, order="asc")]
    assert kinds == ["message", "reasoning", "message", "function_call"]
    [call] = [item for item in reply.output if item.type == "function_call"]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    served.says(CALLER, "It is sunny.")
    client.responses.create(model=CALLER, input=[result], tools=[WEATHER], conversation=name)
    assert "sunny" in served.prompt(CALLER)
    assert len(list(client.conversations.items.list(name, limit=100))) == 6


def test_concurrent_responses_lose_no_items(served: Served, client: openai.OpenAI) -> None:
    served.says(PLAIN, "Yes.")
    name = client.conversations.create().id

    def turn(number: int) -> None:
        if number % 2:
            client.conversations.items.create(name, items=[said(f"item {number}")])
        else:
            client.responses.create(model=PLAIN, input=f"turn {number}", conversation=name)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(turn, range(24)))
    found = texts(client, name)
    assert sorted(text for text in found if text != "Yes.") == sorted(
        f"item {number}" if number % 2 else f"turn {number}" for number in range(24)
    )
    for at, text in enumerate(found):
        assert (found[at + 1] == "Yes.") if text.startswith("turn") else True


def test_an_incomplete_response_is_a_turn_and_a_failed_one_is_not(
    served: Served, client: openai.OpenAI
) -> None:
    name = client.conversations.create().id
    served.says(PLAIN, "cut", ends=FinishReason.LENGTH)
    client.responses.create(model=PLAIN, input="a", conversation=name)
    served.says(PLAIN, "fine", "never")
    with served.held(PLAIN) as fail:
        stream = client.responses.create(model=PLAIN, input="b", conversation=name, stream=True)
        for event in stream:
            if event.type == "response.output_text.delta":
                fail(EngineError("the engine broke"))
    assert texts(client, name) == ["a", "cut"]


def test_a_conversation_that_is_deleted_meanwhile(served: Served, client: openai.OpenAI) -> None:
    name = client.conversations.create().id
    served.says(PLAIN, "a", "b")
    with served.paused(PLAIN) as release:
        stream = client.responses.create(model=PLAIN, input="b", conversation=name, stream=True)
        for event in stream:
            if event.type == "response.output_text.delta" and event.delta == "a":
                client.conversations.delete(name)
                release()
    assert event.type == "response.completed"
    with pytest.raises(openai.NotFoundError, match="no such conversation"):
        client.responses.create(model=PLAIN, input="b", conversation=name)


def test_items_of_a_conversation_are_limited() -> None:
    before = [{"id": str(number)} for number in range(MAX_ITEMS - 1)]
    check_new(before, [{"id": "last"}], "items")
    with pytest.raises(RequestError, match="would have 10001 items, the limit is 10000") as caught:
        check_new(before, [{"id": "a"}, {"id": "b"}], "items")
    assert caught.value.param == "items"


BAD_CONVERSATIONS: list[tuple[Any, str | None]] = [
    ([], None),
    ("text", None),
    ({"items": "text"}, "items"),
    ({"items": [5]}, "items.0"),
    ({"items": [{}]}, "items[0].type"),
    ({"items": [said("a"), {"type": "web_search_call"}]}, "items[1].type"),
    ({"items": [said("a", role="nobody")]}, "items[0].role"),
    ({"items": [said("a")] * 21}, "items"),
    ({"items": [said("a", id="same"), said("b", id="same")]}, "items[1].id"),
    ({"items": [{"type": "item_reference", "id": "msg_none"}]}, "items[0].id"),
    ({"metadata": "text"}, "metadata"),
    ({"metadata": {"a": 5}}, "metadata.a"),
    ({"metadata": {"a": "x" * 513}}, "metadata.a"),
    ({"metadata": {"x" * 65: "a"}}, "metadata." + "x" * 65),
    ({"metadata": {str(number): "a" for number in range(17)}}, "metadata"),
]


@pytest.mark.parametrize(("body", "param"), BAD_CONVERSATIONS)
def test_conversations_that_are_refused(served: Served, body: Any, param: str | None) -> None:
    reply = httpx.post(f"{served.url}/v1/conversations", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("method", "tail", "body", "status", "param"),
    [
        ("POST", "", {}, 400, "metadata"),
        ("POST", "", {"metadata": {"a": None}}, 400, "metadata.a"),
        ("POST", "/items", {}, 400, "items"),
        ("POST", "/items", {"items": []}, 400, "items"),
        ("POST", "/items", {"items": [said("b", id="msg_mine")]}, 400, "items[0].id"),
        ("POST", "/items", {"items": [{"type": "item_reference", "id": "msg_mine"}]}, 400,
         "items[0].id"),
        ("GET", "/items?limit=0", None, 400, "query.limit"),
        ("GET", "/items?limit=101", None, 400, "query.limit"),
        ("GET", "/items?order=up", None, 400, "query.order"),
        ("GET", "/items?after=msg_none", None, 400, "after"),
        ("GET", "/items/msg_none", None, 404, None),
        ("DELETE", "/items/msg_none", None, 404, None),
        ("PUT", "", {}, 405, None),
    ],
)  # fmt: skip
def test_what_a_conversation_refuses(
    served: Served, method: str, tail: str, body: Any, status: int, param: str | None
) -> None:
    url = f"{served.url}/v1/conversations"
    name = httpx.post(url, json={"items": [said("a", id="msg_mine")]}).json()["id"]
    before = httpx.get(f"{url}/{name}/items").json()
    reply = httpx.request(method, f"{url}/{name}{tail}", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)
    assert httpx.get(f"{url}/{name}/items").json() == before


def test_input_with_an_id_of_the_conversation_is_refused(served: Served) -> None:
    url = f"{served.url}/v1"
    items = [said("a", id="msg_mine")]
    name = httpx.post(f"{url}/conversations", json={"items": items}).json()["id"]
    body = {"model": PLAIN, "input": items, "conversation": name}
    reply = httpx.post(f"{url}/responses", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "input[0].id")
    empty = httpx.post(f"{url}/conversations", json={}).json()["id"]
    reply = httpx.post(f"{url}/responses", json={"model": PLAIN, "conversation": empty})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "input")


@pytest.mark.parametrize("prefix", ["/v1", "", "/engines", "/engines/v1", "/engines/mlx/v1"])
def test_every_path(served: Served, prefix: str) -> None:
    name = httpx.post(f"{served.url}{prefix}/conversations", json={}).json()["id"]
    assert httpx.get(f"{served.url}{prefix}/conversations/{name}").json()["id"] == name
    items = httpx.get(f"{served.url}{prefix}/conversations/{name}/items").json()
    assert items == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip


def test_the_second_turn_uses_the_prefix_cache(tmp_path: Any) -> None:
    with direct(tmp_path) as house:
        name = house.alice.post("/v1/conversations", json={}).json()["id"]

        def turn(text: str) -> dict[str, Any]:
            body = {"model": "tiny", "input": text, "conversation": name, "max_output_tokens": 4}
            reply = house.alice.post("/v1/responses", json=body | {"ignore_eos": True})
            usage: dict[str, Any] = reply.json()["usage"]
            return usage

        first = turn("a question of some length, so that it fills blocks: " + "0123456789" * 4)
        second = turn("and another one")
        assert first["input_tokens_details"]["cached_tokens"] == 0
        assert second["input_tokens_details"]["cached_tokens"] >= first["input_tokens"] // 2
