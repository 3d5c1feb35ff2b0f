"""The store of past responses and its limits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from modelpack_engine.errors import RequestError
from modelpack_server.api.openai.responses.event_log import EventLog
from modelpack_server.api.openai.responses.memory import ResponseMemory


def response(name: str, text: str = "x") -> dict[str, Any]:
    return {"id": name, "output": [{"id": f"msg_{name}", "text": text}]}


def own(name: str) -> list[dict[str, Any]]:
    return [{"id": f"in_{name}"}]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_conversation_grows() -> None:
    memory = ResponseMemory()
    memory.add(None, response("a"), (), own("a"))
    first = memory.find(None, "a")
    assert first is not None
    memory.add(None, response("b"), first.conversation, own("b"))
    memory.remove(None, "a")
    second = memory.find(None, "b")
    assert second is not None
    assert [item["id"] for item in second.conversation] == ["in_a", "msg_a", "in_b", "msg_b"]


def test_what_was_used_last_stays() -> None:
    memory = ResponseMemory(most=2)
    memory.add(None, response("a"), (), own("a"))
    memory.add(None, response("b"), (), own("b"))
    assert memory.find(None, "a") is not None
    memory.add(None, response("c"), (), own("c"))
    assert memory.find(None, "b") is None
    assert memory.item(None, "msg_b") is None
    assert memory.item(None, "msg_a") == {"id": "msg_a", "text": "x"}
    assert len(memory) == 2


def test_bytes_are_bounded() -> None:
    memory = ResponseMemory(max_bytes=20_000)
    for name in "abcdefgh":
        memory.add(None, response(name, "y" * 5000), (), own(name))
    assert 0 < len(memory) <= 3
    assert memory.find(None, "h") is not None


def test_what_turns_share_counts_once() -> None:
    memory = ResponseMemory(max_bytes=45_000)
    memory.add(None, response("0", "y" * 30_000), (), own("0"))
    for i in range(1, 5):
        before = memory.find(None, str(i - 1))
        assert before is not None
        memory.add(None, response(str(i)), before.conversation, own(str(i)))
    assert len(memory) == 5
    for i in range(4):
        memory.remove(None, str(i))
    memory.add(None, response("other", "y" * 30_000), (), own("other"))
    assert memory.find(None, "4") is None  # only this response had the large item
    assert memory.find(None, "other") is not None


def test_a_conversation_that_is_larger_than_all_is_not_remembered() -> None:
    memory = ResponseMemory(max_bytes=20_000)
    memory.add(None, response("a"), (), own("a"))
    memory.add(None, response("large", "y" * 40_000), (), own("large"))
    assert memory.find(None, "large") is None
    assert memory.find(None, "a") is not None


def test_all_that_a_response_holds_counts() -> None:
    """The size includes repeated request fields and the memory overhead of small values."""
    memory = ResponseMemory(max_bytes=100_000)
    for number in range(20):
        repeated = {"metadata": {"key": "y" * 10_000}}
        memory.add(None, response(str(number)) | repeated, (), own(str(number)))
    assert len(memory) <= 10
    memory.add(None, response("many"), (), [{"id": "in", "content": [[] for _ in range(2000)]}])
    assert memory.find(None, "many") is None


def test_a_long_conversation_counts_in_each_of_its_turns() -> None:
    memory = ResponseMemory(max_bytes=10_000_000)
    memory.add(None, response("0"), (), [{"id": f"in_{i}"} for i in range(10_000)])
    for number in range(100):
        before = memory.find(None, str(number))
        assert before is not None
        memory.add(None, response(str(number + 1)), before.conversation, own(str(number)))
    assert len(memory) < 60  # their references alone take 8 MB


def test_time_passes() -> None:
    clock = Clock()
    memory = ResponseMemory(kept_for=10, clock=clock)
    memory.add(None, response("a"), (), own("a"))
    clock.now = 10
    assert memory.find(None, "a") is not None
    clock.now = 11
    assert memory.find(None, "a") is None
    assert memory.item(None, "msg_a") is None
    assert len(memory) == 0


def test_removing_twice() -> None:
    memory = ResponseMemory()
    memory.add(None, response("a"), (), own("a"))
    assert memory.remove(None, "a")
    assert not memory.remove(None, "a")


def test_owners_do_not_meet() -> None:
    memory = ResponseMemory()
    memory.add("alice", response("same"), (), own("same"))
    assert memory.find("bob", "same") is None
    assert memory.find(None, "same") is None
    assert memory.item("bob", "in_same") is None
    memory.add("bob", response("same", "other"), (), [{"id": "in_same", "of": "bob"}])
    assert memory.item("alice", "in_same") == {"id": "in_same"}
    assert memory.item("bob", "in_same") == {"id": "in_same", "of": "bob"}
    assert not memory.remove("carol", "same")
    assert memory.remove("bob", "same")
    assert memory.item("alice", "msg_same") == {"id": "msg_same", "text": "x"}
    assert memory.item("bob", "msg_same") is None
    assert len(memory) == 1


def test_no_owner_crowds_out_another() -> None:
    memory = ResponseMemory(most=10)
    for name in "abc":
        memory.add("alice", response(name), (), own(name))
    for number in range(100):
        memory.add(f"bob{number % 2}", response(str(number)), (), own(str(number)))
    assert [memory.find("alice", name) is not None for name in "abc"] == [True] * 3
    assert len(memory) == 10
    assert memory.find("bob1", "99") is not None


def test_no_owner_takes_all_bytes() -> None:
    memory = ResponseMemory(max_bytes=20_000)
    memory.add("alice", response("a", "y" * 2000), (), own("a"))
    for number in range(20):
        memory.add("bob", response(str(number), "y" * 5000), (), own(str(number)))
    assert memory.find("alice", "a") is not None
    assert memory.find("bob", "19") is not None
    memory.add("bob", response("large", "y" * 40_000), (), own("large"))
    assert memory.find("alice", "a") is not None
    assert memory.find("bob", "19") is not None


def test_a_conversation_and_responses_share_items() -> None:
    memory = ResponseMemory(max_bytes=60_000)
    large = {"id": "large", "text": "y" * 20_000}
    name = memory.create(None, {"a": "b"}, [large]).id
    for number in range(5):
        before = memory.conversation(None, name)
        assert before is not None
        answer = response(str(number))
        memory.extend(None, name, [*own(str(number)), *answer["output"]])
        memory.add(None, answer, before.items, own(str(number)))
    kept = memory.conversation(None, name)
    assert kept is not None
    assert len(kept.items) == 11
    assert len(memory) == 6
    assert memory.remove_conversation(None, name)
    assert memory.item(None, "msg_0") == {"id": "msg_0", "text": "x"}  # its response has it
    assert memory.item(None, "large") is None
    for number in range(5):
        assert memory.remove(None, str(number))
    assert memory._shares == {}


def test_conversations_are_no_responses() -> None:
    memory = ResponseMemory()
    name = memory.create("alice", {}, own("a")).id
    memory.add("alice", response("r"), (), own("r"))
    assert memory.find("alice", name) is None
    assert not memory.remove("alice", name)
    assert memory.conversation("alice", "r") is None
    assert not memory.remove_conversation("alice", "r")
    for owner in ("bob", None):
        assert memory.conversation(owner, name) is None
        assert memory.extend(owner, name, own("b")) is None
        assert memory.remove_item(owner, name, "in_a") is None
        assert memory.describe(owner, name, {}) is None
        assert not memory.remove_conversation(owner, name)
    assert memory.remove_item("alice", name, "in_b") is None
    kept = memory.conversation("alice", name)
    assert kept is not None
    assert kept.items == ({"id": "in_a"},)


def test_a_conversation_that_would_be_too_large_stays_as_it_is() -> None:
    memory = ResponseMemory(max_bytes=20_000)
    memory.add(None, response("a"), (), own("a"))
    name = memory.create(None, {}, own("b")).id
    with pytest.raises(RequestError, match="the conversation exceeds 20000 bytes"):
        memory.extend(None, name, [{"id": "large", "text": "y" * 40_000}])
    with pytest.raises(RequestError, match="the conversation exceeds 20000 bytes"):
        memory.create(None, {}, [{"id": "large", "text": "y" * 40_000}])
    kept = memory.conversation(None, name)
    assert kept is not None
    assert kept.items == ({"id": "in_b"},)
    assert memory.find(None, "a") is not None
    assert len(memory) == 2


def test_the_events_of_a_stream_count() -> None:
    async def log_of(size: int) -> EventLog:
        log = EventLog()
        log.add(["x" * size])
        return log

    memory = ResponseMemory(max_bytes=20_000)
    memory.add(None, response("a"), (), own("a"), asyncio.run(log_of(8000)))
    memory.add(None, response("b"), (), own("b"), asyncio.run(log_of(40_000)))
    assert memory.find(None, "b") is None
    kept = memory.find(None, "a")
    assert kept is not None
    assert kept.events is not None
    for name in "cd":
        memory.add(None, response(name), (), own(name), asyncio.run(log_of(8000)))
    assert memory.find(None, "a") is None


def test_conversations_are_limited_with_responses() -> None:
    memory = ResponseMemory(most=4)
    mine = memory.create("alice", {}, own("a")).id
    for number in range(10):
        memory.create("bob", {}, own(str(number)))
        memory.add("bob", response(str(number)), (), ())
    assert len(memory) == 4
    assert memory.conversation("alice", mine) is not None


def test_a_conversation_is_kept_from_its_last_change() -> None:
    clock = Clock()
    memory = ResponseMemory(kept_for=10, clock=clock)
    name = memory.create(None, {}, ()).id
    clock.now = 10
    memory.extend(None, name, own("a"))
    clock.now = 20
    assert memory.item(None, "in_a") is not None
    assert memory.conversation(None, name) is not None
    clock.now = 21
    assert memory.item(None, "in_a") is None
    assert memory.conversation(None, name) is None
    assert len(memory) == 0


def test_an_id_that_two_turns_chose_is_changed() -> None:
    memory = ResponseMemory()
    name = memory.create(None, {}, own("a")).id
    changed = memory.extend(None, name, [{"id": "in_a", "text": "other"}])
    assert changed is not None
    assert changed.items[0] == {"id": "in_a"}
    assert changed.items[1]["text"] == "other"
    assert changed.items[1]["id"].startswith("item_")


class OwnedMemory(RuleBasedStateMachine):
    """Owners with equal ids of responses and items, and the items that each must find."""

    OWNERS = st.sampled_from([None, "alice", "bob"])
    IDS = st.sampled_from(["1", "2", "3"])

    def __init__(self) -> None:
        super().__init__()
        self.memory = ResponseMemory(most=100)
        self.responses: dict[tuple[str | None, str], str] = {}
        self.items: dict[tuple[str | None, str], dict[str, str]] = {}
        self.count = 0

    @rule(owner=OWNERS, name=IDS, item=IDS)
    def add(self, owner: str | None, name: str, item: str) -> None:
        self.remove(owner, name)
        self.count += 1
        text = f"{owner} {self.count}"
        own = {"id": item, "type": "message", "content": text}
        self.memory.add(owner, {"id": name, "output": [], "text": text}, (), (own,))
        self.responses[owner, name] = text
        self.items.setdefault((owner, item), {})[name] = text

    @rule(owner=OWNERS, name=IDS)
    def remove(self, owner: str | None, name: str) -> None:
        expected = self.responses.pop((owner, name), None) is not None
        assert self.memory.remove(owner, name) is expected
        for (whose, _), texts in self.items.items():
            if whose == owner:
                texts.pop(name, None)

    @invariant()
    def each_owner_finds_its_own(self) -> None:
        for owner in (None, "alice", "bob"):
            for name in ("1", "2", "3"):
                found = self.memory.find(owner, name)
                text = found.response["text"] if found is not None else None
                assert text == self.responses.get((owner, name))
                item = self.memory.item(owner, name)
                text = item["content"] if item is not None else None
                texts = self.items.get((owner, name), {})
                assert text == (list(texts.values())[-1] if texts else None)


TestOwnedMemory = OwnedMemory.TestCase
