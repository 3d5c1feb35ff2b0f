"""The store of past responses and its limits."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

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


class OwnedMemory(RuleBasedStateMachine):
    """Owners with equal ids of responses and items, and the items that each must find."""

    OWNERS = st.sampled_from([None, "alice", "bob"])
    IDS = st.sampled_from(["1", "2", "3"])

    def __init__(self) -> None:
        super().__init__()
        self.memory = ResponseMemory(most=100)
        self.responses: dict[tuple[str | None, str], str] = {}
        self.items: dict[tuple[str | None, str], tuple[str, str]] = {}
        self.count = 0

    @rule(owner=OWNERS, name=IDS, item=IDS)
    def add(self, owner: str | None, name: str, item: str) -> None:
        self.remove(owner, name)
        self.count += 1
        text = f"{owner} {self.count}"
        own = {"id": item, "type": "message", "content": text}
        self.memory.add(owner, {"id": name, "output": [], "text": text}, (), (own,))
        self.responses[owner, name] = text
        self.items[owner, item] = (name, text)

    @rule(owner=OWNERS, name=IDS)
    def remove(self, owner: str | None, name: str) -> None:
        expected = self.responses.pop((owner, name), None) is not None
        assert self.memory.remove(owner, name) is expected
        for key, (response, _) in list(self.items.items()):
            if key[0] == owner and response == name:
                del self.items[key]

    @invariant()
    def each_owner_finds_its_own(self) -> None:
        for owner in (None, "alice", "bob"):
            for name in ("1", "2", "3"):
                found = self.memory.find(owner, name)
                text = found.response["text"] if found is not None else None
                assert text == self.responses.get((owner, name))
                item = self.memory.item(owner, name)
                text = item["content"] if item is not None else None
                assert text == self.items.get((owner, name), (None, None))[1]


TestOwnedMemory = OwnedMemory.TestCase
