"""Background responses with OpenAI's own client: polled, cancelled, streamed again, deleted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from modelpack.errors import NotFoundError
from modelpack_engine.errors import EngineError, QueueFullError, RequestError
from modelpack_engine.outputs import FinishReason
from modelpack_server.api.openai.responses.background import (
    BackgroundResponse,
    BackgroundResponses,
)
from modelpack_server.api.openai.responses.event_log import EventLog
from modelpack_server.api.openai.responses.replies import Reply
from modelpack_server.api.openai.responses.requests import ResponseRequest
from tests.engine.families.served import PLAIN, Served, serving
from tests.scenarios.processes import wait_until

RUNNING = ("queued", "in_progress")


def begin(client: openai.OpenAI, **fields: Any) -> Any:
    given = {"model": PLAIN, "input": "hello", "background": True} | fields
    return client.responses.create(**given)


def until(client: openai.OpenAI, name: str, reached: Callable[[Any], bool]) -> Any:
    """Poll a response, as clients do, until `reached` is true of it."""
    wait_until(lambda: reached(client.responses.retrieve(name)), "the status of a response")
    return client.responses.retrieve(name)


def ended(client: openai.OpenAI, name: str) -> Any:
    return until(client, name, lambda found: found.status not in RUNNING)


def test_a_response_that_is_polled(served: Served, client: openai.OpenAI) -> None:
    served.says(PLAIN, "Hello", " world")
    with served.paused(PLAIN) as release:
        made = begin(client)
        assert made.status == "queued"
        assert made.background is True
        assert made.output == []
        running = until(client, made.id, lambda found: found.status == "in_progress")
        assert running.usage is None
        with pytest.raises(openai.BadRequestError, match="it has not ended"):
            client.responses.create(model=PLAIN, input="more", previous_response_id=made.id)
        items: Any = client.responses.input_items.list(made.id).data
        assert [item.content[0].text for item in items] == ["hello"]
        release()
        done = ended(client, made.id)
    assert done.status == "completed"
    assert done.output_text == "Hello world"
    assert done.usage.output_tokens == 2
    assert client.responses.cancel(made.id) == done
    client.responses.create(model=PLAIN, input="more", previous_response_id=made.id)
    assert served.prompt(PLAIN) == "user: hello\nassistant: Hello world\nuser: more\nassistant:"


def test_ends_that_are_not_completions(served: Served, client: openai.OpenAI) -> None:
    served.says(PLAIN, "cut", ends=FinishReason.LENGTH)
    cut = ended(client, begin(client).id)
    assert cut.status == "incomplete"
    assert cut.incomplete_details.reason == "max_output_tokens"
    served.says(PLAIN, "fine")
    long = ended(client, begin(client, input="x" * 500_000).id)
    assert long.status == "failed"
    assert long.error.code == "invalid_prompt"
    assert "context" in long.error.message
    served.says(PLAIN, "fine", "never")
    with served.held(PLAIN) as fail:
        made = begin(client, stream=True)
        for event in made:
            if event.type == "response.output_text.delta":
                fail(EngineError("it broke"))
    assert event.type == "response.failed"
    broken = client.responses.retrieve(event.response.id)
    assert (broken.status, broken.error.message) == ("failed", "it broke")  # type: ignore[union-attr]


def test_cancelling(served: Served, client: openai.OpenAI) -> None:
    served.says(PLAIN, "Hello", " world")
    with served.paused(PLAIN):
        made = begin(client)
        until(client, made.id, lambda found: found.status == "in_progress")
        cancelled = client.responses.cancel(made.id)
        assert cancelled.status == "cancelled"
        assert cancelled.error is None
        assert client.responses.cancel(made.id) == cancelled
        assert client.responses.retrieve(made.id) == cancelled
        assert not served.engines[PLAIN]._tasks
    plain = client.responses.create(model=PLAIN, input="a")
    with pytest.raises(openai.BadRequestError, match="not created with background"):
        client.responses.cancel(plain.id)


def test_a_stream_that_is_cancelled(served: Served, client: openai.OpenAI) -> None:
    served.says(PLAIN, "Hello", " world")
    with served.paused(PLAIN):
        kinds, started = [], ""
        for event in begin(client, stream=True):
            kinds.append(event.type)
            if event.type == "response.created":
                started = event.response.id
            elif event.type == "response.output_text.delta":
                client.responses.cancel(started)
    assert kinds[-1] == "response.cancelled"
    assert "response.output_item.done" in kinds
    assert client.responses.retrieve(started).output_text == "Hello"


def test_deleting_cancels(served: Served, client: openai.OpenAI) -> None:
    served.says(PLAIN, "Hello", " world")
    with served.paused(PLAIN):
        made = begin(client)
        until(client, made.id, lambda found: found.status == "in_progress")
        client.responses.delete(made.id)
        for call in (client.responses.retrieve, client.responses.cancel, client.responses.delete):
            with pytest.raises(openai.NotFoundError):
                call(made.id)
        engine = served.engines[PLAIN]
        wait_until(lambda: not engine._tasks, "the end of the request")


def test_a_client_that_leaves_comes_back(served: Served, client: openai.OpenAI) -> None:
    served.says(PLAIN, "Hello", " world")
    with served.paused(PLAIN) as release:
        seen: list[Any] = []
        with begin(client, stream=True) as stream:
            for event in stream:
                seen.append(event)
                if event.type == "response.output_text.delta":
                    break
        name = seen[0].response.id
        assert seen[0].response.status == "queued"
        assert [event.type for event in seen[:3]] == [
            "response.created", "response.queued", "response.in_progress",
        ]  # fmt: skip
        resumed = client.responses.retrieve(name, stream=True, starting_after=2)
        first = next(iter(resumed))
        assert first.sequence_number == 3
        assert first.type == "response.output_item.added"
        release()
        rest = [first, *resumed]
    assert [event.sequence_number for event in rest] == list(range(3, 3 + len(rest)))
    assert rest[-1].type == "response.completed"
    again = list(client.responses.retrieve(name, stream=True))
    assert again[3:] == rest
    assert again[: len(seen)] == seen
    last = len(again) - 1
    assert list(client.responses.retrieve(name, stream=True, starting_after=last)) == []
    assert list(client.responses.retrieve(name, stream=True, starting_after=last - 1)) == again[-1:]
    assert client.responses.retrieve(name).output_text == "Hello world"


def test_the_helper_for_streams_resumes(served: Served, client: openai.OpenAI) -> None:
    served.says(PLAIN, "Hello", " world")
    with client.responses.stream(model=PLAIN, input="hello", background=True) as stream:
        final = stream.get_final_response()
    with client.responses.stream(response_id=final.id, starting_after=0) as stream:
        assert stream.get_final_response().output_text == "Hello world"


def test_a_conversation_gets_its_turn(served: Served, client: openai.OpenAI) -> None:
    served.says(PLAIN, "Hello", " world")
    name = client.conversations.create().id
    with served.paused(PLAIN):
        cancelled = begin(client, conversation=name)
        client.responses.cancel(cancelled.id)
    assert list(client.conversations.items.list(name)) == []
    ended(client, begin(client, conversation=name).id)
    items: Any = client.conversations.items.list(name, order="asc")
    assert [item.content[0].text for item in items] == ["hello", "Hello world"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"background": "yes"}, 400, "background"),
        ({"background": 1}, 400, "background"),
        ({"store": False}, 400, "store"),
        ({"model": "ai/none:v1"}, 404, None),
        ({"input": ""}, 400, "input"),
        ({"conversation": "conv_none"}, 404, None),
        ({"previous_response_id": "resp_none"}, 400, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, 400, "text.format.type"),
        ({"keep_alive": "soon"}, 400, "keep_alive"),
        ({"n": 2}, 400, "n"),
    ],
)
def test_what_is_refused_at_once(
    served: Served, body: dict[str, Any], status: int, param: str | None
) -> None:
    sent = {"model": PLAIN, "input": "hello", "background": True} | body
    for stream in (False, True):
        reply = httpx.post(f"{served.url}/v1/responses", json=sent | {"stream": stream})
        assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("stream=true&starting_after=-1", "query.starting_after"),
        ("stream=true&starting_after=x", "query.starting_after"),
        ("stream=perhaps", "query.stream"),
        ("stream=true", "stream"),
    ],
)
def test_streams_that_are_refused(
    served: Served, client: openai.OpenAI, query: str, param: str
) -> None:
    served.says(PLAIN, "Hello")
    made = begin(client)
    reply = httpx.get(f"{served.url}/v1/responses/{made.id}?{query}")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_stopping_the_server_cancels_at_once() -> None:
    with serving() as served, served.paused(PLAIN):
        served.says(PLAIN, "Hello", " world")
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            made = begin(client)
            until(client, made.id, lambda found: found.status == "in_progress")
            stream = begin(client, stream=True)
            kinds = [next(stream).type]
            served.stop()
            kinds += [event.type for event in stream]
    assert kinds[-1] == "response.cancelled"  # otherwise the stream is cut after 30 s


# Without a server


def reply_of(**fields: Any) -> Reply:
    return Reply(ResponseRequest(model="m", input="x", background=True, **fields))


async def forever(response: BackgroundResponse, emit: Callable[[list[str]], None]) -> None:
    await asyncio.Event().wait()


async def forget(response: BackgroundResponse) -> None:
    return None


def test_running_responses_are_limited() -> None:
    async def scenario() -> None:
        running = BackgroundResponses(most=3, most_of_owner=2)

        def start(owner: str | None) -> BackgroundResponse:
            return running.start(owner, reply_of(), (), forever, forget, keeps_events=False)

        first, _ = start("alice"), start("alice")
        with pytest.raises(QueueFullError, match="2 background responses of this API key"):
            start("alice")
        start("bob")
        with pytest.raises(QueueFullError, match="3 background responses in all"):
            start(None)
        assert running.find("bob", first.reply.id) is None
        first.cancel()  # before its task has begun
        await first.until_end()
        assert running.find("alice", first.reply.id) is None
        start("alice")
        running.close()
        while len(running):
            await asyncio.sleep(0)
        with pytest.raises(Exception, match="stopping"):
            start("alice")

    asyncio.run(scenario())


def test_a_response_that_ends_while_it_is_cancelled_is_stored_once() -> None:
    async def scenario() -> None:
        running = BackgroundResponses()
        stored: list[str] = []

        async def generate(response: BackgroundResponse, emit: Callable[[list[str]], None]) -> None:
            with response.uninterrupted():
                response.cancel()
                await asyncio.sleep(0)
            raise AssertionError("it was cancelled")

        async def store(response: BackgroundResponse) -> None:
            response.cancel()
            await asyncio.sleep(0)
            stored.append(response.remembered().response["status"])

        made = running.start(None, reply_of(), (), generate, store, keeps_events=True)
        await made.until_end()
        assert stored == ["cancelled"]
        assert made.events is not None
        text = "".join([piece async for piece in made.events.read(0)])
        assert text.count("event: ") == 3
        assert text.count("event: response.cancelled") == 1

    asyncio.run(scenario())


def test_errors_end_a_response() -> None:
    async def scenario(error: Exception) -> dict[str, Any]:
        running = BackgroundResponses()

        async def generate(response: BackgroundResponse, emit: Callable[[list[str]], None]) -> None:
            raise error

        made = running.start(None, reply_of(), (), generate, forget, keeps_events=True)
        await made.until_end()
        found: dict[str, Any] = made.remembered().response["error"]
        return found

    for error, code in (
        (QueueFullError("full", retry_after=1), "rate_limit_exceeded"),
        (RequestError("bad"), "invalid_prompt"),
        (NotFoundError("gone"), "invalid_prompt"),
        (ValueError("a bug"), "server_error"),
    ):
        assert asyncio.run(scenario(error))["code"] == code


def test_a_log_drops_its_oldest_events() -> None:
    async def scenario() -> None:
        log = EventLog(max_bytes=10_000)
        reader = log.read(0)
        log.add(["first"])
        assert await anext(reader) == "first"
        for number in range(1, 300):
            log.add([f"{number} " + "x" * 100])
        assert log.size <= 10_000
        assert log.first > 200
        with pytest.raises(RequestError, match="are no longer kept"):
            await anext(reader)
        log.end()
        whole = "".join([piece async for piece in log.read(log.first)])
        assert whole.startswith(f"{log.first} ")
        assert whole.count("x" * 100) == 300 - log.first
        assert [piece async for piece in log.read(1000)] == []

    asyncio.run(scenario())


def test_the_events_of_all_are_limited() -> None:
    async def scenario() -> None:
        running = BackgroundResponses(max_event_bytes=100_000)

        async def talk(response: BackgroundResponse, emit: Callable[[list[str]], None]) -> None:
            for _ in range(200):
                emit(["x" * 1000])
                await asyncio.sleep(0)
            await forever(response, emit)

        made = [
            running.start(None, reply_of(), (), talk, forget, keeps_events=True) for _ in range(3)
        ]
        quiet = running.start(None, reply_of(), (), forever, forget, keeps_events=True)
        for _ in range(300):
            await asyncio.sleep(0)
        logs = [response.events for response in made if response.events is not None]
        assert 50_000 < sum(log.size for log in logs) <= 100_000
        assert all(log.first > 0 for log in logs)
        assert quiet.events is not None
        assert quiet.events.first == 0
        running.close()
        while len(running):
            await asyncio.sleep(0)
        assert running._event_bytes == 0

    asyncio.run(scenario())
