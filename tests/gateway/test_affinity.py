"""The policy "prefix": prompts that begin alike go to the same upstream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from modelpack_server.gateway.affinity import LENGTH, prefix_key
from modelpack_server.gateway.upstreams import FEW_RUNNING, Upstreams
from tests.gateway.servers import Upstream, gateway, serving

SYSTEM = {"role": "system", "content": "Be brief."}


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    """Return a chat whose messages are the user's and the model's in turn, after the system's."""
    roles = "user", "assistant"
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"model": "m", "messages": [SYSTEM, *turns], **more}


ALIKE: dict[str, tuple[Any, Any]] = {
    "turns of a chat": (chat("Hi"), chat("Hi", "Hello", "And you?", temperature=1)),
    "turns with Anthropic's system": (
        {"system": "S", "messages": [{"role": "user", "content": "Hi"}]},
        {"system": "S", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant"}]},
    ),
    "a long prompt": ({"prompt": "a" * 9000}, {"prompt": "a" * 9000 + "b"}),
    "long token ids": ({"prompt": [7] * 9000}, {"prompt": [7] * 9000 + [8]}),
    "a picture": (
        {
            "input": [
                {"role": "user", "content": [{"type": "input_image", "image_url": "d" * 9000}]}
            ]
        },
        {
            "input": [
                {"role": "user", "content": [{"type": "input_image", "image_url": "d" * 9999}]}
            ]
        },
    ),
}
DIFFERENT: dict[str, tuple[Any, Any]] = {
    "first messages": (chat("Hi"), chat("Hello")),
    "models": ({"model": "a", "prompt": "x"}, {"model": "b", "prompt": "x"}),
    "instructions": ({"instructions": "a", "input": "x"}, {"instructions": "b", "input": "x"}),
    "a border": ({"system": "ab", "prompt": "c"}, {"system": "a", "prompt": "bc"}),
    "token ids": ({"prompt": [1, 23]}, {"prompt": [12, 3]}),
    "the last that counts": ({"prompt": "a" * LENGTH}, {"prompt": "a" * (LENGTH - 1) + "b"}),
}


@pytest.mark.parametrize(("one", "other"), ALIKE.values(), ids=ALIKE)
def test_alike(one: Any, other: Any) -> None:
    assert prefix_key(one) == prefix_key(other) is not None


@pytest.mark.parametrize(("one", "other"), DIFFERENT.values(), ids=DIFFERENT)
def test_different(one: Any, other: Any) -> None:
    assert prefix_key(one) != prefix_key(other)


@pytest.mark.parametrize("document", [None, [], "x", {}, {"model": "m"}, {"messages": []}])
def test_without_a_prompt(document: Any) -> None:
    assert prefix_key(document) is None


@pytest.mark.parametrize("prompt", ["\ud800", ["x", None, 1.5, True], {"a": [[{}]]}])
def test_strange_prompts_have_a_key(prompt: Any) -> None:
    assert prefix_key({"prompt": prompt})


def names(upstreams: Upstreams, count: int = 200) -> list[str]:
    """Return whom each of many prompts gets, with nothing running."""
    found = (upstreams.choose(prefix=str(i).encode()) for i in range(count))
    return [upstream.name for upstream in found if upstream]


class Counted(list[Any]):
    """An array that counts how many of its items are looked at."""

    seen = 0

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            self.seen += 1
            yield item


@pytest.mark.parametrize("item", ["", None, 0, {"text": ""}])
def test_few_values_are_looked_at(item: Any) -> None:
    """A body may have two million of them, and no other request is answered meanwhile."""
    content = Counted([item] * (3 * LENGTH))
    assert prefix_key({"messages": [{"role": "user", "content": content}]})
    assert content.seen <= LENGTH


def test_each_prompt_keeps_its_upstream_while_others_come_and_go() -> None:
    upstreams = Upstreams([f"http://127.0.0.1:{port}" for port in (1, 2, 3)], policy="prefix")
    first = names(upstreams)
    assert first == names(upstreams)
    assert min(Counter(first).values()) > 40
    gone = upstreams.all[0]
    gone.healthy = False
    moved = [(a, b) for a, b in zip(first, names(upstreams), strict=True) if a != b]
    assert {a for a, _ in moved} == {gone.name}
    assert {b for _, b in moved} == {u.name for u in upstreams.all[1:]}
    gone.healthy = True
    assert names(upstreams) == first


def test_a_loaded_upstream_is_relieved() -> None:
    upstreams = Upstreams([f"http://127.0.0.1:{port}" for port in (1, 2, 3)], policy="prefix")
    for _ in range(60):  # of one prompt
        chosen = upstreams.choose(prefix=b"popular")
        assert chosen is not None
        chosen.running += 1
    counts = sorted(upstream.running for upstream in upstreams.all)
    assert counts[-1] <= 1.25 * 20 + 1
    few = Upstreams(["http://127.0.0.1:1", "http://127.0.0.1:2"], policy="prefix")
    chosen = {id(few.choose(prefix=b"x")) for _ in range(FEW_RUNNING)}
    assert len(chosen) == 1


def test_without_a_prompt_the_least_busy_is_chosen() -> None:
    upstreams = Upstreams(["http://127.0.0.1:1", "http://127.0.0.1:2"], policy="prefix")
    upstreams.all[0].running = 1
    chosen = [upstreams.choose() for _ in range(4)]
    assert all(each is upstreams.all[1] for each in chosen)


def test_turns_of_a_conversation_reach_one_server() -> None:
    servers = [Upstream() for _ in range(3)]
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(server)) for server in servers]
        served = stack.enter_context(gateway(*urls, policy="prefix"))
        for talk in range(40):
            texts = [f"question {talk}"]
            for turn in range(2):
                reply = served.client.post("/v1/chat/completions", json=chat(*texts))
                assert reply.status_code == 200
                texts += ["answer", f"more {turn}"]
    counts = [Counter(asked.body.split(b"question ")[1][:2] for asked in server.asked)
              for server in servers]  # fmt: skip
    assert all(count == 2 for found in counts for count in found.values())
    assert sum(map(len, counts)) == 40
    assert min(map(len, counts)) > 0
