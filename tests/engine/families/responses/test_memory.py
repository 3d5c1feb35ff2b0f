"""What is remembered of responses, and for how long."""

from __future__ import annotations

from typing import Any

from modelpack_engine.server.openai.responses.memory import ResponseMemory


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
    memory.add(response("a"), (), own("a"))
    first = memory.find("a")
    assert first is not None
    memory.add(response("b"), first.conversation, own("b"))
    memory.remove("a")
    second = memory.find("b")
    assert second is not None
    assert [item["id"] for item in second.conversation] == ["in_a", "msg_a", "in_b", "msg_b"]


def test_what_was_used_last_stays() -> None:
    memory = ResponseMemory(most=2)
    memory.add(response("a"), (), own("a"))
    memory.add(response("b"), (), own("b"))
    assert memory.find("a") is not None
    memory.add(response("c"), (), own("c"))
    assert memory.find("b") is None
    assert memory.item("msg_b") is None
    assert memory.item("msg_a") == {"id": "msg_a", "text": "x"}
    assert len(memory) == 2


def test_bytes_are_bounded() -> None:
    memory = ResponseMemory(max_bytes=1000)
    for name in "abcdefgh":
        memory.add(response(name, "y" * 300), (), own(name))
    assert 0 < len(memory) <= 3
    assert memory.find("h") is not None


def test_what_turns_share_counts_once() -> None:
    memory = ResponseMemory(max_bytes=1500)
    memory.add(response("0", "y" * 1000), (), own("0"))
    for i in range(1, 5):
        before = memory.find(str(i - 1))
        assert before is not None
        memory.add(response(str(i)), before.conversation, own(str(i)))
    assert len(memory) == 5
    for i in range(4):
        memory.remove(str(i))
    memory.add(response("other", "y" * 1000), (), own("other"))
    assert memory.find("4") is None  # it alone held the large item
    assert memory.find("other") is not None


def test_a_conversation_that_is_larger_than_all_is_not_remembered() -> None:
    memory = ResponseMemory(max_bytes=1000)
    memory.add(response("a"), (), own("a"))
    memory.add(response("large", "y" * 2000), (), own("large"))
    assert memory.find("large") is None
    assert memory.find("a") is not None


def test_time_passes() -> None:
    clock = Clock()
    memory = ResponseMemory(kept_for=10, clock=clock)
    memory.add(response("a"), (), own("a"))
    clock.now = 10
    assert memory.find("a") is not None
    clock.now = 11
    assert memory.find("a") is None
    assert memory.item("msg_a") is None
    assert len(memory) == 0


def test_removing_twice() -> None:
    memory = ResponseMemory()
    memory.add(response("a"), (), own("a"))
    assert memory.remove("a")
    assert not memory.remove("a")
